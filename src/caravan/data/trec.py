"""Run files as columns, checked line by line.

`caravan.data.run_layouts` recognizes which layout a file has. Columns are separated by ASCII white
space, so that ids may have other white space (U+00A0).

A run of a large collection has millions of lines, so no Python code loops over lines: megabytes are
checked as arrays of bytes (columns of each line, UTF-8), normalized to one space between columns,
and parsed by Arrow's CSV reader, which also finds the distinct ids. `caravan.data.runs.read_run`
turns the columns into a run.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from caravan.data.ids import REFUSED, check_id
from caravan.data.readers.lines import opened
from caravan.data.run_layouts import LOOK, TEXTS, TREC, Layout, header, recognized
from caravan.errors import InputError

BLOCK_BYTES = 1 << 24  # of text held at once while reading: 16 MB, about 400,000 lines
WHITE = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))  # what divides columns, by byte


class RunColumns(NamedTuple):
    """The columns of a run file, an entry for each line, in the order of the file."""

    tag: str
    query_ids: Any  # pyarrow.DictionaryArray [n] of strings
    passage_ids: Any  # pyarrow.DictionaryArray [n] of strings
    scores: np.ndarray  # [n] float32; 1 / rank where the file has ranks and no scores, else 0
    lines: np.ndarray  # [n] int64, line numbers from 1


class _Block(NamedTuple):
    """Some whole lines of a file, those without any token left out."""

    lines: np.ndarray  # [n] line numbers from 1
    counts: np.ndarray  # [n] columns between white space
    tabs: np.ndarray  # [n]
    separators: np.ndarray  # [tokens] place of the white space after each token
    data: np.ndarray  # uint8


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
    """Read a run file, plain or gzipped.

    Raises:
        InputError: No such file, no line, not UTF-8, a wrong number of columns, a score that is not
            a finite number, or columns of which it is not clear what they are.
    """
    layout, tag = None, ""
    ranked: dict[str, int] = {}  # lines of each query so far, where ranks are checked
    for block in _blocks(path):
        if layout is None:
            lines = _tokens(block, LOOK)
            layout = header(lines[0])
            if layout is not None:
                block = _without_first(block)
            else:
                tabs = block.tabs[0] == TEXTS.columns - 1
                layout = recognized(path, lines, tabs, block.lines)
        if not len(block.lines):
            continue
        tag = tag or (_tokens(block, 1)[0][5] if layout is TREC else "msmarco")
        counts = block.tabs + 1 if layout is TEXTS else block.counts
        if (wrong := counts != layout.columns).any():
            i = int(wrong.argmax())
            raise InputError(
                f"{path}:{block.lines[i]} has {counts[i]} columns where the lines above have "
                f"{layout.columns}; mend or remove the line"
            )
        if layout is TEXTS:
            query_ids, passage_ids, scores = _ids(path, block)
        else:
            query_ids, passage_ids, scores = _parse(path, block, layout, ranked)
        ids = query_ids.combine_chunks(), passage_ids.combine_chunks()
        for column in ids:
            _check_ids(path, column, block.lines)
        yield RunColumns(tag, *ids, scores, block.lines)
    if not tag:
        raise InputError(f"{path} is empty; a run needs at least one line")


def _joined(columns: tuple[Any, ...]) -> Any:
    return pa.chunked_array(list(columns)).unify_dictionaries().combine_chunks()


def _blocks(path: Path) -> Iterator[_Block]:
    """The file, some megabytes at a time. It is vectorized: every line of millions is checked."""
    if not path.is_file():
        raise InputError(f"there is no run file {path}; check the path")
    number, rest = 0, b""
    try:
        with opened(path) as file:
            while chunk := file.read(BLOCK_BYTES) or (rest and b"\n"):  # the last line may lack it
                block = rest + chunk
                cut = block.rfind(b"\n") + 1
                block, rest = block[:cut], block[cut:]
                if not number:
                    block = block.removeprefix(b"\xef\xbb\xbf")
                _require_utf8(block, path, number)
                found = _marked(np.frombuffer(block, dtype=np.uint8), number)
                if len(found.lines):
                    yield found
                number += block.count(b"\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be unpacked as gzip ({error}); make or fetch it again"
        ) from None


def _marked(data: np.ndarray, before: int) -> _Block:
    """Lines and columns of bytes that follow on `before` lines."""
    spaces = WHITE[data]
    separators = np.flatnonzero(spaces[1:] & ~spaces[:-1]) + 1
    ends = np.flatnonzero(data == ord("\n"))
    counts = np.diff(np.searchsorted(separators, ends, side="right"), prepend=0)
    full = np.flatnonzero(counts)
    tabs = np.diff(np.searchsorted(np.flatnonzero(data == ord("\t")), ends), prepend=0)
    return _Block(full + before + 1, counts[full], tabs[full], separators, data)


def _tokens(block: _Block, count: int) -> list[list[str]]:
    """The columns of the first lines: between tabs where there are three, else white space."""
    lines: list[list[str]] = []
    data, start = block.data.tobytes(), 0
    while len(lines) < min(count, len(block.lines)):
        end = data.index(b"\n", start)
        line, start = data[start:end], end + 1
        if tokens := line.split():
            parts = line.rstrip(b"\r").split(b"\t") if line.count(b"\t") == 3 else tokens
            lines.append([part.decode() for part in parts])
    return lines


def _without_first(block: _Block) -> _Block:
    """The block after its first line that is not blank."""
    end = block.separators[block.counts[0] - 1]
    start = int(end + np.argmax(block.data[end:] == ord("\n"))) + 1
    return _marked(block.data[start:], int(block.lines[0]))


def _normal(block: _Block, columns: int) -> np.ndarray:
    """The same tokens with one space between columns and one newline after each line."""
    data, separators = block.data.copy(), block.separators
    keep = ~WHITE[data]
    keep[separators] = True
    data[separators] = ord(" ")
    data[separators[columns - 1 :: columns]] = ord("\n")
    return data[keep]


def _ids(path: Path, block: _Block) -> tuple[Any, Any, np.ndarray]:
    """Query ids, passage ids and zeros of lines whose first two of four columns are the ids."""
    data = block.data
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
            f"{path}:{block.lines[int(wrong.argmax())]} has an id that is empty or has white space;"
            " mend or remove the line"
        )
    keep[end] = True
    data = data.copy()
    data[middle], data[end] = ord(" "), ord("\n")
    query_ids, passage_ids, _ = _parsed(data[keep], Layout(2, 1, None, None))
    return query_ids, passage_ids, np.zeros(len(block.lines), dtype=np.float32)


def _parse(
    path: Path, block: _Block, layout: Layout, ranked: dict[str, int]
) -> tuple[Any, Any, np.ndarray]:
    """Query ids and passage ids (Arrow, dictionary-encoded) and float32 scores [n]."""
    data = _normal(block, layout.columns)
    query_ids, passage_ids, numbers = _parsed(data, layout)

    def refuse(wrong: np.ndarray, column: int, what: str, kind: str) -> None:
        if wrong.any():
            i = int(wrong.argmax())
            text = data.tobytes().split(b"\n")[i].split()[column].decode()
            raise InputError(
                f"{path}:{block.lines[i]} has the {what} '{text}', which is not {kind}"
            )

    if layout.score is not None:
        with np.errstate(over="ignore"):
            scores = numbers.astype(np.float32)
        told = "a finite number; mend or remove the line"
        refuse(~np.isfinite(scores), layout.score, "score", told)
    if layout.rank is None:
        return query_ids, passage_ids, scores
    if layout.score is None:
        expected = _places(query_ids.combine_chunks(), ranked)
        told = (
            "1, 2, 3, ... in the order of the lines of its query: whole numbers in the third of "
            "three columns are read as ranks; sort the lines by query and rank, or write scores as "
            "TREC's six columns (query Q0 passage rank score tag)"
        )
        refuse(numbers != expected, layout.rank, "rank", told)
        return query_ids, passage_ids, (1 / numbers).astype(np.float32)
    ranks = _parsed(data, layout._replace(score=None))[2]
    told = "a whole number, and a run of four columns is query, passage, rank, score; mend the line"
    refuse(~(ranks == np.floor(ranks)), layout.rank, "rank", told)
    if len(ranks) > 1 and set(passage_ids.combine_chunks().dictionary.to_pylist()) <= {"0", "Q0"}:
        raise InputError(
            f"{path} has '0' in the second of four columns, as qrels have (query, 0, passage, "
            "grade): give a run"
        )
    places = _places(query_ids.combine_chunks(), ranked)
    if (numbers == places).all():
        told = (
            "the place of its line although the scores are 1, 2, 3, ...: the columns may be query, "
            "passage, score, rank; write TREC's six columns (query Q0 passage rank score tag)"
        )
        refuse(ranks != places, layout.rank, "rank", told)
    codes = query_ids.combine_chunks().indices.to_numpy()
    order = np.lexsort((ranks, codes))
    further, rise = np.diff(ranks[order]) > 0, np.diff(numbers[order])
    wrong = np.zeros(len(ranks), dtype=bool)
    contradicts = np.where(further, rise > 0, rise != 0)  # of one rank: any other score
    wrong[order[1:][(np.diff(codes[order]) == 0) & contradicts]] = True
    told = (
        "at most the score of the rank before: four columns are query, passage, rank, and a score "
        "that is higher for better passages; correct them, or write TREC's six columns"
    )
    refuse(wrong, layout.score, "score", told)
    return query_ids, passage_ids, scores


def _places(query_ids: Any, before: dict[str, int]) -> np.ndarray:
    """The place of each line among those of its query, from 1; continues and updates `before`."""
    names, codes = query_ids.dictionary.to_pylist(), query_ids.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    places = np.empty(len(codes), dtype=np.int64)
    places[order] = np.arange(len(codes)) - np.searchsorted(codes[order], codes[order])
    places += 1 + np.array([before.get(name, 0) for name in names])[codes]
    for name, count in zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True):
        before[name] = before.get(name, 0) + count
    return places


def _parsed(data: np.ndarray, layout: Layout) -> tuple[Any, Any, np.ndarray]:
    """Query ids, passage ids, and the score (else the rank) as float64, NaN where it is none."""
    number = layout.rank if layout.score is None else layout.score
    ids, value = pa.dictionary(pa.int32(), pa.string()), str(number)

    def parsed(kind: Any) -> Any:
        return csv.read_csv(
            pa.BufferReader(pa.py_buffer(data)),
            csv.ReadOptions(
                use_threads=False,
                block_size=len(data) + 1,  # one chunk: one set of distinct ids
                column_names=[str(i) for i in range(layout.columns)],
            ),
            csv.ParseOptions(delimiter=" ", quote_char=False, double_quote=False),
            csv.ConvertOptions(
                column_types={"0": ids, str(layout.passage): ids, value: kind},
                include_columns=["0", str(layout.passage), *([] if number is None else [value])],
                null_values=[],
                check_utf8=False,  # it was, with line numbers
            ),
        )

    numbers = np.empty(0)
    try:
        table = parsed(pa.float64())
        if number is not None:
            numbers = table[value].to_numpy()
    except pa.ArrowInvalid:  # a number is none, or is written as only Python reads it
        table = parsed(pa.string())
        numbers = np.array([_float(text) for text in table[value].to_pylist()])
    return table["0"], table[str(layout.passage)], numbers


def _check_ids(path: Path, ids: Any, lines: np.ndarray) -> None:
    """Refuse ids with control characters, which a collection cannot have either."""
    refused = pc.match_substring_regex(ids.dictionary, f"[{REFUSED}]")
    if pc.any(refused).as_py():
        bad = int(np.flatnonzero(refused.to_numpy(zero_copy_only=False))[0])
        line = lines[int(np.argmax(ids.indices.to_numpy() == bad))]
        check_id(ids.dictionary[bad].as_py(), f"{path}:{line}")


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
