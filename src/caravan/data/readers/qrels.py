"""Judgements as they are written: TREC's four columns or BEIR's three, with a header or without.

19335 0 1017759 2                      query, iteration, passage, grade; ASCII white space or tabs
query-id <tab> corpus-id <tab> score   BEIR
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from caravan.data.byid import Judgement
from caravan.data.ids import ASCII_SPACE, check_id
from caravan.data.readers.lines import PASSAGE_IDS, QUERY_IDS, column_name, lines, text_of
from caravan.errors import InputError

WORD = re.compile(f"[^{ASCII_SPACE}]+")
GRADE = re.compile(r"[+-]?[0-9]{1,9}")


def judgements(file: Path) -> Iterator[tuple[int, Judgement]]:
    """(line number, judgement) of each line of a qrels file, plain or .gz.

    Raises:
        InputError: a line has another number of columns, an id that a run cannot hold, or a grade
            that is no integer; a header names the columns in another order.
    """
    width = 0
    for number, line in lines(file):
        text = text_of(file, number, line).strip("\r\n")
        columns = text.split("\t") if "\t" in text else WORD.findall(text)
        columns = [column.strip(ASCII_SPACE) for column in columns]
        is_header = not width and column_name(columns[0]) in QUERY_IDS
        if is_header and not GRADE.fullmatch(columns[-1]):
            _check_header(file, number, columns)
            continue
        if len(columns) not in (3, 4) or width not in (0, len(columns)):
            expected = f"{width} as above" if width else "3 (query, passage, grade) or 4 (TREC)"
            raise InputError(
                f"{file}:{number}: {len(columns)} columns where {expected} belong: "
                "separate them by single tabs"
            )
        width = len(columns)
        if not GRADE.fullmatch(columns[-1]):
            raise InputError(
                f"{file}:{number}: the grade {columns[-1]!r} is not an integer: "
                "grades are 0 (not relevant), 1, 2, ..."
            )
        for name in (columns[0], columns[-2]):
            check_id(name, f"{file}:{number}")
        yield number, (columns[0], columns[-2], int(columns[-1]))


def _check_header(file: Path, number: int, columns: list[str]) -> None:
    """Refuse a header that names the passages elsewhere than before the last column."""
    passages = [at for at, column in enumerate(columns) if column_name(column) in PASSAGE_IDS]
    if passages and len(columns) - 2 not in passages:
        raise InputError(
            f"{file}:{number}: {columns[passages[0]]!r} names column {passages[0] + 1} of"
            f" {len(columns)}; reorder the columns: query, passage, grade"
        )
