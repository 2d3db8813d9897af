"""Systems side by side: figures query by query, significance, overlap of their rankings.

    python -m caravan.report compare runs/quickstart/pipeline their.trec
    python -m caravan.report compare a.trec b.trec --qrels qrels.txt

Scores are those of ir_measures (`caravan.retrieval.metrics.score_run`); a query that a run lacks
counts 0. A run is not scored by a measure that looks deeper than the run, and not tested in it:
R@1000 of the first 100 passages of a ranking is lower than that of the ranking itself. A pair is
tested over the queries by scipy: the two-sided paired t-test, which keeps its level on scores like
these (Urbano et al. 2019, SIGIR), or the randomisation test (Smucker et al. 2007, CIKM). Several
pairs are corrected after Holm (1979), a measure at a time: the tests share systems and so depend on
each other, and Holm holds whatever the dependence, where the false discovery rate after Benjamini
and Hochberg asks for a kind of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from caravan.data.runs import Run, read_run
from caravan.progress import track
from caravan.report.systems import Judged, System
from caravan.report.tables import MINUS, NONE, Table, best, depth_note
from caravan.retrieval.metrics import (
    deepest,
    depth_of,
    score_run,
    spelled,
    too_deep,
)

DEFAULT_MEASURES = ("MRR@10", "nDCG@10", "R@100")
TESTS = ("t", "randomisation")
RESAMPLES = 9_999
"""Of the randomisation test: the smallest p that it can find is 1 in 10,000."""
DEPTH = 100
"""How deep rankings are read for the ranks that are shown, whatever the measures ask for."""
OVERLAPS = (10, 100)


@dataclass(frozen=True)
class Pair:
    """B against A in one measure, over the queries."""

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
class Overlap:
    """What two rankings have in common."""

    a: int
    b: int
    jaccard: dict[int, float]  # by depth: passages of both over passages of either, mean
    same_first: float  # share of the queries with the same passage at the top


@dataclass(frozen=True)
class Comparison:
    """Systems over the same judged queries."""

    judged: Judged
    systems: list[System]
    runs: list[Run]  # cut to what measures and ranks need
    query_rows: np.ndarray  # [Q] that the collection has
    # By measure: [S, Q + judged queries without a text (all 0)]; NaN where it looks deeper than
    # the run.
    values: dict[str, np.ndarray]
    depths: list[int]  # of the runs
    missing: list[int]  # judged queries that a run lacks
    pairs: dict[str, list[Pair]]
    overlaps: list[Overlap]
    test: str

    @property
    def names(self) -> list[str]:
        return [system.name for system in self.systems]

    @property
    def queries(self) -> int:
        """Judged queries, over which the means are."""
        return self.values[self.measure].shape[1]

    @property
    def measure(self) -> str:
        """The measure that queries are ordered by: the first that all systems are scored by."""
        whole = (name for name, rows in self.values.items() if not np.isnan(rows).any())
        return next(whole, next(iter(self.values)))

    def scored(self, system: int, measure: str) -> bool:
        """Whether a system's run is deep enough for a measure."""
        return not np.isnan(self.values[measure][system]).any()

    def depth_note(self, measures: Sequence[str]) -> str:
        """Which runs some of the measures look deeper than; empty if none."""
        passages = len(self.judged.corpus)
        cut, kept = {}, []
        for i, (name, depth) in enumerate(zip(self.names, self.depths, strict=True)):
            cut[name] = {"depth": depth, "too_deep": not all(self.scored(i, m) for m in measures)}
            beyond = too_deep([m for m in measures if self.scored(i, m)], depth, passages)
            if beyond:
                kept.append(f"{name} is {depth:,} deep ({', '.join(beyond)})")
        note = f" Scored to the end of the run: {', '.join(kept)}." if kept else ""
        return depth_note(cut) + note


