"""Compare systems query by query: scores, paired tests, overlap of rankings, example queries.

Scores are those of ir_measures (`caravan.retrieval.metrics.score_run`); a query that a run lacks
counts 0. A run is neither scored nor tested by a measure that looks deeper than the run: R@1000 of
the first 100 passages of a ranking is lower than that of the whole ranking.

A pair is tested over the queries by scipy: the two-sided paired t-test, which keeps its level on
retrieval scores (Urbano et al. 2019, SIGIR), or the randomisation test (Smucker et al. 2007, CIKM).
Several pairs are corrected after Holm (1979), a measure at a time: the tests share systems and are
dependent, and Holm holds under any dependence, unlike Benjamini and Hochberg's procedure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from caravan.data.runs import Run, read_run
from caravan.progress import track
from caravan.report.systems import Judged, System
from caravan.report.tables import depth_note
from caravan.retrieval.metrics import deepest, depth_of, score_run, spelled, too_deep

DEFAULT_MEASURES = ("MRR@10", "nDCG@10", "R@100")
TESTS = ("t", "randomisation")
RESAMPLES = 9_999
"""Of the randomisation test: its smallest p is 1 in 10,000."""
DEPTH = 100
"""How deep rankings are read for the ranks of example queries, whatever the measures."""
OVERLAPS = (1, 10, 100)
"""Depths of the overlap; at 1 it is the share of queries with the same passage on top."""
CHARACTERS = 420
"""Shown of a text, so that a page stays small."""
RELEVANT = 2
"""Relevant passages shown of a query: those that a ranking has highest."""


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
    depths: list[int]  # of the runs
    missing: list[int]  # judged queries that a run lacks
    pairs: dict[str, list[Pair]]  # by measure
    # Of two systems: {k: passages in the first k of both over those of either, mean}.
    jaccard: dict[tuple[int, int], dict[int, float]]
    test: str

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

    def scored(self, system: int, measure: str) -> bool:
        """Whether a system's run is deep enough for a measure."""
        return not np.isnan(self.values[measure][system]).any()

    def mean(self, system: int, measure: str) -> float | None:
        """The mean over the queries; None if the run is not deep enough."""
        values = self.values[measure][system]
        return float(np.mean(values)) if self.scored(system, measure) else None

    @property
    def depth_note(self) -> str:
        """Which runs some of the measures look deeper than; empty if none."""
        cut, kept = {}, []
        for i, (name, depth) in enumerate(zip(self.names, self.depths, strict=True)):
            scored = [measure for measure in self.values if self.scored(i, measure)]
            cut[name] = {"depth": depth, "too_deep": len(scored) < len(self.values)}
            if beyond := too_deep(scored, depth, len(self.judged.corpus)):
                kept.append(f"{name} is {depth:,} deep ({', '.join(beyond)})")
        note = f" Scored to the end of the run: {', '.join(kept)}." if kept else ""
        return depth_note(cut) + note


def compare(
    systems: Sequence[System],
    judged: Judged,
    measures: Sequence[str] = (),
    test: str = "t",
    against: int | None = None,
) -> Comparison:
    """Score every system query by query, and test the pairs.

    Args:
        measures: by default those of the first evaluation; with the grade from which the split
            counts a passage as relevant, as in `evaluate.py`.
        test: "t" or "randomisation".
        against: the one system that the others are tested against; None tests all pairs.

    Raises:
        InputError: If a run or a measure cannot be read.
    """
    names = list(measures) or next((list(s.measures) for s in systems if s.measures), [])
    names = spelled(names or list(DEFAULT_MEASURES), judged.relevant_from)
    names = list(dict.fromkeys(name.strip() for name in names))
    depth = min(max(DEPTH, deepest(names)), len(judged.corpus))
    runs, missing, depths = [], [], []
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for system in track(list(systems), "score", total=len(systems), unit="runs"):
        run = read_run(system.run, judged.queries, judged.corpus, depth=depth)
        scores = score_run(run, judged.qrels, judged.queries, judged.corpus, names)
        depths.append(depth_of(run, system.depth))
        for name in names:
            rows[name].append(np.array(list(scores["per_query"][name].values())))
        runs.append(run)
        missing.append(scores["missing"])
    values = {name: np.stack(of) for name, of in rows.items()}
    for i, (system, reached) in enumerate(zip(systems, depths, strict=True)):
        # A run file may be short because there were few hits: its scores are unfair only beside a
        # deeper run.
        if system.depth is not None or reached < max(depths):
            for name in too_deep(names, reached, len(judged.corpus)):
                values[name][i] = np.nan
    couples = [
        (a, b)
        for a, b in combinations(range(len(systems)), 2)
        if against is None or against in (a, b)
    ]
    queries = judged.qrels.queries
    return Comparison(
        judged,
        list(systems),
        runs,
        queries,
        values,
        depths,
        missing,
        {name: paired_tests(of, couples, test) for name, of in values.items()},
        {(a, b): {k: _jaccard(runs[a], runs[b], queries, k) for k in OVERLAPS} for a, b in couples},
        test,
    )


