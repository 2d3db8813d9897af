"""The queries that gained and lost the most from one system to another, with passages' texts.

What a page shows of a query: the ranks of its relevant passages in both rankings, and the passage
that each ranking has on top. Few and short, so that a page stays small however large the
collection is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from caravan.data.runs import Run
from caravan.report.compare import DEPTH, Comparison

CHARACTERS = 420
"""Of a text that are shown."""
RELEVANT = 2
"""Relevant passages of a query that are shown, those that one of the rankings has highest first."""


@dataclass(frozen=True)
class Passage:
    """A passage as it is shown, with its place in both rankings."""

    id: str
    title: str
    text: str
    grade: int  # 0 where it is not judged, or not relevant
    ranks: tuple[int | None, int | None]  # from 1; None where it is not in the first DEPTH
    top_of: tuple[bool, bool]


@dataclass(frozen=True)
class Example:
    """A query and what two systems make of it."""

    id: str
    text: str
    before: float
    after: float
    relevant: int  # how many passages are
    passages: list[Passage]


def examples(
    comparison: Comparison, a: int, b: int, count: int
) -> tuple[list[Example], list[Example]]:
    """The `count` queries that gain most in the first measure from system a to b, and lose most."""
    values = comparison.values[comparison.measure]
    differences = values[b] - values[a]
    order = np.argsort(-differences, kind="stable")
    gained = [i for i in order[:count].tolist() if differences[i] > 0]
    lost = [i for i in order[::-1][:count].tolist() if differences[i] < 0]
    return (
        [_example(comparison, a, b, i) for i in gained],
        [_example(comparison, a, b, i) for i in lost],
    )


def _example(comparison: Comparison, a: int, b: int, query: int) -> Example:
    judged = comparison.judged
    row = int(comparison.query_rows[query])
    values = comparison.values[comparison.measure]
    rows, grades = judged.qrels.of(row)
    grade_of = {int(p): int(g) for p, g in zip(rows, grades, strict=True)}
    ranks = [_ranks(comparison.runs[i], row) for i in (a, b)]
    tops = [next(iter(ranked), None) for ranked in ranks]
    relevant = [passage for passage, grade in grade_of.items() if grade >= 1]
    relevant.sort(key=lambda p: min(ranked.get(p, DEPTH + 1) for ranked in ranks))
    wanted = list(dict.fromkeys([*relevant[:RELEVANT], *(p for p in tops if p is not None)]))
    texts: list[tuple[str, str]] = [("", "")] * len(wanted)
    (query_text,) = [""]
    if judged.has_texts:
        texts = judged.corpus.get(wanted)
        ((_, query_text),) = judged.queries.get([row])
    names = judged.corpus.ids(np.array(wanted, np.int64))
    passages = [
        Passage(
            name,
            _short(title, CHARACTERS // 4),
            _short(text, CHARACTERS),
            grade_of.get(passage, 0),
            (ranks[0].get(passage), ranks[1].get(passage)),
            (passage == tops[0], passage == tops[1]),
        )
        for passage, name, (title, text) in zip(wanted, names, texts, strict=True)
    ]
    (name,) = judged.queries.ids(np.array([row], np.int64))
    return Example(
        name,
        _short(query_text, CHARACTERS),
        float(values[a][query]),
        float(values[b][query]),
        len(relevant),
        passages,
    )


def _ranks(run: Run, query_row: int) -> dict[int, int]:
    passages = run.of(query_row)[0][:DEPTH].tolist()
    return {passage: rank for rank, passage in enumerate(passages, 1)}


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0] + " …"
