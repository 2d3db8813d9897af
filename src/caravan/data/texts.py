"""Texts by row and rows by id: the two files behind a corpus and behind the queries.

`<part>.arrow` holds id, title and text, an Arrow stream that `datasets` writes and can open too.
`<part>.ids.npy` is uint64 [2, N]: the 64-bit hashes of the ids, ascending, and the row of each. A
look-up is a binary search in the mapped file, confirmed by the stored id. Opening reads no text,
and a thousand rows take about a millisecond, for ten thousand passages as for millions.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from caravan.data.ids import check_id, has_other_space, is_id
from caravan.errors import InputError
from caravan.files import reserve
from caravan.progress import track

BATCH_ROWS = 16_384
MAPPED_BYTES = 64 * 2**20  # about so much of the file is mapped at a time
AROUND = 64 * 2**10  # what the kernel maps around a byte that is touched
INDEX_ROWS = 1 << 20  # written at a time
BATCH_BYTES = 64 * 2**20  # long texts: a record batch is closed early, whatever its rows

Record = tuple[str, str, str]
"""(id, title, text) of a passage; a query has an empty title."""

Rows = Sequence[int] | slice | np.ndarray

Place = Callable[[str, int], str]
"""Names the place of the n-th record of a part, such as `corpus.jsonl:12`, for messages."""


class Texts:
    """Texts by row and rows by id, both read from memory-mapped files.

    Cheap to open, to fork and to pickle (only the path travels). `digest` is that of the records
    in their order, so that what was computed from a corpus can be tied to it.
    """

    def __init__(self, folder: Path, part: str, digest: str = "") -> None:
        import pyarrow as pa

        self.folder, self.part, self.digest = Path(folder), part, digest
        with open(self.folder / f"{part}.arrow", "rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._batches = list(pa.ipc.open_stream(pa.py_buffer(self._file)))
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._index = np.load(self.folder / f"{part}.ids.npy", mmap_mode="r")
        self.hashes, self.hash_rows = self._index[0], self._index[1]
        self._row_bytes = len(self._file) / max(1, len(self))
        self._touched = 0.0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[Texts], tuple[Path, str, str]]:
        return Texts, (self.folder, self.part, self.digest)

    def get(self, rows: Rows) -> list[tuple[str, str]]:
        """(title, text) of each row, in the order asked for; any order, repeats allowed."""
        titles, texts = self._columns(rows, ("title", "text"))
        return list(zip(titles, texts, strict=True))

    def ids(self, rows: Rows) -> list[str]:
        """The id of each row."""
        return self._columns(rows, ("id",))[0]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 [len(ids)]; -1 where the id is unknown.

        A hash finds the row, the stored string confirms it: two ids with one hash stay apart.
        """
        wanted = np.fromiter(
            (id_hash(i.encode(errors="replace")) for i in ids), dtype=np.uint64, count=len(ids)
        )
        order = np.argsort(wanted, kind="stable")  # neighbours in the file are read together
        first = np.empty(len(ids), np.int64)
        first[order] = np.searchsorted(self.hashes, wanted[order], side="left")
        self._touched += AROUND * len(ids)
        found = np.full(len(ids), -1, np.int64)
        open_ = np.arange(len(ids))
        while len(open_):  # a second turn is needed only where hashes collide
            open_ = open_[first[open_] < len(self)]
            open_ = open_[self.hashes[first[open_]] == wanted[open_]]
            rows = self.hash_rows[first[open_]].astype(np.int64)
            same = np.fromiter(
                (ids[at] == known for at, known in zip(open_, self.ids(rows), strict=True)),
                dtype=bool,
                count=len(open_),
            )
            found[open_[same]] = rows[same]
            open_ = open_[~same]
            first[open_] += 1
        return found

    def _columns(self, rows: Rows, names: Sequence[str]) -> list[list[str]]:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows, dtype=np.int64)
        columns: list[list[str]] = [[] for _ in names]
        if not len(rows):
            return columns
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"row {rows.min()} or {rows.max()} is not in 0..{len(self) - 1}")
        order = None
        if np.any(rows[1:] < rows[:-1]):
            order = np.argsort(rows, kind="stable")
            rows = rows[order]
        batch_of = np.searchsorted(self._starts, rows, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(batch_of)) + 1).tolist(), len(rows)]
        for low, high in itertools.pairwise(edges):
            batch = self._batches[batch_of[low]]
            local = rows[low:high] - self._starts[batch_of[low]]
            contiguous = np.all(np.diff(local) == 1)
            chosen = _arrow(local)
            for column, name in zip(columns, names, strict=True):
                texts = batch.column(name)
                part = texts.slice(local[0], high - low) if contiguous else texts.take(chosen)
                column.extend(part.to_pylist())
            size, places = (high - low) * self._row_bytes, 1 if contiguous else high - low
            self._touched += size + 2 * AROUND * len(names) * places
            if self._touched > MAPPED_BYTES:
                self._release()
        if order is not None:
            back = np.empty_like(order)
            back[order] = np.arange(len(order))
            columns = [[column[at] for at in back.tolist()] for column in columns]
        return columns

    def _release(self) -> None:
        """Unmap what was read; it stays in the system's page cache, and is mapped when read again.

        Without this the process would grow to the size of the file, soon when rows are random.
        """
        self._touched = 0.0
        for mapped in (self._file, self._index.base):
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


