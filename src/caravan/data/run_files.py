"""Run files as columns: which layout a file has, and the check of every line.

    query Q0 passage rank score tag         TREC; the score decides, as in trec_eval
    query passage rank                      MS MARCO; whole numbers, 1, 2, 3, ... in each query
    query passage score                     numbers most of which are not whole, or under a header
    query passage rank score                ColBERT's ranking.tsv
    query <tab> passage <tab> text <tab> text   MS MARCO's top1000; no ranking, all scores are 0

A header decides, else the first lines. Three columns of whole numbers that are not ranks in order
may be scores, so they are refused, as is everything ambiguous. Columns are separated by ASCII white
space, so ids may have other white space (U+00A0).

A run of a large collection has millions of lines, so no Python code loops over lines: megabytes are
normalized to one space between columns, counted as arrays of bytes, and parsed by Arrow's CSV
reader, which also finds the distinct ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv

from caravan.data.readers.lines import PASSAGE_IDS, QUERY_IDS, column_name, decoded, line_blocks
from caravan.data.texts import check_id, is_id
from caravan.errors import InputError

LOOK = 1000  # lines that decide the layout
SPACES = bytes.maketrans(b"\t\r\v\f", b"    ")
SIX_COLUMNS = "TREC's six columns (query Q0 passage rank score tag)"


class Ids(NamedTuple):
    """The ids of a column."""

    names: list[str]  # each once
    codes: np.ndarray  # [n] int64, the index of each line's id


class Columns(NamedTuple):
    """The columns of some lines of a run file, one entry a line, in the order of the file."""

    tag: str
    queries: Ids
    passages: Ids
    scores: np.ndarray  # [n] float32; 1 / rank where the file has only ranks, else 0
    lines: np.ndarray  # [n] int64, line numbers from 1


class Layout(NamedTuple):
    """Where the columns of a run file are, from 0."""

    columns: int
    passage: int
    rank: int | None
    score: int | None
    separator: str = " "  # any ASCII white space


TREC = Layout(6, 2, None, 4)  # the rank is not read
RANKS = Layout(3, 1, 2, None)
SCORES = Layout(3, 1, None, 2)
RANKED_SCORES = Layout(4, 1, 2, 3)
TEXTS = Layout(4, 1, None, None, "\t")
HEADERS = {
    ("query", "q0", "passage", "rank", "score", "tag"): TREC,
    ("query", "passage", "rank"): RANKS,
    ("query", "passage", "score"): SCORES,
    ("query", "passage", "rank", "score"): RANKED_SCORES,
    ("query", "passage", "query", "passage"): TEXTS,
}


def column_blocks(path: Path) -> Iterator[Columns]:
    """Read a run file, plain or gzipped, some megabytes at a time.

    Raises:
        InputError: "file-not-found", "empty-file", "not-utf8", "damaged-file", "malformed-line",
            "invalid-id", "invalid-score", "invalid-rank".
    """
    if not path.is_file():
        raise InputError("file-not-found", f"there is no run file {path}; check the path")
    layout, tag = None, ""
    ranked: dict[str, int] = {}  # lines of each query so far, where ranks are checked
    for before, block in line_blocks(path):
        if not b"".join(block).isascii():
            for number, line in enumerate(block, before + 1):
                decoded(path, number, line)  # raises "not-utf8"
        if layout is None:
            first = [at for at, line in enumerate(block) if line.strip()][:LOOK]
            if not first:
                continue
            place = f"{path}:{before + first[0] + 1}"
            layout, has_header = _layout(place, [block[at] for at in first])
            if has_header:
                block[first[0]] = b"\n"
        text, lines, counts = _counted(b"".join(block), layout, before)
        if not len(lines):
            continue
        if (wrong := counts != layout.columns).any():
            i = int(wrong.argmax())
            raise InputError(
                "malformed-line",
                f"{path}:{lines[i]} has {counts[i]} columns where the lines above have"
                f" {layout.columns}; correct or remove the line",
            )
        if not tag:
            tag = text.partition(b"\n")[0].split(b" ")[5].decode() if layout is TREC else "msmarco"
        table = _parsed(text, layout)
        queries, passages = (_ids(path, table[at], lines) for at in (0, layout.passage))
        yield Columns(tag, queries, passages, _scores(path, table, lines, layout, ranked), lines)
    if not tag:
        raise InputError("empty-file", f"{path} is empty; a run needs at least one line")


def _layout(place: str, lines: Sequence[bytes]) -> tuple[Layout, bool]:
    """The layout of a file by its first lines, and whether the first line is a header."""
    tabbed = lines[0].count(b"\t") == 3
    first = lines[0].rstrip(b"\r\n").split(b"\t" if tabbed else None)
    layout = HEADERS.get(tuple(_meaning(cell.decode()) for cell in first))
    if layout is not None:
        return layout, True
    rows = [line.split() for line in lines]
    if len(first) == 6:
        return TREC, False
    if len(first) == 4:
        scored = sum(len(row) == 4 and all(map(_is_number, row[2:])) for row in rows)
        if 2 * scored > len(rows):
            return RANKED_SCORES, False
        if tabbed:
            return TEXTS, False
    if len(first) == 3:
        numbers = [float(row[2]) for row in rows if len(row) == 3 and _is_number(row[2])]
        broken = sum(not number.is_integer() for number in numbers)
        return (SCORES if 2 * broken > len(rows) else RANKS), False
    raise InputError(
        "malformed-line",
        f"{place} has {len(first)} columns; a run has {SIX_COLUMNS} or, as in MS"
        " MARCO, three (query passage rank) or four between tabs (query, passage, and rank and"
        " score or both texts)",
    )


def _meaning(name: str) -> str:
    name = column_name(name)
    if name in QUERY_IDS:
        return "query"
    return "passage" if name in PASSAGE_IDS | {"passage"} else name


def _float(text: bytes | str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _is_number(text: bytes) -> bool:
    return math.isfinite(_float(text))


def _counted(block: bytes, layout: Layout, before: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """The lines that are not blank, with single separators; their numbers and columns, [n] each."""
    if not block.endswith(b"\n"):
        block += b"\n"
    if layout is TEXTS:
        text = re.sub(rb"(?m)^[ \t\v\f]+$", b"", block.replace(b"\r", b" "))
    else:
        text = block.translate(SPACES)
        while b"  " in text:
            text = text.replace(b"  ", b" ")
        text = text.replace(b" \n", b"\n").replace(b"\n ", b"\n").removeprefix(b" ")
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    separators = np.flatnonzero(data == ord(layout.separator))
    counts = np.diff(np.searchsorted(separators, ends), prepend=0) + 1
    full = np.diff(ends, prepend=-1) > 1
    if not full.all():
        text = re.sub(rb"\n+", b"\n", text).lstrip(b"\n")
    return text, np.flatnonzero(full) + before + 1, counts[full]


def _parsed(text: bytes, layout: Layout) -> dict[int, Any]:
    """The columns of ids, as DictionaryArrays [n] of strings; rank and score, as strings [n]."""
    types = {0: pa.dictionary(pa.int32(), pa.string()), layout.rank: pa.string()}
    types |= {layout.passage: types[0], layout.score: pa.string()}
    wanted = [at for at in types if at is not None]
    table = csv.read_csv(
        pa.BufferReader(text),
        csv.ReadOptions(
            use_threads=False,
            block_size=len(text) + 1,  # one set of distinct values
            column_names=[str(at) for at in range(layout.columns)],
        ),
        csv.ParseOptions(delimiter=layout.separator, quote_char=False, double_quote=False),
        csv.ConvertOptions(
            column_types={str(at): types[at] for at in wanted},
            include_columns=[str(at) for at in wanted],
            null_values=[],
            check_utf8=False,  # it was, with line numbers
        ),
    )
    return {at: table[str(at)].combine_chunks() for at in wanted}


def _ids(path: Path, column: Any, lines: np.ndarray) -> Ids:
    names, codes = column.dictionary.to_pylist(), column.indices.to_numpy()
    if "" in names or not is_id("".join(names)):
        bad = next(code for code, name in enumerate(names) if not is_id(name))
        check_id(names[bad], f"{path}:{lines[int((codes == bad).argmax())]}")
    return Ids(names, codes)


def _scores(
    path: Path, table: dict[int, Any], lines: np.ndarray, layout: Layout, ranked: dict[str, int]
) -> np.ndarray:
    """Scores [n] float32; ranks are checked where they are the ranking, or could be scores."""

    def numbers(column: int) -> np.ndarray:
        try:
            return np.asarray(table[column].cast(pa.float64()))
        except pa.ArrowInvalid:  # not a number, or one that only Python reads
            return np.array([*map(_float, table[column].to_pylist())])

    def refuse(wrong: np.ndarray, column: int, kind: str, expected: str) -> None:
        if wrong.any():
            i = int(wrong.argmax())
            problem = f"{path}:{lines[i]} has the {kind} '{table[column][i].as_py()}'"
            raise InputError(f"invalid-{kind}", f"{problem}, {expected}")

    query_codes = table[0].indices.to_numpy()
    scores = np.zeros(len(lines), dtype=np.float32)
    if layout.rank is not None:
        places = _places(table[0], ranked)
        expected = (
            "not 1, 2, 3, ... in the order of the lines of its query: whole numbers in the third of"
            " three columns, and the third of four, are read as ranks; sort the lines by query and"
            f" rank, or write scores as {SIX_COLUMNS}"
        )
        refuse(numbers(layout.rank) != places, layout.rank, "rank", expected)
        scores = (1 / places).astype(np.float32)
    if layout.score is not None:
        with np.errstate(over="ignore"):
            scores = numbers(layout.score).astype(np.float32)
        expected = "not a finite number; correct or remove the line"
        refuse(~np.isfinite(scores), layout.score, "score", expected)
    if layout is RANKED_SCORES:
        order = np.argsort(query_codes, kind="stable")
        rises = (np.diff(query_codes[order]) == 0) & (np.diff(scores[order]) > 0)
        wrong = np.zeros(len(lines), dtype=bool)
        wrong[order[1:][rises]] = True
        expected = (
            "above the score of the rank before: four columns are query, passage, rank, and a"
            " score that is higher for better passages; correct them, or write"
            f" {SIX_COLUMNS}"
        )
        refuse(wrong, 3, "score", expected)
    return scores


def _places(queries: Any, before: dict[str, int]) -> np.ndarray:
    """The place of each line among those of its query, from 1; continues and updates `before`."""
    names, codes = queries.dictionary.to_pylist(), queries.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    places = np.empty(len(codes), dtype=np.int64)
    places[order] = np.arange(len(codes)) - np.searchsorted(codes[order], codes[order])
    places += 1 + np.array([before.get(name, 0) for name in names])[codes]
    for name, count in zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True):
        before[name] = before.get(name, 0) + count
    return places
