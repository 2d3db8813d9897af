"""Compare systems query by query: scores, paired tests, example queries.

Scores are those of ir_measures (`caravan.retrieval.metrics.score_run`); a query that a run lacks
counts 0. A run is neither scored nor tested by a measure that looks deeper than the run: R@1000 of
the first 100 passages of a ranking is lower than that of the whole ranking.

A pair is tested over the queries by scipy: the two-sided paired t-test, which keeps its level on
retrieval scores (Urbano et al. 2019, SIGIR).
Several pairs are corrected after Holm (1979), a measure at a time: the tests share systems and are
dependent, and Holm holds under any dependence, unlike Benjamini and Hochberg's procedure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from caravan.data.runs import Run
from caravan.errors import InputError
from caravan.progress import track
from caravan.report.records import measures_of
from caravan.report.systems import Judged, System
from caravan.retrieval.metrics import deepest, depth_of, score_run, spelled, too_deep

DEFAULT_MEASURES = ("MRR@10", "nDCG@10", "R@100")
DEPTH = 100
"""How deep rankings are read for examples, whatever the measures."""
CHARACTERS = 420  # shown of a text, so that a page stays small
WIDTH = 160  # characters shown in a terminal
RELEVANT = 2  # relevant passages shown of a query: those that a ranking has highest


@dataclass(frozen=True)
class Pair:
    """System b against system a in one measure, over the queries."""

    a: int
    b: int
    difference: float  # mean of B - A
    low: float  # of the 95 % confidence interval of the difference, by t
    high: float
    p: float
    corrected: float  # p after Holm, over the pairs of the measure
    gained: int  # queries
    equal: int
    lost: int


@dataclass(frozen=True)
class Comparison:
    """Systems over the same judged queries."""

    judged: Judged
    systems: list[System]
    runs: list[Run]  # cut to the depth that measures and ranks need
    query_rows: np.ndarray  # [Q], of the queries that the collection has
    # By measure: [S, Q + judged queries without a text (all 0)]; NaN if it looks deeper than a run.
    values: dict[str, np.ndarray]
    missing: list[int]  # judged queries that a run lacks
    pairs: dict[str, list[Pair]]  # by measure

    @property
    def names(self) -> list[str]:
        return [system.name for system in self.systems]

    @property
    def queries(self) -> int:
        """The number of judged queries, over which the means are."""
        return self.values[self.measure].shape[1]

    @property
    def measure(self) -> str:
        """The measure by which queries are ordered: the first that scores all systems."""
        whole = (name for name, rows in self.values.items() if not np.isnan(rows).any())
        return next(whole, next(iter(self.values)))

    def mean(self, system: int, measure: str) -> float | None:
        """The mean over the queries; None if the run is not deep enough."""
        mean = float(np.mean(self.values[measure][system]))
        return None if np.isnan(mean) else mean


def compare(
    systems: Sequence[System],
    judged: Judged,
    measures: Sequence[str] = (),
    couples: Sequence[tuple[int, int]] | None = None,
) -> Comparison:
    """Score every system query by query, and test the pairs.

    Args:
        measures: by default those of the evaluations; with the grade from which the split counts
            a passage as relevant, as in `evaluate.py`.
        couples: the pairs of systems that are tested, by default all.

    Raises:
        InputError: If a run or a measure cannot be read.
    """
    recorded = measures_of(one.scored for one in systems)
    wanted = [name.strip() for name in measures or recorded or DEFAULT_MEASURES]
    names = list(dict.fromkeys(spelled(wanted, judged.relevant_from)))
    if couples is None:
        couples = list(combinations(range(len(systems)), 2))
    depth = min(max(DEPTH, deepest(names)), len(judged.corpus))
    runs, missing, scores = [], [], []
    for system in track(list(systems), "score", total=len(systems), unit="runs"):
        run = judged.read_run(system.run, depth)
        scored = score_run(run, judged.qrels, judged.queries, judged.corpus, names)
        runs.append(run)
        missing.append(scored["missing"])
        scores.append([list(scored["per_query"][name].values()) for name in names])
    values = dict(zip(names, np.array(scores).swapaxes(0, 1), strict=True))
    depths = [depth_of(run, one.depth) for run, one in zip(runs, systems, strict=True)]
    for i, (system, reached) in enumerate(zip(systems, depths, strict=True)):
        # A run file may be short because there were few hits: its scores are unfair only beside a
        # deeper run.
        if system.depth is not None or reached < max(depths):
            for name in too_deep(names, reached, len(judged.corpus)):
                values[name][i] = np.nan
    return Comparison(
        judged,
        list(systems),
        runs,
        judged.qrels.queries,
        values,
        missing,
        {name: paired_tests(of, couples) for name, of in values.items()},
    )


def refuse_changed(comparison: Comparison) -> None:
    """Raise an InputError if a run file no longer has the scores in its metrics.json."""
    for i, system in enumerate(comparison.systems):
        for measure, was in system.scored.overall.items():
            now = comparison.mean(i, measure) if measure in comparison.values else None
            if now is not None and abs(was - now) > 1e-6:
                raise InputError(
                    "changed-run",
                    f"{system.run} has changed since it was scored ({measure} was {was:.4f} and is"
                    f" {now:.4f}); evaluate again",
                )


def paired_tests(values: np.ndarray, couples: Sequence[tuple[int, int]]) -> list[Pair]:
    """Test couples (a, b) of values [S, Q] over the queries, and correct p for their number.

    Couples with a system without scores (NaN) are left out.
    """
    couples = [couple for couple in couples if not np.isnan(values[list(couple)]).any()]
    changes = [values[b] - values[a] for a, b in couples]
    tested = [_test(change) for change in changes]
    corrected = holm([p for _, _, p in tested])
    return [
        Pair(a, b, float(np.mean(x)), *found, p, *(int(c.sum()) for c in (x > 0, x == 0, x < 0)))
        for (a, b), x, found, p in zip(couples, changes, tested, corrected, strict=True)
    ]


def _test(differences: np.ndarray) -> tuple[float, float, float]:
    """(low, high, p) of the mean difference; p is 1 for systems that never differ.

    One query has no spread to test: its p is 1 and its interval infinite.
    """
    if not differences.any():
        return 0.0, 0.0, 1.0
    if len(differences) < 2:
        return -np.inf, np.inf, 1.0
    mean = float(np.mean(differences))
    if np.ptp(differences) == 0:  # t is infinite
        return mean, mean, 0.0
    found = stats.ttest_1samp(differences, 0.0)
    low, high = map(float, found.confidence_interval(0.95))
    return low, high, float(found.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction (1979): the least times n, the next times n - 1.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p)
    steps = np.arange(len(p), 0, -1) * np.array(p)[order]
    corrected = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected[np.argsort(order)].tolist()


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval by t) of scores of queries [Q]."""
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, 0.0
    return mean, float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


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

    def text(self) -> str:
        """The queries with their passages for a terminal."""
        lines = [f"{self.title}\n"]
        for query in self.queries:
            lines.append(f"{query.text or query.id}   {query.line}")
            for one in query.passages:
                lines.append(f"  {one.id}: {one.label.lower()}, {one.place}")
                if text := f"{one.title} {one.text}".strip():
                    lines.append(f"     {_short(text, WIDTH)}")
        return "\n".join(lines)


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
    if judged.collection is not None:
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
