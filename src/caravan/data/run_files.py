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

import gzip
import logging
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from caravan.data.readers.lines import PASSAGE_IDS, QUERY_IDS, column_name, opened
from caravan.data.texts import REFUSED, check_id
from caravan.errors import InputError

BLOCK_BYTES = 1 << 24  # of text in memory at once: about 400,000 lines
LOOK = 1000  # lines that decide the layout
SPACES = bytes.maketrans(b"\t\r\v\f", b"    ")
SIX_COLUMNS = "TREC's six columns (query Q0 passage rank score tag)"

log = logging.getLogger(__name__)


class Columns(NamedTuple):
    """The columns of a run file, one entry a line, in the order of the file."""

    tag: str
    query_ids: Any  # pyarrow.DictionaryArray [n] of strings
    passage_ids: Any  # pyarrow.DictionaryArray [n] of strings
    scores: np.ndarray  # [n] float32; 1 / rank where the file has only ranks, else 0
    lines: np.ndarray  # [n] int64, line numbers from 1


class Layout(NamedTuple):
    """Where the columns of a run file are, from 0."""

    columns: int
    passage: int
    rank: int | None
    score: int | None
    separator: str = " "


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
            "invalid-id", "invalid-score", "invalid-rank", "ambiguous-layout", "qrels-not-run".
    """
    layout, tag = None, ""
    ranked: dict[str, int] = {}  # lines of each query so far, where ranks are checked
    for before, block in _blocks(path):
        if layout is None:
            first = _first_lines(block, before)
            if not first:
                continue
            layout = HEADERS.get(tuple(map(_meaning, first[0][1])))
            if layout is None:
                layout = _recognized(path, first, block.lstrip().partition(b"\n")[0])
            else:
                block = _without_header(block)
        text, lines, counts = _counted(block, layout, before)
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
        queries, passages, numbers = _parsed(text, layout)
        for column in (queries, passages):
            _check_ids(path, column, lines)
        scores = _scores(path, text, lines, layout, (queries, passages), numbers, ranked)
        yield Columns(tag, queries, passages, scores, lines)
    if not tag:
        raise InputError("empty-file", f"{path} is empty; a run needs at least one line")


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(lines before, whole lines) of the file, some megabytes at a time."""
    if not path.is_file():
        raise InputError("file-not-found", f"there is no run file {path}; check the path")
    before, rest = 0, b""
    try:
        with opened(path) as file:
            while read := file.read(BLOCK_BYTES) or (rest and b"\n"):  # the last line may lack it
                block = rest + read
                cut = block.rfind(b"\n") + 1
                block, rest = block[:cut], block[cut:]
                if not before:
                    block = block.removeprefix(b"\xef\xbb\xbf")
                try:
                    block.decode()
                except UnicodeDecodeError as error:
                    line = before + block.count(b"\n", 0, error.start) + 1
                    raise InputError(
                        "not-utf8", f"{path}:{line} is not UTF-8; save the file as UTF-8"
                    ) from None
                yield before, block
                before += block.count(b"\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            "damaged-file", f"{path} cannot be unpacked as gzip ({error}); make or fetch it again"
        ) from None


def _first_lines(block: bytes, before: int) -> list[tuple[int, list[str]]]:
    """(number, columns) of the first lines: between tabs if there are three, else white space."""
    found = []
    for number, line in enumerate(block.split(b"\n"), before + 1):
        if tokens := line.split():
            columns = line.rstrip(b"\r").split(b"\t") if line.count(b"\t") == 3 else tokens
            found.append((number, [column.decode() for column in columns]))
            if len(found) == LOOK:
                break
    return found


def _without_header(block: bytes) -> bytes:
    """The block with its first line that is not blank left empty, so that line numbers stay."""
    end = block.index(b"\n", len(block) - len(block.lstrip()))
    return b"\n" * block.count(b"\n", 0, end) + block[end:]


def _meaning(name: str) -> str:
    name = column_name(name)
    if name in QUERY_IDS:
        return "query"
    return "passage" if name in PASSAGE_IDS | {"passage"} else name


def _recognized(path: Path, lines: list[tuple[int, list[str]]], first: bytes) -> Layout:
    """The layout of a file without a header."""
    rows = [columns for _, columns in lines]
    columns = len(rows[0])
    if columns == 6:
        return TREC
    if columns == 4:
        scored = sum(len(row) == 4 and all(map(_is_number, row[2:])) for row in rows)
        if 2 * scored > len(rows):
            return RANKED_SCORES
        if first.count(b"\t") == 3:
            return TEXTS
    if columns == 3:
        numbers = [(n, row[2]) for n, row in lines if len(row) == 3 and _is_number(row[2])]
        broken = [(n, value) for n, value in numbers if not float(value).is_integer()]
        if not broken:
            return RANKS
        if 2 * len(broken) > len(lines):
            log.info("%s: three columns, read as query, passage and score", path.name)
            return SCORES
        raise InputError(
            "invalid-rank",
            f"{path}:{broken[0][0]} has the rank '{broken[0][1]}', which is not 1, 2, 3, ..., while"
            " most lines have whole numbers in the third column; correct the line, or write scores"
            f" as {SIX_COLUMNS}",
        )
    raise InputError(
        "malformed-line",
        f"{path}:{lines[0][0]} has {columns} columns; a run has {SIX_COLUMNS} or, as in MS MARCO,"
        " three (query passage rank) or four between tabs (query, passage, and rank and score or"
        " both texts)",
    )


