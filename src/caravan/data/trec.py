"""The text of a run file as columns: TREC's six, MS MARCO's three or four, checked line by line.

MS MARCO's top1000 files have four columns between tabs: query id, passage id, and both texts. They
are no ranking: the candidates of a query stand in any order, so all have one score.

A run of a large collection has millions of lines, so nothing here walks over lines in Python:
megabytes are checked as arrays of bytes (columns of each line, UTF-8), brought to one space
between columns, and parsed by Arrow's CSV reader, which also finds the distinct ids. Every
complaint names file and line. `caravan.data.runs.read_run` is what turns the columns into a run.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv

from caravan.errors import InputError

BLOCK_BYTES = 1 << 24  # of text held at once while reading: 16 MB, about 400,000 lines
TOP1000 = 4  # columns between tabs
WHITE = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))  # what divides columns, by byte


class RunColumns(NamedTuple):
    """What a run file says, a line each, in the order of the file."""

    tag: str
    query_ids: Any  # pyarrow.DictionaryArray [n] of strings
    passage_ids: Any  # pyarrow.DictionaryArray [n] of strings
    scores: np.ndarray  # [n] float32; 1 / rank where the file has ranks and no scores, else 0
    lines: np.ndarray  # [n] int64, line numbers from 1


def read_columns(path: Path) -> RunColumns:
    """Read a run file whole; see `column_blocks`."""
    tags, query_ids, passage_ids, scores, lines = zip(*column_blocks(path), strict=True)
    return RunColumns(
        tags[0],
        _joined(query_ids),
        _joined(passage_ids),
        np.concatenate(scores),
        np.concatenate(lines),
    )


def column_blocks(path: Path) -> Iterator[RunColumns]:
    """Read a run file, plain or .gz; the first line decides between the formats.

    Raises:
        InputError: No such file, no line, not gzip, not UTF-8, a wrong number of columns, or a
            score that is not a finite number.
    """
    tag, columns = "", 0
    for lines, counts, tabs, separators, data in _blocks(path):
        if not columns:
            columns = int(counts[0])
            if tabs[0] == TOP1000 - 1:
                columns = TOP1000
            elif columns not in (3, 6):
                raise InputError(
                    f"{path}:{lines[0]} has {columns} columns; a run has six "
                    "(query Q0 passage rank score tag) or, as MS MARCO writes it, three "
                    "(query passage rank) or four between tabs (query, passage, and their texts)"
                )
            first = data[: separators[columns - 1]].tobytes().split()
            tag = first[5].decode() if columns == 6 else "msmarco"
        counts = tabs + 1 if columns == TOP1000 else counts
        if (wrong := counts != columns).any():
            i = int(wrong.argmax())
            raise InputError(
                f"{path}:{lines[i]} has {counts[i]} columns where the lines above have {columns}; "
                "mend or remove the line"
            )
        if columns == TOP1000:
            query_ids, passage_ids, scores = _ids(data, path, lines)
        else:
            query_ids, passage_ids, scores = _parse(
                _normal(data, separators, columns), columns, path, lines
            )
        yield RunColumns(
            tag, query_ids.combine_chunks(), passage_ids.combine_chunks(), scores, lines
        )
    if not columns:
        raise InputError(f"{path} is empty; a run needs at least one line")


def _joined(columns: tuple[Any, ...]) -> Any:
    return pa.chunked_array(list(columns)).unify_dictionaries().combine_chunks()


def _blocks(path: Path) -> Iterator[tuple[np.ndarray, ...]]:
    """Whole lines, some megabytes at a time; lines without any token are passed over.

    Yields line numbers [n], columns and tabs of each [n], the place of the white space after each
    token [tokens] and the bytes. All of it is vectorised: every line of millions is checked.
    """
    if not path.is_file():
        raise InputError(f"there is no run file {path}; check the path")
    number, rest = 0, b""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            while chunk := file.read(BLOCK_BYTES) or (rest and b"\n"):  # the last line may lack it
                block = rest + chunk
                cut = block.rfind(b"\n") + 1
                block, rest = block[:cut], block[cut:]
                if not number:
                    block = block.removeprefix(b"\xef\xbb\xbf")
                _require_utf8(block, path, number)
                data = np.frombuffer(block, dtype=np.uint8)
                spaces = WHITE[data]
                separators = np.flatnonzero(spaces[1:] & ~spaces[:-1]) + 1
                ends = np.flatnonzero(data == ord("\n"))
                counts = np.diff(np.searchsorted(separators, ends, side="right"), prepend=0)
                full = np.flatnonzero(counts)
                if len(full):
                    found = np.flatnonzero(data == ord("\t"))
                    tabs = np.diff(np.searchsorted(found, ends), prepend=0)
                    yield full + number + 1, counts[full], tabs[full], separators, data
                number += len(ends)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be unpacked as gzip ({error}); make or fetch it again"
        ) from None


def _normal(data: np.ndarray, separators: np.ndarray, columns: int) -> np.ndarray:
    """The same tokens with one space between columns and one newline after each line."""
    keep = ~WHITE[data]
    keep[separators] = True
    data = data.copy()
    data[separators] = ord(" ")
    data[separators[columns - 1 :: columns]] = ord("\n")
    return data[keep]


def _ids(data: np.ndarray, path: Path, lines: np.ndarray) -> tuple[Any, Any, np.ndarray]:
    """Query ids, passage ids and zeros of lines whose first two of four columns are the ids."""
    spaces = WHITE[data]
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.concatenate(([0], ends[:-1] + 1))
    tokens = np.diff(np.searchsorted(np.flatnonzero(~spaces), np.append(starts, len(data))))
    starts = starts[tokens > 0]
    tabs = np.flatnonzero(data == ord("\t"))
    at = np.searchsorted(tabs, starts)
    middle, end = tabs[at], tabs[at + 1]
    kept = np.zeros(len(data) + 1, dtype=np.int8)
    kept[starts], kept[end] = 1, -1
    keep = np.cumsum(kept[:-1], dtype=np.int8) > 0
    inside = keep & spaces
    inside[middle] = False
    wrong = (middle == starts) | (end == middle + 1) | np.add.reduceat(inside, starts)
    if wrong.any():
        raise InputError(
            f"{path}:{lines[int(wrong.argmax())]} has an id that is empty or has white space; mend "
            "or remove the line"
        )
    keep[end] = True
    data = data.copy()
    data[middle], data[end] = ord(" "), ord("\n")
    return _parse(data[keep], 2, path, lines)


def _parse(
    data: np.ndarray, columns: int, path: Path, lines: np.ndarray
) -> tuple[Any, Any, np.ndarray]:
    """Query ids and passage ids (Arrow, dictionary-encoded) and float32 scores [n], 0 if none."""
    ids, value = pa.dictionary(pa.int32(), pa.string()), "4" if columns == 6 else "2"
    wanted = ("0", "2", value) if columns == 6 else ("0", "1", value)[:columns]

    def parsed(kind: Any) -> Any:
        return csv.read_csv(
            pa.BufferReader(pa.py_buffer(data)),
            csv.ReadOptions(
                use_threads=False,
                block_size=len(data) + 1,  # one chunk: one set of distinct ids
                column_names=[str(i) for i in range(columns)],
            ),
            csv.ParseOptions(delimiter=" ", quote_char=False, double_quote=False),
            csv.ConvertOptions(
                column_types={wanted[0]: ids, wanted[1]: ids, value: kind},
                include_columns=list(wanted),
                null_values=[],
                check_utf8=False,  # it was, with line numbers
            ),
        )

    if columns == 2:
        table = parsed(pa.float64())
        return table["0"], table["1"], np.zeros(len(lines), dtype=np.float32)
    try:
        table = parsed(pa.float64())
        numbers = table[value].to_numpy()
    except pa.ArrowInvalid:  # some score is not a number, or is written as only Python reads it
        table = parsed(pa.string())
        numbers = np.array([_float(text) for text in table[value].to_pylist()])
    if columns == 3:
        natural = (numbers >= 1) & (numbers == np.floor(numbers))
        numbers = 1 / np.where(natural, numbers, np.nan)
    with np.errstate(over="ignore"):
        scores = numbers.astype(np.float32)
    finite = np.isfinite(scores)
    if not finite.all():
        i = int(finite.argmin())
        text = parsed(pa.string())[value][i].as_py()
        what, kind = ("score", "a finite number") if columns == 6 else ("rank", "1, 2, 3, ...")
        raise InputError(
            f"{path}:{lines[i]} has the {what} '{text}', which is not {kind}; "
            "mend or remove the line"
        )
    return table[wanted[0]], table[wanted[1]], scores


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _require_utf8(block: bytes, path: Path, lines_before: int) -> None:
    try:
        block.decode()
    except UnicodeDecodeError as error:
        line = lines_before + block.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line} is not UTF-8; save the file as UTF-8") from None
