"""Example queries of a comparison: those that gain or lose most between two systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from caravan.report.compare import DEPTH, Comparison

CHARACTERS = 420
"""Shown of a text, so that a page stays small."""
RELEVANT = 2
"""Relevant passages shown of a query: those that a ranking has highest."""


@dataclass(frozen=True)
class Passage:
    """A passage as it is shown, with its ranks in both rankings."""

    id: str
    title: str
    text: str
    grade: int  # 0 if it is not judged, or not relevant
    ranks: tuple[int | None, int | None]  # from 1; None if it is not in the first DEPTH


@dataclass(frozen=True)
class Query:
    """A query and its scores by two systems."""

    id: str
    text: str
    before: float
    after: float
    relevant: int  # the number of relevant passages
    passages: list[Passage]


@dataclass(frozen=True)
class Examples:
    """Queries that gain, or lose, most from one system (before) to another (after)."""

    before: str
    after: str
    change: str  # gain or lose
    measure: str
    queries: Sequence[Query]

    @property
    def title(self) -> str:
        return f"{self.before} → {self.after}: queries that {self.change} most"


def examples(comparison: Comparison, a: int, b: int, count: int) -> list[Examples]:
    """The `count` queries that gain most from system a to b in the first measure, and lose most."""
    names, measure = comparison.names, comparison.measure
    values = comparison.values[measure]
    differences = values[b] - values[a]
    order = np.argsort(-differences, kind="stable")
    chosen = {
        "gain": [i for i in order[:count].tolist() if differences[i] > 0],
        "lose": [i for i in order[::-1][:count].tolist() if differences[i] < 0],
    }
    found = {change: [_query(comparison, a, b, i) for i in at] for change, at in chosen.items()}
    return [
        Examples(names[a], names[b], change, measure, queries)
        for change, queries in found.items()
        if queries
    ]


def _query(comparison: Comparison, a: int, b: int, query: int) -> Query:
    judged, row = comparison.judged, int(comparison.query_rows[query])
    grades = {int(p): int(g) for p, g in zip(*judged.qrels.of(row), strict=True)}
    ranks = [
        {p: rank for rank, p in enumerate(comparison.runs[i].of(row)[0][:DEPTH].tolist(), 1)}
        for i in (a, b)
    ]
    tops = [passage for ranked in ranks for passage, rank in ranked.items() if rank == 1]
    relevant = [passage for passage, grade in grades.items() if grade >= 1]
    relevant.sort(key=lambda p: min(ranked.get(p, DEPTH + 1) for ranked in ranks))
    wanted = list(dict.fromkeys([*relevant[:RELEVANT], *tops]))
    texts, query_text = [("", "")] * len(wanted), ""
    if judged.has_texts:
        texts = judged.corpus.get(wanted)
        ((_, query_text),) = judged.queries.get([row])
    names = judged.corpus.ids(np.array(wanted, np.int64))
    passages = [
        Passage(
            name,
            _short(title, CHARACTERS // 4),
            _short(text, CHARACTERS),
            grades.get(passage, 0),
            (ranks[0].get(passage), ranks[1].get(passage)),
        )
        for passage, name, (title, text) in zip(wanted, names, texts, strict=True)
    ]
    before, after = comparison.values[comparison.measure][[a, b], query].tolist()
    (name,) = judged.queries.ids(np.array([row], np.int64))
    return Query(name, _short(query_text, CHARACTERS), before, after, len(relevant), passages)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0] + " …"
