"""Products on disk: computed once, named by a digest of their inputs, verified when read.

    store/passages.3f9c2a41d07b/                 named by the digest of its inputs
    store/passages.3f9c2a41d07b.manifest.json    the inputs; written when the product is complete

A product is reused only if all its inputs are equal. The inputs are:

- BM25's index: collection, settings of BM25, versions of Caravan, bm25s and PyStemmer.
- Embeddings: model folder, collection, length, precision, attention, token budget, block, remote
  code, versions of Caravan, torch, transformers and tokenizers; for queries also the split.
- Scores: as embeddings, with the candidates and the settings of the reranker.
- Runs: the inputs of their products, depth, index or fusion, `ignore_identical_ids`.

Collections, model folders and runs are represented by digests of their content. Different inputs
get different names, so evaluations can share a store: they never overwrite each other's products,
and an interrupted evaluation resumes its own. Nothing is evicted. A search also reuses the products
of any evaluation. A product whose content has changed since it was written is recomputed when it
is read.

`Shards` stores one array per file. The record of a shard follows the array in the same file, where
numpy does not read: digest of the inputs, number, shape, dtype, and digest of the bytes. (A
separate file could belong to the shard of another process.) A shard with a wrong record or size
counts as missing. Its bytes are compared with the digest at the first read, so starting up does not
read all shards. Shards are computed independently, so an interruption does not change their bytes.
With several processes (torchrun, srun) each computes its share of the shards; the processes
communicate only through the folder.
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifests
from caravan.distributed import is_main_process, rank, wait_until, world_size
from caravan.errors import InputError
from caravan.files import replacing

RECORD_BYTES = 256
"""Size of the record at the end of each shard: JSON, padded with spaces."""
SUFFIX = ".manifest.json"

Compute = Callable[[list[int]], Iterable[np.ndarray]]
"""Takes shard numbers and returns their arrays in the same order."""

log = logging.getLogger(__name__)


class Store:
    """A folder of products.

    Args:
        folder: where new products are written.
        reuse: finished products in any store below this folder are used as well.
    """

    def __init__(self, folder: Path, reuse: Path | None = None) -> None:
        self.folder = folder
        self.reuse = reuse

    def path(self, name: str, inputs: dict[str, Any]) -> Path:
        """The path of a product, finished or not, from its name and the digest of its inputs.

        Args:
            name: kind of the product, such as "passages".
            inputs: everything that determines its content.
        """
        found = _finished(self.folder, name, inputs) or _finished(self.reuse, name, inputs)
        if found is None:
            path = self.folder / f"{name}.{manifests.digest(inputs)[:12]}"
            self._log_other_versions(path, name, inputs)
            return path
        if found.parent != self.folder:
            log.info("reusing %s, from the same model, collection, settings and versions", found)
        return found

    def shards(self, name: str, inputs: dict[str, Any], count: int, compute: Compute) -> Shards:
        """Open a product of `count` arrays; waits until all processes have written their shards.

        Args:
            compute: computes missing or damaged shards.

        Raises:
            InputError: If the product's folder is a symbolic link.
        """
        folder = self.path(name, inputs)
        _refuse_link(folder)
        shards = Shards(folder, inputs, count, compute)
        missing = shards.missing()
        if not missing and manifests.matches(folder, inputs):
            return shards
        folder.mkdir(parents=True, exist_ok=True)
        shards.write([number for number in missing if number % world_size() == rank()])

        def complete() -> bool:
            missing[:] = shards.missing(missing)
            return not missing

        wait_until(complete)
        if is_main_process():
            manifests.write(folder, inputs)
        wait_until(lambda: manifests.matches(folder, inputs))
        return shards

    def files(
        self, name: str, inputs: dict[str, Any], names: Sequence[str], build: Callable[[Path], None]
    ) -> Path:
        """Return the folder of a product with named files; `build` writes them if necessary.

        Another process may build the same product concurrently. Both write the same bytes file by
        file, so the result is the same whichever process writes last.

        Raises:
            InputError: If the product's folder is a symbolic link.
        """
        folder = self.path(name, inputs)
        _refuse_link(folder)
        if manifests.matches(folder, inputs):
            written = (manifests.read(folder) or {}).get("facts", {}).get("files", {})
            damaged = [
                folder / file
                for file in names
                if not manifests.is_as_written(folder / file, written.get(file))
            ]
            if not damaged:
                return folder
            log.warning("%s is damaged; the product is built again", damaged[0])
        manifests.remove(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        build(folder)
        written = {file: manifests.content(folder / file) for file in names}
        manifests.write(folder, inputs, {"files": written})
        return folder

    def _log_other_versions(self, path: Path, name: str, inputs: dict[str, Any]) -> None:
        """Log products with other inputs, which are never evicted and may fill the disk."""
        others = _products(self.folder.glob(f"{glob.escape(name)}*{SUFFIX}"))
        if others:
            nearest = min((manifests.differences(other, inputs) for other in others), key=len)
            log.info(
                f"{self.folder} has {', '.join(other.name for other in others)} from other models,"
                " collections, settings or versions (the nearest differs in"
                f" {'; '.join(nearest[:3])}); delete what you no longer need"
            )


class Shards:
    """The arrays of a product, one file each; see the docstring of this module.

    Args:
        inputs: digests and settings that determine the shards.
        count: number of shards.
        compute: computes missing or damaged shards.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], count: int, compute: Compute) -> None:
        self.folder = folder
        self.count = count
        self._inputs = manifests.digest(inputs)
        self._compute = compute
        self._verified: set[int] = set()

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.read, range(self.count))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npy"

    def missing(self, among: Iterable[int] | None = None) -> list[int]:
        """Numbers of absent or incomplete shards; checks only their size and record."""
        numbers = range(self.count) if among is None else among
        return [number for number in numbers if self._record(number) is None]

    def write(self, numbers: list[int]) -> None:
        """Compute and write shards."""
        for number, array in zip(numbers, self._compute(numbers) if numbers else (), strict=True):
            record = {"shard": number, "inputs": self._inputs}
            write_shard(self.path(number), array, record)
            self._verified.add(number)

    def read(self, number: int) -> np.ndarray:
        """Memory-map the array of a shard; a damaged shard is recomputed."""
        path = self.path(number)
        if number not in self._verified:
            record = self._record(number)
            if record is None or manifests.content_digest(path, record["bytes"]) != record["xxh3"]:
                log.warning("%s is damaged; it is computed again", path)
                self.write([number])
            self._verified.add(number)
        array: np.ndarray = np.load(path, mmap_mode="r")
        return array

    def _record(self, number: int) -> dict[str, Any] | None:
        """The record of a shard; None if the file is missing, incomplete, or of another shard."""
        path = self.path(number)
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


