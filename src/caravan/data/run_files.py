"""Run files as columns: TREC's six or MS MARCO's three, and the check of every line.

    query Q0 passage rank score tag         TREC; the score decides, as in trec_eval
    query passage rank                      MS MARCO; ranks 1, 2, 3, ... in each query, in order

The number of columns decides. If the third of three is not the rank, in order, it may be a score,
so the file is refused. Columns are separated by ASCII white space; ids may have other white space
(U+00A0).

A run of a large collection has millions of lines, so no Python code loops over lines: megabytes are
normalized to one space between columns, their columns counted with NumPy, and parsed by Arrow's CSV
reader, which also finds the distinct ids.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv

from caravan.data.readers.lines import PASSAGE_IDS, QUERY_IDS, column_name, decoded, line_blocks
from caravan.data.texts import check_id, is_id
from caravan.errors import InputError

SPACES = bytes.maketrans(b"\t\r\v\f", b"    ")


class Ids(NamedTuple):
    """The ids of a column."""

    names: list[str]  # each once
    codes: np.ndarray  # [n] int64, the index of each line's id


class Columns(NamedTuple):
    """The columns of some lines of a run file, one entry a line, in the order of the file."""

    tag: str
    queries: Ids
    passages: Ids
    scores: np.ndarray  # [n] float32; 1 / rank where the file has only ranks
    lines: np.ndarray  # [n] int64, line numbers from 1


class Layout(NamedTuple):
    """The columns of a run file."""

    header: tuple[str, ...]  # what a line of their names means
    passage: int  # columns, from 0
    value: int  # the score or the rank


TREC = Layout(("query", "q0", "passage", "rank", "score", "tag"), 2, 4)  # the rank is not read
MS_MARCO = Layout(("query", "passage", "rank"), 1, 2)
LAYOUTS = {len(layout.header): layout for layout in (TREC, MS_MARCO)}


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
            first = next((at for at, line in enumerate(block) if line.strip()), None)
            if first is None:
                continue
            layout, is_header = _layout(path, before + first + 1, block[first].split())
            if is_header:
                block[first] = b"\n"
        text, lines, counts = _counted(b"".join(block), before)
        if not len(lines):
            continue
        if (wrong := counts != len(layout.header)).any():
            i = int(wrong.argmax())
            raise InputError(
                "malformed-line",
                f"{path}:{lines[i]} has {counts[i]} columns where the lines above have"
                f" {len(layout.header)}; correct or remove the line",
            )
        if not tag:
            tag = text.partition(b"\n")[0].split(b" ")[5].decode() if layout is TREC else "msmarco"
        table = _parsed(text, layout)
        queries, passages = (_ids(path, table[at], lines) for at in (0, layout.passage))
        yield Columns(tag, queries, passages, _scores(path, table, lines, layout, ranked), lines)
    if not tag:
        raise InputError("empty-file", f"{path} is empty; a run needs at least one line")


def _layout(path: Path, number: int, cells: list[bytes]) -> tuple[Layout, bool]:
    """The layout of a file by the cells of its first line, and whether that is a header."""
    layout = LAYOUTS.get(len(cells))
    if layout is None:
        raise InputError(
            "malformed-line",
            f"{path}:{number} has {len(cells)} columns; a run has TREC's six (query Q0 passage rank"
            " score tag) or MS MARCO's three (query passage rank); if the fourth column is a score,"
            f" make a TREC file: {_awk(path, 4)} (with 0 for $4 if there is no score)",
        )
    return layout, tuple(_meaning(cell.decode()) for cell in cells) == layout.header


def _awk(path: Path, column: int) -> str:
    """An awk command that converts a file with its score in this column (from 1) to TREC."""
    program = f"""awk '{{print $1, "Q0", $2, 0, ${column}, "run"}}'"""
    given, target = shlex.quote(str(path)), shlex.quote(f"{path}.trec")
    read = f"gzip -dc {given} | {program}" if path.suffix == ".gz" else f"{program} {given}"
    return f"{read} > {target}"


def _meaning(name: str) -> str:
    name = column_name(name)
    if name in QUERY_IDS:
        return "query"
    return "passage" if name in PASSAGE_IDS | {"passage"} else name


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _counted(block: bytes, before: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """The lines that are not blank, with single spaces; their numbers and columns, [n] each."""
    if not block.endswith(b"\n"):
        block += b"\n"
    text = block.translate(SPACES)
    while b"  " in text:
        text = text.replace(b"  ", b" ")
    text = text.replace(b" \n", b"\n").replace(b"\n ", b"\n").removeprefix(b" ")
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    separators = np.flatnonzero(data == ord(" "))
    counts = np.diff(np.searchsorted(separators, ends), prepend=0) + 1
    full = np.diff(ends, prepend=-1) > 1
    if not full.all():
        text = re.sub(rb"\n+", b"\n", text).lstrip(b"\n")
    return text, np.flatnonzero(full) + before + 1, counts[full]


def _parsed(text: bytes, layout: Layout) -> dict[int, Any]:
    """The columns of ids, as DictionaryArrays [n] of strings; rank or score, as strings [n]."""
    names = pa.dictionary(pa.int32(), pa.string())
    types = {0: names, layout.passage: names, layout.value: pa.string()}
    table = csv.read_csv(
        pa.BufferReader(text),
        csv.ReadOptions(
            use_threads=False,
            block_size=len(text) + 1,  # one set of distinct values
            column_names=[str(at) for at in range(len(layout.header))],
        ),
        csv.ParseOptions(delimiter=" ", quote_char=False, double_quote=False),
        csv.ConvertOptions(
            column_types={str(at): type_ for at, type_ in types.items()},
            include_columns=[str(at) for at in types],
            null_values=[],
            check_utf8=False,  # it was, with line numbers
        ),
    )
    return {at: table[str(at)].combine_chunks() for at in types}


def _ids(path: Path, column: Any, lines: np.ndarray) -> Ids:
    names, codes = column.dictionary.to_pylist(), column.indices.to_numpy()
    if "" in names or not is_id("".join(names)):
        bad = next(code for code, name in enumerate(names) if not is_id(name))
        check_id(names[bad], f"{path}:{lines[int((codes == bad).argmax())]}")
    return Ids(names, codes)


def _scores(
    path: Path, table: dict[int, Any], lines: np.ndarray, layout: Layout, ranked: dict[str, int]
) -> np.ndarray:
    """Scores [n] float32, all finite; or 1 / rank, if the ranks are 1, 2, 3, ... in each query."""
    column = table[layout.value]
    try:
        values = np.asarray(column.cast(pa.float64()))
    except pa.ArrowInvalid:  # not a number, or one that only Python reads
        values = np.array([*map(_float, column.to_pylist())])
    if layout is TREC:
        with np.errstate(over="ignore"):
            scores = values.astype(np.float32)
        wrong, kind = ~np.isfinite(scores), "score"
        expected = "not a finite number; correct or remove the line"
    else:
        places = _places(table[0], ranked)
        scores = (1 / places).astype(np.float32)
        wrong, kind = values != places, "rank"
        expected = (
            "not 1, 2, 3, ... in the order of the lines of its query; sort the lines by query and"
            f" rank, or, if the third column is a score, make a TREC file: {_awk(path, 3)}"
        )
    if wrong.any():
        i = int(wrong.argmax())
        problem = f"{path}:{lines[i]} has the {kind} '{column[i].as_py()}'"
        raise InputError(f"invalid-{kind}", f"{problem}, {expected}")
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