def compared(
    systems: Sequence[System],
    judged: Judged,
    measures: Sequence[str] = (),
    test: str = "t",
    against: int | None = None,
) -> Comparison:
    """Score every system query by query, and test the pairs.

    Args:
        measures: by default those of the first evaluation; spelled as `evaluate.py` spells them
            where relevance begins at a higher grade.
        test: "t" or "randomisation".
        against: the place of one system that the others are tested against; None tests all pairs.

    Raises:
        InputError: a run or a measure is wrong.
    """
    asked = list(measures) or next((list(s.measures) for s in systems if s.measures), [])
    asked = spelled(asked or list(DEFAULT_MEASURES), judged.relevant_from)
    asked = list(dict.fromkeys(name.strip() for name in asked))
    depth = min(max(DEPTH, deepest(asked)), len(judged.corpus))
    runs, missing, depths = [], [], []
    values: dict[str, list[np.ndarray]] = {name: [] for name in asked}
    for system in track(list(systems), "score", total=len(systems), unit="runs"):
        run = read_run(system.run, judged.queries, judged.corpus, depth=depth)
        scored = score_run(run, judged.qrels, judged.queries, judged.corpus, asked)
        depths.append(depth_of(run, system.depth))
        for name in asked:
            values[name].append(np.array(list(scored["per_query"][name].values())))
        runs.append(run)
        missing.append(scored["missing"])
    stacked = {name: np.stack(rows) for name, rows in values.items()}
    for row, (system, reached) in enumerate(zip(systems, depths, strict=True)):
        # A run file may be short because there were few hits: its scores are unfair beside a deeper
        # run alone.
        if system.depth is not None or reached < max(depths):
            for name in too_deep(asked, reached, len(judged.corpus)):
                stacked[name][row] = np.nan
    couples = [
        (a, b)
        for a, b in combinations(range(len(systems)), 2)
        if against is None or against in (a, b)
    ]
    return Comparison(
        judged,
        list(systems),
        runs,
        judged.qrels.queries,
        stacked,
        depths,
        missing,
        {name: paired(rows, couples, test) for name, rows in stacked.items()},
        [_overlap(runs, a, b, judged.qrels.queries) for a, b in couples],
        test,
    )


def paired(
    values: np.ndarray,  # [S, Q]
    couples: Sequence[tuple[int, int]],
    test: str = "t",
) -> list[Pair]:
    """Each couple (a, b) tested over the queries, corrected for their number.

    A couple is left out if one of the systems has no scores (NaN).
    """
    couples = [couple for couple in couples if not np.isnan(values[list(couple)]).any()]
    found = [_tested(values[b] - values[a], test) for a, b in couples]
    corrected = holm([p for _, _, p in found])
    return [
        Pair(
            a,
            b,
            float(np.mean(values[b] - values[a])),
            low,
            high,
            p,
            adjusted,
            int((values[b] > values[a]).sum()),
            int((values[b] == values[a]).sum()),
            int((values[b] < values[a]).sum()),
        )
        for (a, b), (low, high, p), adjusted in zip(couples, found, corrected, strict=True)
    ]


def _tested(differences: np.ndarray, test: str) -> tuple[float, float, float]:
    """(low, high, p) of the mean difference; systems that never differ have p = 1.

    One query has no spread, and nothing to test: its p is 1 and its interval without end.
    """
    from scipy import stats

    if not differences.any():
        return 0.0, 0.0, 1.0
    if len(differences) < 2:
        return -np.inf, np.inf, 1.0
    mean = float(np.mean(differences))
    if np.ptp(differences) == 0:  # all alike: t is infinite
        low, high, p = mean, mean, 0.0
    else:
        by_t = stats.ttest_1samp(differences, 0.0)
        interval = by_t.confidence_interval(0.95)
        low, high, p = float(interval.low), float(interval.high), float(by_t.pvalue)
    if test == "randomisation":
        p = float(
            stats.permutation_test(
                (differences,),
                _mean,
                permutation_type="samples",
                vectorized=True,
                n_resamples=RESAMPLES,
                batch=max(1, (1 << 22) // len(differences)),
                rng=np.random.default_rng(0),
            ).pvalue
        )
    return low, high, p


def _mean(differences: Any, axis: int) -> Any:
    return np.mean(differences, axis=axis)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected step by step (Holm 1979): the least times n, the next times n - 1, ...

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p)
    most = 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = most
    return corrected