class Embeddings:
    """Embeddings on disk in row order; shard i starts at row i * block.

    Iterating yields `(start_row, vectors [n, dim] float16)`, memory-mapped
    (`caravan.retrieval.index.Blocks`).
    """

    def __init__(self, shards: Shards, rows: int, block: int) -> None:
        self.shards = shards
        self.rows = rows
        self.block = block
        self.dim = int(shards.read(0).shape[1])

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.rows, self.block):
            yield start, self.shards.read(start // self.block)

    def read(self) -> np.ndarray:
        """All embeddings [rows, dim] float32; for queries, or a corpus that fits in memory."""
        return np.concatenate(list(self.shards)).astype(np.float32)


def write_shard(path: Path, array: np.ndarray, record: dict[str, Any]) -> None:
    """Write an array and its record atomically."""
    with replacing(path) as scratch:
        with scratch.open("wb") as file:
            np.save(file, array)
        record = {
            **record,
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "bytes": scratch.stat().st_size,
            "xxh3": manifests.content_digest(scratch),
        }
        with scratch.open("ab") as file:
            file.write(json.dumps(record).ljust(RECORD_BYTES).encode())


def _finished(below: Path | None, name: str, inputs: dict[str, Any]) -> Path | None:
    """The finished product of these inputs anywhere below a folder, or None."""
    if below is None or not below.is_dir():
        return None
    found = _products(below.rglob(f"{glob.escape(name)}*{SUFFIX}"))
    matching = (one for one in found if not one.is_symlink() and manifests.matches(one, inputs))
    return next(matching, None)


def _products(manifest_files: Iterable[Path]) -> list[Path]:
    return sorted(path.with_name(path.name.removesuffix(SUFFIX)) for path in manifest_files)


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise InputError(
            "link-in-store",
            f"{folder} is a symbolic link, which Caravan does not follow in a store; remove the"
            " link, or choose another store=",
        )
