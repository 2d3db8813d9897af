"""Measures of a run: MRR, nDCG, recall, MAP and precision, by name ("nDCG@10").

`per_query` computes the live metrics, in numpy over the whole run at once; `score_run` the final
ones, by ir_measures (https://ir-measur.es). Both equal trec_eval's to 1e-6: nDCG has linear gains
(`ndcg_cut`), a passage is relevant from grade 1 on (or from n on: `MRR(rel=2)@10`). The mean is
over all judged queries, as in `trec_eval -c` and `ir_measures.calc_aggregate`: a query that the run
lacks, or that has no relevant passage, counts 0. Relevant passages that the corpus lacks count as
not found (`Qrels.unknown`). Relevance may begin at a higher grade (TREC DL's passages): `spelled`.
Ties are broken before scoring, by `canonical`: providers of ir_measures break them differently.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from caravan.data.runs import Run, canonical
from caravan.errors import InputError
from caravan.progress import progress

if TYPE_CHECKING:
    from caravan.data.collection import Qrels, Texts

log = logging.getLogger(__name__)

NAMES = ("MRR", "nDCG", "R", "MAP", "P")
OTHER_NAMES = {
    "rr": "MRR", "recall": "R", "ap": "MAP", "precision": "P", "prec": "P", "map_cut": "MAP",
    "ndcg_cut": "nDCG", "recip_rank": "MRR",
}  # fmt: skip
"""What other tools call them, for "did you mean"."""

QUERIES_AT_ONCE = 500
"""Scored in one call of ir_measures, which holds a run as dicts of strings."""


@dataclass(frozen=True)
class Measure:
    """A parsed name: `MRR(rel=2)@10` is ("MRR", 10, 2)."""

    name: str
    cutoff: int
    rel: int = 1  # the lowest grade that is relevant; nDCG takes grades as they are


def parse_measure(text: str) -> Measure:
    """The measure behind a name such as "MRR@10", "nDCG@10", "R@1000", "MAP(rel=2)@1000".

    Raises:
        InputError: It is none; says what was probably meant.

    >>> parse_measure("R(rel=2)@100")
    Measure(name='R', cutoff=100, rel=2)
    """
    match = re.fullmatch(r"(\w+)(?:\(rel=([1-9]\d*)\))?@([1-9]\d*)", str(text).strip())
    if match and match[1] in NAMES and not (match[1] == "nDCG" and match[2]):
        return Measure(match[1], int(match[3]), int(match[2] or 1))
    raise InputError(
        f"'{text}' is not a measure; did you mean '{_suggestion(str(text))}'? There are "
        f"{', '.join(f'{name}@k' for name in NAMES)}, and e.g. R(rel=2)@k for higher grades"
    )


def spelled(measures: Sequence[str], relevant_from: int) -> list[str]:
    """The measures with the grade that is relevant, where a split has another than 1.

    TREC DL's passages of grade 1 are related and do not answer; its binary measures count from
    grade 2 on. A measure that names its own grade, and nDCG, stay as they are.

    >>> spelled(["MRR@10", "nDCG@10", "R(rel=1)@100"], relevant_from=2)
    ['MRR(rel=2)@10', 'nDCG@10', 'R(rel=1)@100']
    """
    if relevant_from == 1:
        return list(measures)
    return [
        text
        if "(" in text or parse_measure(text).name == "nDCG"
        else text.replace("@", f"(rel={relevant_from})@")
        for text in measures
    ]


def deepest(measures: Sequence[str]) -> int:
    """The deepest cutoff of the measures: a search must keep at least so many passages.

    >>> deepest(["MRR@10", "R@1000"])
    1000
    """
    return max((parse_measure(text).cutoff for text in measures), default=0)


def depth_of(run: Run, searched: int | None = None) -> int:
    """How many passages a query can have in a run: its longest list, or the depth of the search.

    Args:
        searched: the depth that the search was asked for, if known. A query may have fewer hits,
            so lists alone would understate it.
    """
    return max(int(run.counts.max(initial=0)), searched or 0)


def too_deep(measures: Sequence[str], depth: int, passages: int) -> list[str]:
    """The measures that a run cannot be scored by: R@1000 of 100 passages is R@100.

    Args:
        depth: of the run, see `depth_of`.
        passages: of the collection; a run that ranks all of them suits every measure.

    >>> too_deep(["MRR@10", "R@1000"], depth=100, passages=5_000)
    ['R@1000']
    """
    return [text for text in measures if min(parse_measure(text).cutoff, passages) > depth]


def per_query(run: Run, qrels: Qrels, measures: Sequence[str]) -> dict[str, np.ndarray]:
    """Each measure for each judged query that the collection has.

    The run is scored in the order it has; give `canonical(run, corpus)` where scores may tie.

    Returns:
        For each measure float64 [Q], in the order of `qrels.queries`.
    """
    parsed = {text: parse_measure(text) for text in measures}
    queries = qrels.queries
    best = run.top(deepest(measures))
    counts = best.counts
    rank = np.arange(len(best.passage_rows)) - np.repeat(best.offsets[:-1], counts)
    query = _positions(np.repeat(best.query_rows, counts), queries)
    scored = query >= 0
    query, rank, passage_rows = query[scored], rank[scored], best.passage_rows[scored]

    judged = _positions(qrels.query_rows, queries)
    grades = _grades(query, passage_rows, judged, qrels.passage_rows, qrels.grades)
    # passages that are not in the corpus count in the ideal ranking and as relevant passages
    judged = np.concatenate([judged, _positions(qrels.unknown.query_rows, queries)])
    judged_grades = np.concatenate([qrels.grades, qrels.unknown.grades])
    return {
        text: _measure(measure, len(queries), query, rank, grades, judged, judged_grades)
        for text, measure in parsed.items()
    }


def score_run(
    run: Run, qrels: Qrels, queries: Texts, corpus: Texts, measures: Sequence[str]
) -> dict[str, Any]:
    """The final metrics of a run, by ir_measures over the run in canonical order.

    Returns:
        `overall`: {measure: mean}; `per_query`: {measure: {query id: value}}; over how many
        `queries` the mean is, of which `missing` have no passage in the run and `without_relevant`
        no relevant passage (all of these count 0); `unknown_passages`, judgements of passages that
        the corpus lacks, and `unknown_queries`, judged queries without a text (among `queries` and
        `missing`); and how many queries of the run are `unjudged` (not in the mean).

    Raises:
        InputError: Unknown measure, or no judged query has a relevant passage.
    """
    parsed = {text: parse_measure(text) for text in measures}
    rows, unknown = qrels.queries, qrels.unknown
    relevant = np.union1d(
        qrels.query_rows[qrels.grades >= 1], unknown.query_rows[unknown.grades >= 1]
    )
    if not len(relevant):
        raise InputError(
            f"none of the {len(rows)} judged queries has a relevant passage (grade 1 or more), so "
            "there is nothing to average; check the qrels of this split"
        )
    found = run.query_rows[run.counts > 0]
    missing = len(np.setdiff1d(rows, found, assume_unique=True))
    if not len(found):
        log.warning("the run has no passage for any of the %d queries to score", missing)
    elif missing == len(rows):
        log.warning("the run has none of the %d queries to score: is it of this split?", missing)
    names = queries.ids(rows)
    values: dict[Measure, dict[str, float]] = {measure: {} for measure in parsed.values()}
    best = canonical(run, corpus).top(deepest(measures))
    with progress("score", len(rows), "queries") as done:
        for start in range(0, len(rows), QUERIES_AT_ONCE):
            some = rows[start : start + QUERIES_AT_ONCE]
            for measure, row, value in _ir_measures(best, qrels, some, list(values)):
                values[measure][row] = value
            done(len(some))
    places = list(zip(rows.tolist(), names, strict=True))
    ordered = {
        text: {
            **{name: values[measure][str(row)] for row, name in places},
            **dict.fromkeys(unknown.queries, 0.0),
        }
        for text, measure in parsed.items()
    }
    return {
        "overall": {text: float(np.mean(list(of.values()))) for text, of in ordered.items()},
        "per_query": ordered,
        "queries": len(rows) + len(unknown.queries),
        "without_relevant": len(rows) - len(relevant),
        "missing": missing + len(unknown.queries),
        "unknown_passages": len(unknown.grades),
        "unknown_queries": len(unknown.queries),
        "unjudged": len(np.setdiff1d(found, rows, assume_unique=True)),
    }


def _measure(
    measure: Measure,
    count: int,
    query: np.ndarray,  # [N] position of the query among those scored, ascending
    rank: np.ndarray,  # [N] from 0
    grades: np.ndarray,  # [N] of the retrieved passages, 0 where unjudged
    judged: np.ndarray,  # [J] position of the query of each judgement
    judged_grades: np.ndarray,  # [J]
) -> np.ndarray:
    shallow = rank < measure.cutoff
    if measure.name == "nDCG":
        ideal_order = np.lexsort((-judged_grades, judged))
        query_of, gains = judged[ideal_order], judged_grades[ideal_order]
        place = np.arange(len(query_of)) - np.searchsorted(query_of, query_of)
        ideal = _gain(query_of, place, gains, measure.cutoff, count)
        gain = _gain(query, rank, grades, measure.cutoff, count)
        return np.divide(gain, ideal, out=np.zeros(count), where=ideal > 0)
    hit = shallow & (grades >= measure.rel)
    query, rank = query[hit], rank[hit]
    relevant = np.bincount(judged[judged_grades >= measure.rel], minlength=count)
    if measure.name == "MRR":
        values = np.zeros(count)
        first, where = np.unique(query, return_index=True)
        values[first] = 1.0 / (rank[where] + 1)
        return values
    if measure.name == "P":
        return np.bincount(query, minlength=count) / measure.cutoff
    hits_so_far = np.arange(len(query)) - np.searchsorted(query, query) + 1
    weights = hits_so_far / (rank + 1) if measure.name == "MAP" else np.ones(len(query))
    total = np.bincount(query, weights=weights, minlength=count)
    return total / np.maximum(relevant, 1)


def _gain(
    query: np.ndarray, rank: np.ndarray, grades: np.ndarray, cutoff: int, count: int
) -> np.ndarray:
    """Discounted cumulative gain [count]: grade / log2(rank + 2), negative grades count 0."""
    weights = np.where(rank < cutoff, np.maximum(grades, 0) / np.log2(rank + 2.0), 0.0)
    return np.bincount(query, weights=weights, minlength=count)


def _positions(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The place of each row in the sorted unique array `among`, -1 where it is not there."""
    if not len(among):
        return np.full(len(rows), -1)
    place = np.minimum(np.searchsorted(among, rows), len(among) - 1)
    return np.where(among[place] == rows, place, -1)


