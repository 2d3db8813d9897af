"""Compare systems query by query: scores, paired tests, overlap of rankings.

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

from caravan.data.runs import Run
from caravan.progress import track
from caravan.report.systems import Judged, System
from caravan.report.tables import depth_note
from caravan.retrieval.metrics import deepest, depth_of, score_run, spelled, too_deep

DEFAULT_MEASURES = ("MRR@10", "nDCG@10", "R@100")
RESAMPLES = 9_999
"""Of the randomisation test: its smallest p is 1 in 10,000."""
DEPTH = 100
"""How deep rankings are read for overlaps and examples, whatever the measures."""
OVERLAPS = (1, 10, 100)
"""Depths of the overlap; at 1 it is the share of queries with the same passage on top."""


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

    def mean(self, system: int, measure: str) -> float | None:
        """The mean over the queries; None if the run is not deep enough."""
        mean = float(np.mean(self.values[measure][system]))
        return None if np.isnan(mean) else mean

    @property
    def depth_note(self) -> str:
        """Which runs some of the measures look deeper than; empty if none."""
        unscored = [
            np.isnan([of[i] for of in self.values.values()]).any() for i in range(len(self.runs))
        ]
        runs = zip(self.names, self.depths, unscored, strict=True)
        return depth_note({name: {"depth": d, "too_deep": cut} for name, d, cut in runs})


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
    recorded = next((system.measures for system in systems if system.measures), DEFAULT_MEASURES)
    names = spelled([name.strip() for name in measures or recorded], judged.relevant_from)
    names = list(dict.fromkeys(names))
    depth = min(max(DEPTH, deepest(names)), len(judged.corpus))
    runs, missing, depths = [], [], []
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for system in track(list(systems), "score", total=len(systems), unit="runs"):
        run = judged.read_run(system.run, depth)
        scores = score_run(run, judged.qrels, judged.queries, judged.corpus, names)
        runs.append(run)
        missing.append(scores["missing"])
        depths.append(depth_of(run, system.depth))
        for name in names:
            rows[name].append(np.array(list(scores["per_query"][name].values())))
    values = {name: np.stack(of) for name, of in rows.items()}
    for i, (system, reached) in enumerate(zip(systems, depths, strict=True)):
        # A run file may be short because there were few hits: its scores are unfair only beside a
        # deeper run.
        if system.depth is not None or reached < max(depths):
            for name in too_deep(names, reached, len(judged.corpus)):
                values[name][i] = np.nan
    couples = [
        couple
        for couple in combinations(range(len(systems)), 2)
        if against is None or against in couple
    ]
    tops = [[run.of(row)[0][:DEPTH] for row in judged.qrels.queries] for run in runs]
    return Comparison(
        judged,
        list(systems),
        runs,
        judged.qrels.queries,
        values,
        depths,
        missing,
        {name: paired_tests(of, couples, test) for name, of in values.items()},
        {(a, b): {k: _jaccard(tops[a], tops[b], k) for k in OVERLAPS} for a, b in couples},
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


def _jaccard(a: Sequence[np.ndarray], b: Sequence[np.ndarray], k: int) -> float:
    """The mean over two runs' rankings of each query; a query that both runs lack counts 1."""
    shares = []
    for one, other in zip(a, b, strict=True):
        x, y = set(one[:k].tolist()), set(other[:k].tolist())
        shares.append(len(x & y) / len(x | y) if x or y else 1.0)
    return float(np.mean(shares))
