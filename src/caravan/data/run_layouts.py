"""Layouts of run files, recognized by a header or by the first lines.

    query Q0 passage rank score tag         TREC; the score decides, as in trec_eval
    query passage rank                      MS MARCO; whole numbers, 1, 2, 3, ... in each query
    query passage score                     numbers most of which are not whole, or under a header
    query passage rank score                ColBERT's ranking.tsv
    query <tab> passage <tab> text <tab> text   MS MARCO's top1000; no ranking, all scores are 0

Three columns of whole numbers that are not ranks in order may be scores: these are refused (while
they are parsed, by `caravan.data.trec`), as is whatever is in doubt.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from caravan.data.readers.lines import PASSAGE_IDS, QUERY_IDS, column_name
from caravan.errors import InputError

LOOK = 1000
"""Lines that the layout is decided by."""

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Where the columns of a run file are, from 0."""

    columns: int
    passage: int
    rank: int | None
    score: int | None


TREC = Layout(6, 2, None, 4)  # the rank is not read
RANKS = Layout(3, 1, 2, None)
SCORES = Layout(3, 1, None, 2)
RANKED_SCORES = Layout(4, 1, 2, 3)
TEXTS = Layout(4, 1, None, None)  # between tabs
HEADERS = {
    ("query", "q0", "passage", "rank", "score", "tag"): TREC,
    ("query", "passage", "rank"): RANKS,
    ("query", "passage", "score"): SCORES,
    ("query", "passage", "rank", "score"): RANKED_SCORES,
    ("query", "passage", "query", "passage"): TEXTS,
}


def header(line: list[str]) -> Layout | None:
    """The layout that a header line names; None where the line is none.

    >>> header(["qid", "pid", "rank"]) == RANKS, header(["7", "12", "1"])
    (True, None)
    """
    return HEADERS.get(tuple(map(_meaning, line)))


def _meaning(name: str) -> str:
    name = column_name(name)
    if name in QUERY_IDS:
        return "query"
    return "passage" if name in PASSAGE_IDS | {"passage"} else name


def recognized(path: Path, lines: list[list[str]], tabs: bool, at: np.ndarray) -> Layout:
    """The layout of a file without a header.

    Args:
        lines: the columns of the first lines, at most `LOOK`.
        tabs: whether the first line has four columns between tabs.
        at: their line numbers, for messages.

    Raises:
        InputError: it has none of the layouts, or may have two of them.
    """
    columns = len(lines[0])
    if columns == 6:
        return TREC
    if columns == 4:
        scored = sum(len(line) == 4 and all(map(_is_number, line[2:])) for line in lines)
        if 2 * scored > len(lines):
            return RANKED_SCORES
        if tabs:
            return TEXTS
    if columns == 3:
        return _ranks_or_scores(path, lines, at)
    raise InputError(
        f"{path}:{at[0]} has {columns} columns; a run has six (query Q0 passage rank score tag) "
        "or, as MS MARCO writes it, three (query passage rank) or four between tabs (query, "
        "passage, and rank and score or both texts)"
    )


def _ranks_or_scores(path: Path, lines: list[list[str]], at: np.ndarray) -> Layout:
    """What the third of three columns holds."""
    broken = [
        i
        for i, line in enumerate(lines)
        if len(line) == 3 and _is_number(line[2]) and not float(line[2]).is_integer()
    ]
    if not broken:
        return RANKS
    if 2 * len(broken) <= len(lines):
        raise InputError(
            f"{path}:{at[broken[0]]} has the rank '{lines[broken[0]][2]}', which is not 1, 2, 3, "
            "..., while most lines have whole numbers in the third column; mend the line, or write "
            "scores as TREC's six columns (query Q0 passage rank score tag)"
        )
    log.info("%s: three columns, read as query, passage and score", path.name)
    return SCORES


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
