"""Texts by row and rows by id: the two files behind a corpus and behind the queries.

`<part>.arrow` holds id, title and text as an Arrow stream, which `datasets` can open too.
`<part>.ids.npy` is uint64 [2, N]: the 64-bit hashes of the ids, ascending, and the row of each. A
lookup is a binary search in the mapped file, confirmed by the stored id.

An id may hold every character that runs and qrels can hold. ASCII white space ends a column for
trec_eval (C's `isspace`), and control characters end a line for some tools (`str.splitlines` breaks
at U+0085, U+2028 and U+001C), so these are refused. Other white space, such as U+00A0 and U+3000,
is part of an id in TREC's formats; Python tools that use `str.split()` fail on it, hence a warning.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import mmap
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from caravan.data.batch_file import BatchFile, Row
from caravan.errors import InputError
from caravan.progress import track

BATCH_ROWS = 16_384
BATCH_BYTES = 64 * 2**20  # closes a record batch of long texts early
MAPPED_BYTES = 64 * 2**20  # about this much of the file stays mapped
AROUND = 64 * 2**10  # bytes that the kernel maps around one that is touched
SHINGLE = 4  # words
NEAR_COPY = 0.7
"""Near-copies have at least this `resemblance`."""

ASCII_SPACE = " \t\n\r\v\f"
REFUSED = "\x00-\x20\x7f-\x9f\u2028\u2029"
"""Character class: ASCII white space, control characters, U+2028 and U+2029."""
_REFUSED = re.compile(f"[{REFUSED}]")
_OTHER_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
COLUMNS = ("id", "title", "text")

Record = tuple[str, str, str]
"""(id, title, text) of a passage; (id, instruction, text) of a query, mostly with ""."""

Rows = Sequence[int] | slice | np.ndarray

log = logging.getLogger(__name__)

Place = Callable[[str, int], str]
"""The place of the n-th record of a part, such as `corpus.jsonl:12`, for error messages."""


class Texts:
    """Texts by row and rows by id, read from memory-mapped files.

    Only the path is pickled. `digest` is that of the records in order.
    """

    def __init__(self, folder: Path, part: str, digest: str = "") -> None:
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
        """(title, text) of each row, in the order of `rows`; any order, repeats allowed."""
        titles, texts = self._columns(rows, ("title", "text"))
        return list(zip(titles, texts, strict=True))

    def ids(self, rows: Rows) -> list[str]:
        """The id of each row."""
        return self._columns(rows, ("id",))[0]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 [len(ids)]; -1 where the id is unknown."""
        wanted = np.array([_id_hash(name.encode(errors="replace")) for name in ids], np.uint64)
        order = np.argsort(wanted, kind="stable")  # neighbours in the file are read together
        first = np.empty(len(ids), np.int64)
        first[order] = np.searchsorted(self.hashes, wanted[order], side="left")
        self._touched += AROUND * len(ids)
        found = np.full(len(ids), -1, np.int64)
        pending = np.arange(len(ids))
        while len(pending):  # a second iteration only where hashes collide
            pending = pending[first[pending] < len(self)]
            pending = pending[self.hashes[first[pending]] == wanted[pending]]
            rows = self.hash_rows[first[pending]].astype(np.int64)
            known = zip(pending, self.ids(rows), strict=True)
            same = np.fromiter((ids[at] == name for at, name in known), bool, len(pending))
            found[pending[same]] = rows[same]
            pending = pending[~same]
            first[pending] += 1
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
            # `pa.array` would import pandas: 30 MiB and half a second
            chosen = pa.Array.from_buffers(pa.int64(), len(local), [None, pa.py_buffer(local)])
            for column, name in zip(columns, names, strict=True):
                texts = batch.column(name)
                found = texts.slice(local[0], high - low) if contiguous else texts.take(chosen)
                column.extend(found.to_pylist())
            places = 1 if contiguous else high - low
            self._touched += (high - low) * self._row_bytes + 2 * AROUND * len(names) * places
            if self._touched > MAPPED_BYTES:
                self._release()
        if order is not None:
            back = np.argsort(order, kind="stable")
            columns = [[column[at] for at in back.tolist()] for column in columns]
        return columns

    def _release(self) -> None:
        """Unmap what was read, or the process would grow to the size of the file."""
        self._touched = 0.0
        for mapped in (self._file, self._index.base):
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