def paired_tests(
    values: np.ndarray,  # [S, Q]
    couples: Sequence[tuple[int, int]],
    test: str = "t",
) -> list[Pair]:
    """Test each couple (a, b) over the queries, and correct p for their number.

    Couples with a system without scores (NaN) are left out.
    """
    couples = [couple for couple in couples if not np.isnan(values[list(couple)]).any()]
    changes = [values[b] - values[a] for a, b in couples]
    tested = [_test(change, test) for change in changes]
    corrected = holm([p for _, _, p in tested])
    return [
        Pair(a, b, float(np.mean(x)), *found, p, *(int(c.sum()) for c in (x > 0, x == 0, x < 0)))
        for (a, b), x, found, p in zip(couples, changes, tested, corrected, strict=True)
    ]


def _test(differences: np.ndarray, test: str) -> tuple[float, float, float]:
    """(low, high, p) of the mean difference; p is 1 for systems that never differ.

    One query has no spread to test: its p is 1 and its interval infinite.
    """
    if not differences.any():
        return 0.0, 0.0, 1.0
    if len(differences) < 2:
        return -np.inf, np.inf, 1.0
    low = high = float(np.mean(differences))
    p = 0.0
    if np.ptp(differences) > 0:  # else t is infinite
        by_t = stats.ttest_1samp(differences, 0.0)
        low, high = map(float, by_t.confidence_interval(0.95))
        p = float(by_t.pvalue)
    if test == "randomisation":
        found = stats.permutation_test(
            (differences,),
            lambda values, axis: np.mean(values, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, (1 << 22) // len(differences)),
            rng=np.random.default_rng(0),
        )
        p = float(found.pvalue)
    return low, high, p


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down correction (1979): the least times n, the next times n - 1.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p)
    most = 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = most
    return corrected


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval by t) of scores of queries [Q]."""
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, 0.0
    return mean, float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def _jaccard(a: Run, b: Run, queries: np.ndarray, k: int) -> float:
    """Mean over the queries; a query that both runs lack counts 1."""
    tops = [run.only(queries).top(k) for run in (a, b)]
    width = 1 + max(int(run.passage_rows.max(initial=0)) for run in tops)
    of_a, of_b = (np.repeat(r.query_rows, r.counts) * width + r.passage_rows for r in tops)

    def count(pairs: np.ndarray) -> np.ndarray:
        return np.bincount(np.searchsorted(queries, pairs // width), minlength=len(queries))

    both = count(np.intersect1d(of_a, of_b, assume_unique=True))
    either = count(np.union1d(of_a, of_b))
    return float(np.mean(np.where(either == 0, 1.0, both / np.maximum(either, 1))))


# --- examples -------------------------------------------------------------------------------------


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
    values = comparison.values[comparison.measure]
    differences = values[b] - values[a]
    order = np.argsort(-differences, kind="stable")
    chosen = {
        "gain": [i for i in order[:count].tolist() if differences[i] > 0],
        "lose": [i for i in order[::-1][:count].tolist() if differences[i] < 0],
    }
    names = comparison.names
    return [
        Examples(
            names[a],
            names[b],
            change,
            comparison.measure,
            [_query(comparison, a, b, i) for i in at],
        )
        for change, at in chosen.items()
        if at
    ]


def _query(comparison: Comparison, a: int, b: int, query: int) -> Query:
    judged, row = comparison.judged, int(comparison.query_rows[query])
    grades = {int(p): int(g) for p, g in zip(*judged.qrels.of(row), strict=True)}
    ranks = [
        {p: rank for rank, p in enumerate(comparison.runs[i].of(row)[0][:DEPTH].tolist(), 1)}
        for i in (a, b)
    ]
    tops = [next(iter(ranked), None) for ranked in ranks]
    relevant = [passage for passage, grade in grades.items() if grade >= 1]
    relevant.sort(key=lambda p: min(ranked.get(p, DEPTH + 1) for ranked in ranks))
    wanted = list(dict.fromkeys([*relevant[:RELEVANT], *(p for p in tops if p is not None)]))
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