def interval(values: np.ndarray) -> tuple[float, float]:
    """(mean, half the width of its 95 % confidence interval by t) of figures of queries."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, 0.0
    return mean, float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def _overlap(runs: Sequence[Run], a: int, b: int, queries: np.ndarray) -> Overlap:
    jaccard = {k: _jaccard(runs[a], runs[b], queries, k) for k in OVERLAPS}
    return Overlap(a, b, jaccard, _jaccard(runs[a], runs[b], queries, 1))


def _jaccard(a: Run, b: Run, queries: np.ndarray, k: int) -> float:
    """Mean over the queries; one that both runs lack has nothing that differs and counts 1."""
    tops = [run.only(queries).top(k) for run in (a, b)]
    width = 1 + max(int(run.passage_rows.max(initial=0)) for run in tops)
    of_a, of_b = (np.repeat(r.query_rows, r.counts) * width + r.passage_rows for r in tops)
    both = _by_query(np.intersect1d(of_a, of_b, assume_unique=True) // width, queries)
    either = _by_query(np.union1d(of_a, of_b) // width, queries)
    return float(np.mean(np.where(either == 0, 1.0, both / np.maximum(either, 1))))


def _by_query(query_rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(queries, query_rows), minlength=len(queries))


# --- tables -----------------------------------------------------------------------------------


def tables(comparison: Comparison) -> list[Table]:
    """Scores, tests, overlap."""
    overall = [
        [
            float(np.mean(rows[i])) if comparison.scored(i, measure) else None
            for measure, rows in comparison.values.items()
        ]
        for i in range(len(comparison.systems))
    ]
    found = [
        Table(
            "figures",
            f"{where(comparison)}: mean over {comparison.queries:,} queries, best in bold."
            + _missing(comparison)
            + comparison.depth_note(list(comparison.values)),
            ["system", *comparison.values],
            [
                [name, *(NONE if value is None else f"{value:.4f}" for value in row)]
                for name, row in zip(comparison.names, overall, strict=True)
            ],
            strong=best(overall),
        )
    ]
    found += significance(comparison)
    found.append(
        Table(
            "overlap",
            f"{where(comparison)}: what two rankings have in common, mean over the queries."
            " Jaccard@k: passages in the first k of both over those in the first k of either.",
            ["A", "B", "same first", *(f"Jaccard@{k}" for k in OVERLAPS)],
            [
                [
                    *(comparison.names[i] for i in (one.a, one.b)),
                    *(f"{share:.3f}" for share in (one.same_first, *one.jaccard.values())),
                ]
                for one in comparison.overlaps
            ],
            labels=2,
        )
    )
    return found


def significance(comparison: Comparison) -> list[Table]:
    """The tests: a table for each measure with a pair to test, or one for the only pair."""
    tested = {measure: pairs for measure, pairs in comparison.pairs.items() if pairs}
    if not tested:
        return []
    if len(comparison.overlaps) == 1:
        ((a, b),) = {(pair.a, pair.b) for (pair,) in tested.values()}
        names = comparison.names
        return [
            _tests(
                comparison,
                "significance",
                f"{names[b]} (B) against {names[a]} (A)",
                "measure",
                [([measure], pair) for measure, (pair,) in tested.items()],
                list(comparison.values),
                corrected=False,
            )
        ]
    return [
        _tests(
            comparison,
            f"significance-{slug(measure)}",
            measure,
            "A, B",
            [([comparison.names[i] for i in (pair.a, pair.b)], pair) for pair in pairs],
            [measure],
            corrected=True,
        )
        for measure, pairs in tested.items()
    ]


def _tests(
    comparison: Comparison,
    name: str,
    of: str,
    labels: str,
    found: list[tuple[list[str], Pair]],
    measures: Sequence[str],
    corrected: bool,
) -> Table:
    by = "paired t-test" if comparison.test == "t" else f"randomisation test, {RESAMPLES:,} samples"
    held = f", p corrected after Holm over {_pairs(len(found))}" if corrected else ""
    columns = labels.split(", ")
    rows = []
    for cells, pair in found:
        ps = [shown(pair.p), shown(pair.corrected)] if corrected else [shown(pair.p)]
        counts = [f"{count:,}" for count in (pair.gained, pair.equal, pair.lost)]
        reach = f"{signed(pair.low)} to {signed(pair.high)}"
        rows.append([*cells, signed(pair.difference), *ps, reach, *counts])
    decides = len(columns) + (2 if corrected else 1)
    return Table(
        name,
        f"{where(comparison)}, {of}: {by}, two-sided{held}; below .05 in bold. Queries that gain,"
        f" keep and lose from A to B.{comparison.depth_note(measures)}",
        [
            *(*columns, f"B {MINUS} A", "p"),
            *(["p (Holm)"] if corrected else []),
            *("95 % interval (t)", "gain", "keep", "lose"),
        ],
        rows,
        labels=len(columns),
        strong=frozenset((i, decides) for i, (_, p) in enumerate(found) if p.corrected < 0.05),
    )


def signed(value: float) -> str:
    """A difference with its sign, a minus and not a hyphen.

    >>> signed(0.0048), signed(-0.1), signed(-0.00001)
    ('+0.0048', '\\u22120.1000', '+0.0000')
    """
    text = f"{value:+.4f}"
    return "+0.0000" if text == "-0.0000" else text.replace("-", MINUS)


def slug(text: str) -> str:
    """A text as part of a file's name or of an anchor.

    >>> slug("MRR(rel=2)@10")
    'MRR-rel-2-10'
    """
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def shown(p: float) -> str:
    """A p-value as papers print it: .018, <.001.

    >>> shown(0.0184), shown(0.00001), shown(1.0)
    ('.018', '<.001', '1.000')
    """
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"


def where(comparison: Comparison) -> str:
    """Name and split of what was searched."""
    return " ".join(filter(None, (comparison.judged.name, comparison.judged.split)))


def _missing(comparison: Comparison) -> str:
    told = [
        f"{name} lacks {count:,}"
        for name, count in zip(comparison.names, comparison.missing, strict=True)
        if count
    ]
    return f" Queries that a run lacks count 0: {', '.join(told)}." if told else ""
