"""Work that is written shard by shard, and continues after a kill where it stopped.

    folder/00000042.npy          an array and its record, written beside its place and renamed
    <folder>.manifest.json       written last: all shards are there

A shard's record follows the array in the same file, where numpy does not look: the digest of its
inputs, its number, shape and dtype, and the digest of its bytes. In a file of its own the record
could belong to the shard of another process. A shard whose record or size is wrong counts as
missing. Its bytes are compared with the digest when it is first read, so that no start reads all
shards just to verify them; one whose content has changed is computed again then.

Each shard is computed on its own, so the files are the same bytes however often a start was killed;
nothing that is on disk is computed again. Of several processes (torchrun, srun) each computes its
share of the shards, by their numbers. They communicate through the folder alone, which all must
see, and it is the same folder whatever their number.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifests
from caravan.distributed import is_main_process, rank, wait_until, world_size
from caravan.errors import InputError
from caravan.files import replacing

RECORD_BYTES = 256
"""At the end of each file: the record as JSON, padded with spaces."""

Compute = Callable[[list[int]], Iterable[np.ndarray]]
"""Gives the arrays of the shards of these numbers, in their order."""

log = logging.getLogger(__name__)


def shard(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.npy"


class ShardFiles:
    """The shards of a folder; each is verified when it is first read.

    Args:
        inputs: digests and settings that determine the shards.
        count: the number of shards.
        compute: computes missing or damaged shards.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], count: int, compute: Compute) -> None:
        self.folder = folder
        self.count = count
        self._inputs = manifests.digest(inputs)
        self._compute = compute
        self._verified: set[int] = set()

    def missing(self, among: Iterable[int] | None = None) -> list[int]:
        """The numbers of shards that are not there or not whole, by size and record alone."""
        numbers = range(self.count) if among is None else among
        return [number for number in numbers if self._record(number) is None]

    def write(self, numbers: list[int]) -> None:
        """Compute and write shards."""
        for number, array in zip(numbers, self._compute(numbers) if numbers else (), strict=True):
            _write(shard(self.folder, number), array, {"shard": number, "inputs": self._inputs})
            self._verified.add(number)

    def read(self, number: int) -> np.ndarray:
        """A shard's array, memory-mapped."""
        path = shard(self.folder, number)
        if number not in self._verified:
            record = self._record(number)
            if record is None or manifests.content_digest(path, record["bytes"]) != record["xxh3"]:
                log.warning("%s is damaged; it is computed again", path)
                self.write([number])
            self._verified.add(number)
        array: np.ndarray = np.load(path, mmap_mode="r")
        return array

    def _record(self, number: int) -> dict[str, Any] | None:
        """The record of a shard; None if the file is missing, not whole, or another shard's."""
        path = shard(self.folder, number)
        if path.is_symlink():
            return None
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2) - RECORD_BYTES
                file.seek(max(size, 0))
                record = json.loads(file.read())
        except (OSError, ValueError, RecursionError):
            return None
        expected = {"shard": number, "inputs": self._inputs, "bytes": size}
        if not isinstance(record, dict) or not record.items() >= expected.items():
            return None
        return record if isinstance(record.get("xxh3"), str) else None


def fill(folder: Path, inputs: dict[str, Any], count: int, compute: Compute) -> ShardFiles:
    """Write the shards that are missing; returns when all are there, whoever wrote them.

    Args: as in `ShardFiles`.

    Raises:
        InputError: the folder is a symbolic link.
    """
    refuse_link(folder)
    files = ShardFiles(folder, inputs, count, compute)
    missing = files.missing()
    if not missing and manifests.matches(folder, inputs):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    files.write([number for number in missing if number % world_size() == rank()])

    def whole() -> bool:
        missing[:] = files.missing(missing)
        return not missing

    wait_until(whole)
    if is_main_process():
        manifests.write(folder, inputs)
    wait_until(lambda: manifests.matches(folder, inputs))
    return files


def refuse_link(folder: Path) -> None:
    """Refuse a symbolic link where a product of a store belongs.

    Raises:
        InputError: it is one; what is written there would land in a folder of somebody else.
    """
    if folder.is_symlink():
        raise InputError(
            f"{folder} is a symbolic link, which Caravan does not follow in a store; remove the"
            " link, or choose another store="
        )


def _write(path: Path, array: np.ndarray, of: dict[str, Any]) -> None:
    with replacing(path) as scratch:
        with scratch.open("wb") as file:
            np.save(file, array)
        record = {
            **of,
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "bytes": scratch.stat().st_size,
            "xxh3": manifests.content_digest(scratch),
        }
        with scratch.open("ab") as file:
            file.write(json.dumps(record).ljust(RECORD_BYTES).encode())