def _arrow(rows: np.ndarray) -> Any:
    """int64 numpy to Arrow; `pa.array` would import pandas for it, 30 MiB and half a second."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)])


@dataclass(frozen=True)
class Written:
    """What `write_texts` has put on disk."""

    digest: str  # hex, of all fields of all records in order
    count: int
    repaired: int  # records in which half a surrogate pair, not UTF-8, became U+FFFD
    spaced: int  # ids with white space other than ASCII's


def write_texts(folder: Path, part: str, records: Iterable[Record], place: Place) -> Written:
    """Stream records into `<part>.arrow` and `<part>.ids.npy`.

    Held in memory: one record batch and the hashes of the ids (8 bytes each).

    Raises:
        InputError: an id is none (see `caravan.data.ids`), or was used before.
    """
    import pyarrow as pa
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    schema = pa.schema([(column, pa.large_string()) for column in ("id", "title", "text")])
    features = Features({column: Value("large_string") for column in schema.names})
    content, hashes = hashlib.blake2b(digest_size=16), array("Q")
    batch: list[list[bytes]] = []
    size = repaired = spaced = 0
    with ArrowWriter(features=features, path=str(folder / f"{part}.arrow")) as writer:

        def flush() -> None:
            columns = zip(*batch, strict=True) if batch else [()] * 3
            arrays = [pa.array(column, pa.large_string()) for column in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), BATCH_ROWS)
            batch.clear()

        for record in track(records, part, unit="passages" if part == "corpus" else part):
            name = record[0]
            if not is_id(name):
                check_id(name, place(part, len(hashes)))
            spaced += has_other_space(name)
            try:
                fields = [value.encode() for value in record]
            except UnicodeEncodeError:
                fields = [_repaired(value) for value in record]
                repaired += 1
            content.update(b"%d,%d,%d;" % tuple(len(value) for value in fields))
            content.update(b"".join(fields))
            hashes.append(id_hash(fields[0]))
            batch.append(fields)
            size += sum(len(value) for value in fields)
            if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
                flush()
                size = 0
        if batch or not hashes:
            flush()
        writer.finalize()
    _write_index(folder / f"{part}.ids.npy", hashes)
    _refuse_duplicates(Texts(folder, part), place)
    return Written(content.hexdigest(), len(hashes), repaired, spaced)


def _write_index(path: Path, hashes: array[int]) -> None:
    """The hashes in ascending order and the row of each, written through a mapped file."""
    values = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.empty(0, np.uint64)
    order = np.argsort(values, kind="stable")
    index = np.lib.format.open_memmap(path, "w+", np.dtype(np.uint64), (2, len(values)))
    reserve(path)
    for start in range(0, len(order), INDEX_ROWS):
        span = slice(start, start + INDEX_ROWS)
        index[0, span], index[1, span] = values[order[span]], order[span]
    index.flush()


def id_hash(name: bytes) -> int:
    """The 64-bit hash under which an id (UTF-8) is indexed."""
    return xxhash.xxh3_64_intdigest(name)


def text_keys(texts: Sequence[tuple[str, str]]) -> np.ndarray:
    """A 64-bit digest of each (title, text), int64 [n]: equal for copies under other ids.

    White space does not count, nor whether the title is the beginning of the text.
    """
    digests = (
        xxhash.xxh3_64_intdigest(" ".join(f"{title} {text}".split()).encode())
        for title, text in texts
    )
    return np.fromiter(digests, dtype=np.uint64, count=len(texts)).view(np.int64)


def _refuse_duplicates(texts: Texts, place: Place) -> None:
    """Equal hashes are neighbours in the index; equal strings among them are duplicates."""
    again = np.flatnonzero(np.diff(texts.hashes) == 0)
    rows = np.unique(texts.hash_rows[np.concatenate([again, again + 1])])
    seen: dict[str, int] = {}
    for row, name in zip(rows.tolist(), texts.ids(rows), strict=True):
        if name in seen:
            raise InputError(
                f"{place(texts.part, row)}: the id {name!r} was used before, at "
                f"{place(texts.part, seen[name])}: make the ids unique"
            )
        seen[name] = row


def _repaired(value: str) -> bytes:
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