def _grades(
    query: np.ndarray,
    passage_rows: np.ndarray,
    judged: np.ndarray,
    judged_rows: np.ndarray,
    judged_grades: np.ndarray,
) -> np.ndarray:
    """The grade of each (query, passage), 0 where it is not judged; judgements are sorted."""
    width = 1 + max(int(passage_rows.max(initial=0)), int(judged_rows.max(initial=0)))
    place = _positions(query * width + passage_rows, judged * width + judged_rows)
    grades = np.zeros(len(query), dtype=np.int64)
    grades[place >= 0] = judged_grades[place[place >= 0]]
    return grades


def _ir_measures(
    run: Run, qrels: Qrels, rows: np.ndarray, measures: list[Measure]
) -> Iterator[tuple[Measure, str, float]]:
    """(measure, query row as text, value) by ir_measures; rows serve as ids.

    Scores are replaced by strictly falling ones: the order is given, and no provider sees a tie.
    """
    import ir_measures

    wanted = {
        ir_measures.parse_measure(
            f"{m.name}(rel={m.rel})@{m.cutoff}" if m.rel > 1 else f"{m.name}@{m.cutoff}"
        ): m
        for m in measures
    }
    judged, ranked = {}, {}
    for row in rows.tolist():
        passage_rows, grades = qrels.of(row)
        lost = qrels.unknown.grades[qrels.unknown.query_rows == row]
        names = [*map(str, passage_rows.tolist()), *(f"unknown {i}" for i in range(len(lost)))]
        judged[str(row)] = dict(zip(names, [*grades.tolist(), *lost.tolist()], strict=True))
        if len(passages := run.of(row)[0]):
            ranked[str(row)] = {str(p): float(-i) for i, p in enumerate(passages.tolist())}
    for value in ir_measures.iter_calc(list(wanted), judged, ranked):
        yield wanted[value.measure], value.query_id, float(value.value)


def _suggestion(text: str) -> str:
    """The name most like what was typed, whatever its case, its separator or its origin."""
    typed = re.match(r"\W*([A-Za-z_]*[A-Za-z])?", text)
    depth = re.search(r"([1-9]\d*)\W*$", text)
    known = {**OTHER_NAMES, **{name.lower(): name for name in NAMES}}
    word = (typed[1] if typed else None) or ""
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"{known[close[0]] if close else 'nDCG'}@{depth[1] if depth else 10}"
