"""Products on disk: computed once, named by a digest of their inputs, verified when read.

    store/passages.3f9c2a41d07b/                 named by the digest of its inputs
    store/passages.3f9c2a41d07b.manifest.json    the inputs; written when the product is complete

A product is reused only if all its inputs are equal: digests of the model folder, the collection
and the candidates, settings, and versions of the libraries that compute it. Evaluations can share a
store: they never overwrite each other's products, and nothing is evicted. A search also reuses the
products of any evaluation. A product that has changed since is computed again when read.

`Shards` stores one array per file, followed by its record where numpy does not read: digest of the
inputs, number, shape, dtype, and digest of the bytes. A shard with a wrong record or size counts as
missing; its bytes are compared with the digest at the first read. Shards are computed one by one,
so an interruption does not change their bytes. With several processes (torchrun, srun) each writes
its share of the shards into the folder, which all of them see (`caravan.retrieval.peers`). With
`engine=ray`, actors do (`caravan.retrieval.cluster`).
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from caravan import manifests
from caravan.distributed import is_main_process, rank, world_size
from caravan.errors import InputError
from caravan.files import replacing
from caravan.retrieval import peers

RECORD_BYTES = 256
"""Size of the record at the end of each shard: JSON, padded with spaces."""
SUFFIX = ".manifest.json"

Compute = Callable[[list[int]], Iterable[np.ndarray]]
"""Takes shard numbers and returns their arrays in the same order."""
Save = Callable[[int, Compute], Iterable[np.ndarray]]
"""Takes the number of shards, saves what they lack, and returns all (`Store.shards`)."""


class Engine(Protocol):
    """Computes shards in other processes, which see the folder."""

    def write(self, shards: Shards, numbers: list[int]) -> None:
        """Return when these shards are in the folder."""


log = logging.getLogger(__name__)


class Store:
    """A folder of products.

    Args:
        folder: where new products are written.
        reuse: finished products in any store below this folder are used as well.
        engine: computes and writes shards elsewhere; None computes them here.
    """

    def __init__(
        self, folder: Path, reuse: Path | None = None, engine: Engine | None = None
    ) -> None:
        self.folder, self.reuse, self.engine = folder, reuse, engine

    def path(self, name: str, inputs: dict[str, Any]) -> Path:
        """The folder of a product, finished or not.

        Args:
            name: kind of the product, such as "passages".
            inputs: everything that determines its content.

        Raises:
            InputError: If it is a symbolic link.
        """
        product = f"{name}.{manifests.digest(inputs)[:12]}"
        path, pattern = self.folder / product, f"{glob.escape(product)}{SUFFIX}"
        if path.is_symlink():
            text = f"{path} is a symbolic link, which is not followed in a store; remove the link"
            raise InputError("link-in-store", f"{text}, or choose another store=")
        if manifests.matches(path, inputs):
            return path
        for manifest in sorted(self.reuse.rglob(pattern)) if self.reuse else ():
            found = manifest.with_name(product)
            if not found.is_symlink() and manifests.matches(found, inputs):
                log.info(f"reusing {found}, from the same model, collection, settings and versions")
                return found
        made = self.folder.glob(f"{glob.escape(name)}.*{SUFFIX}")
        others = [one.with_name(one.name.removesuffix(SUFFIX)) for one in made]
        if others:
            nearest = min((manifests.differences(other, inputs) for other in others), key=len)
            log.info(
                f"{self.folder} has {name} from other models, collections, settings or versions,"
                f" which are kept (the nearest differs in {'; '.join(nearest[:3])})"
            )
        return path

    def shards(self, name: str, inputs: dict[str, Any], count: int, compute: Compute) -> Shards:
        """Open a product of `count` arrays; waits until all processes have written their shards.

        Args:
            compute: computes missing or damaged shards.
        """
        folder = self.path(name, inputs)
        shards = Shards(folder, inputs, count, compute)
        missing, finished = shards.missing(), manifests.matches(folder, inputs)
        folder.mkdir(parents=True, exist_ok=True)
        if missing and self.engine is not None:
            self.engine.write(shards, missing)
        else:
            shards.write([number for number in missing if number % world_size() == rank()])
        peers.barrier(lambda: not shards.missing(), folder)
        if is_main_process() and not finished:
            manifests.write(folder, inputs)
        peers.barrier(lambda: manifests.matches(folder, inputs), folder)
        return shards

    def embeddings(
        self, name: str, inputs: dict[str, Any], rows: int, block: int, compute: Compute
    ) -> Embeddings:
        """Open the embeddings of `rows` texts, `block` per shard; see `shards`."""
        return Embeddings(self.shards(name, inputs, -(-rows // block), compute), rows, block)

    def files(self, name: str, inputs: dict[str, Any], build: Callable[[Path], object]) -> Path:
        """Return the folder of a product of files; `build` writes them into a folder if need be."""
        return manifests.ensure(self.path(name, inputs), inputs, build)


class Shards:
    """The arrays of a product, one file each; see the docstring of this module."""

    def __init__(self, folder: Path, inputs: dict[str, Any], count: int, compute: Compute) -> None:
        self.folder, self.count = folder, count
        self._inputs = manifests.digest(inputs)
        self._compute = compute
        self._verified: set[int] = set()

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.read, range(self.count))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npy"

    def missing(self, numbers: Iterable[int] | None = None) -> list[int]:
        """Which of `numbers` (None: all) are absent or incomplete, by their size and record."""
        numbers = range(self.count) if numbers is None else numbers
        return [number for number in numbers if self._record(number) is None]

    def write(self, numbers: list[int]) -> None:
        """Compute and write shards."""
        for number, array in zip(numbers, self._compute(numbers) if numbers else (), strict=True):
            write_shard(self.path(number), array, {"shard": number, "inputs": self._inputs})
            self._verified.add(number)

    def read(self, number: int) -> np.ndarray:
        """Memory-map the array of a shard; a damaged shard is recomputed."""
        path = self.path(number)
        if number not in self._verified:
            record = self._record(number)
            if record is None or manifests.content_digest(path, record["bytes"]) != record["xxh3"]:
                self.write([number])
                log.warning("%s was damaged; it has been computed again", path)
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
    """Embeddings on disk in row order; shard i starts at row i * block (`index.Blocks`).

    Iterating yields `(start_row, vectors [n, dim] float16)`, memory-mapped.

    Args:
        rows: of all shards.
        span: the rows of a part, from a multiple of `block`; None for all.
    """

    def __init__(self, shards: Shards, rows: int, block: int, span: range | None = None) -> None:
        self.shards, self.block = shards, block
        self.span = range(rows) if span is None else span
        self.rows = len(self.span)
        self.dim = int(shards.read(0).shape[1])

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in self.span[:: self.block]:
            yield start, self.shards.read(start // self.block)

    def get(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings [n, dim] float16 of rows [n], in their order."""
        found = np.empty((len(rows), self.dim), dtype=np.float16)
        numbers, places = np.divmod(rows, self.block)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found[here] = self.shards.read(number)[places[here]]
        return found

    def parts(self, size: int) -> list[Embeddings]:
        """Parts of about `size` rows, whole shards each."""
        step = max(size // self.block, 1) * self.block
        starts = range(0, self.rows, step)
        spans = [range(start, min(start + step, self.rows)) for start in starts]
        return [Embeddings(self.shards, self.rows, self.block, span) for span in spans]

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