class Written(NamedTuple):
    """What `write_texts` has put on disk."""

    digest: str  # hex, of all fields of all records in order
    spaced: int  # ids with white space other than ASCII's


def write_texts(folder: Path, part: str, records: Iterable[Record], place: Place) -> Written:
    """Stream records into `<part>.arrow` and `<part>.ids.npy`.

    Batches that an interrupted process has left are compared with the records and kept. If it had
    written all batches, the records are not read. A lone surrogate, which UTF-8 cannot encode,
    becomes U+FFFD.

    Held in memory: one record batch and 8 bytes per id; about 56 per id while hashes are sorted.

    Raises:
        InputError: "invalid-id" or "duplicate-id"; "changed-source" if the records differ from the
            batches on disk, and the next build then starts from the first record.
    """
    content, hashes, spaced = hashlib.blake2b(digest_size=16), array("Q"), 0

    def digest(rows: list[Row]) -> None:
        nonlocal spaced
        for fields in rows:
            content.update(b"%d,%d,%d;" % tuple(map(len, fields)))
            content.update(b"".join(fields))
            hashes.append(_id_hash(fields[0]))
            spaced += not fields[0].isascii() and bool(_OTHER_SPACE.search(fields[0].decode()))

    unit = "passages" if part == "corpus" else part
    with BatchFile(folder / f"{part}.arrow", COLUMNS) as file:
        if file.is_whole:
            for rows in track(file.kept(), part, unit=unit, size=len):
                digest(rows)
            log.info("%s: an interrupted build has written all %d %s", part, len(hashes), unit)
            records = ()
        rest = iter(track(records, part, unit=unit))
        if not file.is_whole:
            for rows in file.kept():
                again = list(map(_encoded, itertools.islice(rest, len(rows))))
                if again != rows:
                    file.journal.unlink()
                    _refuse_other(again, rows, len(hashes), part, place)
                digest(rows)
            if hashes:
                count = len(hashes)
                log.info("%s: continuing after %d %s of an interrupted build", part, count, unit)
        batch: list[Row] = []
        size = 0
        for number, record in enumerate(rest, len(hashes)):
            if not is_id(record[0]):
                check_id(record[0], place(part, number))
            batch.append(_encoded(record))
            size += sum(map(len, batch[-1]))
            if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
                file.write(batch)
                digest(batch)
                batch, size = [], 0
        if batch:
            file.write(batch)
            digest(batch)
        file.finish()
    values = np.array(hashes, dtype=np.uint64)
    order = np.argsort(values, kind="stable")
    np.save(folder / f"{part}.ids.npy", np.stack((values[order], order.astype(np.uint64))))
    _refuse_duplicates(Texts(folder, part), place)
    return Written(content.hexdigest(), spaced)


def _refuse_other(again: list[Row], rows: list[Row], first: int, part: str, place: Place) -> None:
    """Refuse a source that does not have the rows of an interrupted build, from row `first` on."""
    pairs = enumerate(zip(again, rows, strict=False))
    at = next((n for n, (now, before) in pairs if now != before), len(again))
    raise InputError(
        "changed-source",
        f"{place(part, first + at)} has changed since an interrupted build read it: run the command"
        " again, which builds the collection from the start",
    )


def _refuse_duplicates(texts: Texts, place: Place) -> None:
    """Equal hashes are neighbours in the index; equal strings among them are duplicates."""
    again = np.flatnonzero(np.diff(texts.hashes) == 0)
    rows = np.unique(texts.hash_rows[np.concatenate([again, again + 1])])
    first: dict[str, int] = {}
    for row, name in zip(rows.tolist(), texts.ids(rows), strict=True):
        if name in first:
            raise InputError(
                "duplicate-id",
                f"{place(texts.part, row)}: the id {name!r} is already used at"
                f" {place(texts.part, first[name])}; make the ids unique",
            )
        first[name] = row


def _id_hash(name: bytes) -> int:
    return xxhash.xxh3_64_intdigest(name)