def _is_number(text: str) -> bool:
    return math.isfinite(_float(text))


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _counted(block: bytes, layout: Layout, before: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """The lines that are not blank, with single separators; their numbers and columns, [n] each."""
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


def _parsed(text: bytes, layout: Layout) -> tuple[Any, Any, dict[int, np.ndarray]]:
    """Query ids, passage ids, and the numbers of rank and score by column, NaN where it is none."""
    ids = pa.dictionary(pa.int32(), pa.string())
    numbers = [column for column in (layout.rank, layout.score) if column is not None]
    wanted = [0, layout.passage, *numbers]

    def parsed(kind: Any) -> Any:
        return csv.read_csv(
            pa.BufferReader(text),
            csv.ReadOptions(
                use_threads=False,
                block_size=len(text) + 1,  # one set of distinct ids
                column_names=[str(i) for i in range(layout.columns)],
            ),
            csv.ParseOptions(delimiter=layout.separator, quote_char=False, double_quote=False),
            csv.ConvertOptions(
                column_types={str(i): ids if i in wanted[:2] else kind for i in wanted},
                include_columns=[str(i) for i in wanted],
                null_values=[],
                check_utf8=False,  # it was, with line numbers
            ),
        )

    try:
        table = parsed(pa.float64())
        values = {i: table[str(i)].to_numpy() for i in numbers}
    except pa.ArrowInvalid:  # not a number, or one that only Python reads
        table = parsed(pa.string())
        values = {i: np.array([*map(_float, table[str(i)].to_pylist())]) for i in numbers}
    return table["0"].combine_chunks(), table[str(layout.passage)].combine_chunks(), values


def _check_ids(path: Path, ids: Any, lines: np.ndarray) -> None:
    refused = pc.or_(
        pc.match_substring_regex(ids.dictionary, f"[{REFUSED}]"), pc.equal(ids.dictionary, "")
    )
    if pc.any(refused).as_py():
        bad = int(np.flatnonzero(refused.to_numpy(zero_copy_only=False))[0])
        line = lines[int(np.argmax(ids.indices.to_numpy() == bad))]
        check_id(ids.dictionary[bad].as_py(), f"{path}:{line}")


def _scores(
    path: Path,
    text: bytes,
    lines: np.ndarray,
    layout: Layout,
    ids: tuple[Any, Any],
    numbers: dict[int, np.ndarray],
    ranked: dict[str, int],
) -> np.ndarray:
    """Scores [n] float32; ranks are checked where they are the ranking, or could be scores."""

    def refuse(wrong: np.ndarray, column: int, kind: str, expected: str) -> None:
        if wrong.any():
            i = int(wrong.argmax())
            value = text.split(b"\n", i + 1)[i].split(b" ")[column].decode()
            raise InputError(
                f"invalid-{kind}", f"{path}:{lines[i]} has the {kind} '{value}', not {expected}"
            )

    scores = np.zeros(len(lines), dtype=np.float32)
    if layout.score is not None:
        with np.errstate(over="ignore"):
            scores = numbers[layout.score].astype(np.float32)
        wrong = ~np.isfinite(scores)
        refuse(wrong, layout.score, "score", "a finite number; correct or remove the line")
    if layout.rank is None:
        return scores
    query_ids, passage_ids = ids
    ranks, places = numbers[layout.rank], _places(query_ids, ranked)
    if layout.score is None:
        expected = (
            "1, 2, 3, ... in the order of the lines of its query: whole numbers in the third of"
            " three columns are read as ranks; sort the lines by query and rank, or write scores as"
            f" {SIX_COLUMNS}"
        )
        refuse(ranks != places, layout.rank, "rank", expected)
        return (1 / ranks).astype(np.float32)
    expected = "a whole number: four columns are query, passage, rank, score; correct the line"
    refuse(ranks != np.floor(ranks), layout.rank, "rank", expected)
    if len(ranks) > 1 and set(passage_ids.dictionary.to_pylist()) <= {"0", "Q0"}:
        raise InputError(
            "qrels-not-run",
            f"{path} has '0' in the second of four columns, as qrels have (query, 0, passage,"
            " grade): give a run",
        )
    given = numbers[layout.score]
    if (given == places).all():
        expected = (
            "the place of its line although the scores are 1, 2, 3, ...: the columns may be query,"
            f" passage, score, rank; write {SIX_COLUMNS}"
        )
        refuse(ranks != places, layout.rank, "rank", expected)
    codes = query_ids.indices.to_numpy()
    order = np.lexsort((ranks, codes))
    further, rise = np.diff(ranks[order]) > 0, np.diff(given[order])
    contradicts = np.where(further, rise > 0, rise != 0)  # equal ranks need equal scores
    wrong = np.zeros(len(ranks), dtype=bool)
    wrong[order[1:][(np.diff(codes[order]) == 0) & contradicts]] = True
    expected = (
        "at most the score of the rank before: four columns are query, passage, rank, and a score"
        f" that is higher for better passages; correct them, or write {SIX_COLUMNS}"
    )
    refuse(wrong, layout.score, "score", expected)
    return scores


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
