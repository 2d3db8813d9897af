"""Example queries of a report: a query, and passages with what is known of each."""

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
    """A passage as it is shown; title and text are cut."""

    id: str
    title: str
    text: str
    relevant: bool
    label: str  # such as "Relevant (grade 2)"
    place: str  # such as its ranks


@dataclass(frozen=True)
class Query:
    """A query as it is shown, and a line about it, such as its scores."""

    id: str
    text: str
    line: str
    passages: list[Passage]


@dataclass(frozen=True)
class Examples:
    title: str
    queries: Sequence[Query]


def examples(comparison: Comparison, a: int, b: int, count: int) -> list[Examples]:
    """The `count` queries that gain most from system a to b in the first measure, and lose most."""
    differences = np.subtract(*comparison.values[comparison.measure][[b, a]])
    order = np.argsort(-differences, kind="stable")
    chosen = {
        "gain": [i for i in order[:count].tolist() if differences[i] > 0],
        "lose": [i for i in order[::-1][:count].tolist() if differences[i] < 0],
    }
    names = f"{comparison.names[a]} → {comparison.names[b]}"
    return [
        Examples(f"{names}: queries that {change} most", [_query(comparison, a, b, i) for i in at])
        for change, at in chosen.items()
        if at
    ]


def _query(comparison: Comparison, a: int, b: int, query: int) -> Query:
    judged, row = comparison.judged, int(comparison.query_rows[query])
    grades = {int(p): int(g) for p, g in zip(*judged.qrels.of(row), strict=True)}
    ranks = {
        comparison.names[i]: {
            p: rank for rank, p in enumerate(comparison.runs[i].of(row)[0][:DEPTH].tolist(), 1)
        }
        for i in (a, b)
    }
    tops = [passage for of in ranks.values() for passage, rank in of.items() if rank == 1]
    relevant = [passage for passage, grade in grades.items() if grade >= 1]
    relevant.sort(key=lambda p: min(of.get(p, DEPTH + 1) for of in ranks.values()))
    wanted = list(dict.fromkeys([*relevant[:RELEVANT], *tops]))
    texts, query_text = [("", "")] * len(wanted), ""
    if judged.has_texts:
        texts = judged.corpus.get(wanted)
        ((_, query_text),) = judged.queries.get([row])
    names = judged.corpus.ids(np.array(wanted, np.int64))
    passages = []
    for passage, name, text in zip(wanted, names, texts, strict=True):
        grade = grades.get(passage, 0)
        label = "Relevant" if grade >= 1 else "Not judged relevant"
        label += f" (grade {grade})" if grade > 1 else ""
        places = [f"{of.get(passage, f'below {DEPTH}')} in {run}" for run, of in ranks.items()]
        place = f"rank {', '.join(places)}"
        passages.append(Passage(name, *shortened(*text), grade >= 1, label, place))
    before, after = comparison.values[comparison.measure][[a, b], query].tolist()
    line = f"{comparison.measure} from {before:.3f} to {after:.3f}"
    line += f", {len(relevant)} relevant passages" if len(relevant) != 1 else ""
    (name,) = judged.queries.ids(np.array([row], np.int64))
    return Query(name, shortened("", query_text)[1], line, passages)


def shortened(title: str, text: str) -> tuple[str, str]:
    """A title and a text, each cut to what is shown."""
    return _short(title, CHARACTERS // 4), _short(text, CHARACTERS)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0] + " …"