def _encoded(record: Record) -> Row:
    try:
        return tuple([value.encode() for value in record])
    except UnicodeEncodeError:
        repaired = (value.encode("utf-16-le", "surrogatepass") for value in record)
        return tuple(value.decode("utf-16-le", "replace").encode() for value in repaired)


def is_id(name: str) -> bool:
    """Whether a run file can hold the id.

    >>> is_id("p7"), is_id("p 7"), is_id("p\\x857"), is_id("")
    (True, False, False, False)
    """
    return bool(name) and _REFUSED.search(name) is None


def check_id(name: str, place: str) -> None:
    """Raise "invalid-id" unless `is_id`; `place`, such as `corpus.jsonl:12`, is for the message."""
    if not is_id(name):
        raise InputError(
            "invalid-id",
            f"{place}: the id {name!r} is empty or has white space or a control character, which a"
            " TREC file cannot hold; rename it",
        )


def text_keys(texts: Sequence[tuple[str, str]]) -> np.ndarray:
    """A 64-bit digest of each (title, text), int64 [n]: equal for copies under other ids.

    White space does not count, nor whether the title is the beginning of the text.
    """
    plain = (" ".join(f"{title} {text}".split()) for title, text in texts)
    return _hashes(plain).view(np.int64)


def shingles(words: Sequence[str], numbers: dict[str, int]) -> set[int]:
    """Hashes of all sequences of `SHINGLE` words; of fewer words, one hash.

    The share of common shingles finds near-copies (Broder 1997, "On the resemblance").

    Args:
        numbers: a number for each word, extended here; texts that are compared share it.
    """
    values = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
    hashes = np.zeros(max(len(values) - SHINGLE + 1, 1), dtype=np.uint64)
    for at in range(min(SHINGLE, len(values))):
        hashes = (
            hashes * np.uint64(0x9E3779B97F4A7C15) + values[at : at + len(hashes)] + np.uint64(1)
        )
        hashes ^= hashes >> np.uint64(29)
    return set(hashes.tolist())


def resemblance(a: set[int], b: set[int]) -> float:
    """Jaccard's coefficient of two sets of shingles, neither of them empty.

    >>> numbers = {}
    >>> texts = ("camels store fat in the hump", "camels store fat in one hump")
    >>> one, other = (shingles(text.split(), numbers) for text in texts)
    >>> resemblance(one, one), resemblance(one, other)
    (1.0, 0.2)
    """
    both = len(a & b)
    return both / (len(a) + len(b) - both)


def unique_records(
    records: Iterable[tuple[str, Record]], part: str
) -> Iterator[tuple[str, Record]]:
    """(place, record) of each id once.

    Hashes of the ids and texts are held in memory, 16 bytes an id: a set of ten million strings
    would take a gigabyte.

    Raises:
        InputError: "conflicting-texts", an id has two texts.
    """
    ids, texts = np.empty(0, np.uint64), np.empty(0, np.uint64)  # hashes, by ascending id
    records = iter(records)
    while batch := list(itertools.islice(records, BATCH_ROWS)):
        keys = _hashes(record[0] for _, record in batch)
        contents = _hashes(f"{title}\0{text}" for _, (_, title, text) in batch)
        unique, first, back = np.unique(keys, return_index=True, return_inverse=True)
        at = np.searchsorted(ids, unique)
        known = at < len(ids)
        known[known] = ids[at[known]] == unique[known]
        expected = contents[first]
        expected[known] = texts[at[known]]
        changed, new = contents != expected[back], np.zeros(len(batch), dtype=bool)
        new[first[~known]] = True
        for (place, record), is_new, is_changed in zip(batch, new, changed, strict=True):
            if is_changed:
                raise InputError(
                    "conflicting-texts",
                    f"{place}: the id {record[0]!r} in {part} has another text than where it"
                    " appeared before; correct one of the two, or leave it out",
                )
            if is_new:
                yield place, record
        ids = np.insert(ids, at[~known], unique[~known])
        texts = np.insert(texts, at[~known], expected[~known])


def _hashes(texts: Iterable[str]) -> np.ndarray:
    return np.array([_id_hash(text.encode("utf-8", "surrogatepass")) for text in texts], np.uint64)
