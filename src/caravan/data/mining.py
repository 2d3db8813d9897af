"""Positive-aware mining: rules that leave probable positives out of the hard negatives.

A passage that a retriever scores near the positive, or above it, is often relevant and unjudged
(NV-Retriever, arXiv 2407.15831). The rules have the names and the meaning of
`mine_hard_negatives` in sentence-transformers, and apply to each run by its own scores. To apply
them after fusion, fuse the runs with `evaluate.py` and give the sampler the fused run.

The margins compare with the lowest score of the query's positives. A positive that the run lacks
ranks below all passages of the run, so with a margin none of them is a candidate.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from caravan.data.qrels import Qrels
from caravan.data.runs import Run
from caravan.distributed import is_main_process
from caravan.errors import InputError

LINES_AT_ONCE = 1 << 21
MANY = 0.1
"""Share of training queries without a candidate above which the log has a warning."""
NO_SCORE = "positive_without_score"  # counted as a rule that the margins add

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """Which passages of a run are candidates. Rules apply in this order; None disables one.

    Attributes:
        absolute_margin: remove a passage if its score plus this is above the positive's score.
        relative_margin: the same with this share of the positive's absolute score; 0.05 is
            NV-Retriever's TopK-PercPos of 95%.
        max_score, min_score: remove a passage if its score is above or below.
        teacher_margin: remove a passage if its teacher score is above the positive's minus this.
            Passages without a teacher score stay, as do all of a query whose positives have none.
        range_min, range_max: keep ranks range_min to range_max - 1 of what is left, from 0.
            The range_max of `mine_hard_negatives` counts before its other rules.
    """

    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    teacher_margin: float | None = None
    range_min: int = 0
    range_max: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not math.isfinite(value):
                raise _invalid(f"{field.name} is {value}; it must be finite, or null")
        first, end = self.range_min, self.range_max
        if first < 0 or (end is not None and end <= first):
            raise _invalid(f"range_min={first} must be 0 or more, and range_max={end} above it")
        low, high = self.min_score, self.max_score
        if low is not None and high is not None and low > high:
            raise _invalid(f"min_score={low} is above max_score={high}; lower it")

    @property
    def compare(self) -> bool:
        """Whether a rule compares with the positive's score in the run."""
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def names(self) -> list[str]:
        """The rules that are set; none keep all passages."""
        chosen = [of.name for of in fields(self) if getattr(self, of.name) != of.default]
        return [NO_SCORE, *chosen] if self.compare else chosen


def _invalid(problem: str) -> InputError:
    return InputError("invalid-setting", f"sampler.{problem}")


class Positives(NamedTuple):
    """The passages that are never candidates.

    Attributes:
        query_rows, passage_rows: the judged positives, [P] int64, sorted by both.
        queries: the judged queries, [Q] int64, ascending.
        own: the passage with the id of each of `queries`, [Q] int64, -1 for none.
        passages: passages in the corpus.
    """

    query_rows: np.ndarray
    passage_rows: np.ndarray
    queries: np.ndarray
    own: np.ndarray
    passages: int

    @classmethod
    def of(cls, qrels: Qrels, own: np.ndarray, passages: int) -> Positives:
        relevant = qrels.grades >= 1
        rows = qrels.query_rows[relevant], qrels.passage_rows[relevant]
        return cls(*rows, qrels.queries, own, passages)


def mine(
    run: Run, positives: Positives, rules: Rules, name: str, teacher: Run | None = None
) -> tuple[Run, dict[str, Any]]:
    """The candidates of a run, and how many passages each rule removed.

    A passage counts for the first rule that removes it. The counts are logged, on rank 0.

    Args:
        name: of the run, for messages.
        teacher: the run of `rules.teacher_margin`.

    Raises:
        InputError: "no-positive-scores", a margin has no positive to compare with.
    """
    counts: Counter[str] = Counter()
    keep = np.zeros(len(run.passage_rows), dtype=bool)
    edges = np.searchsorted(
        run.offsets, np.arange(LINES_AT_ONCE, len(keep), LINES_AT_ONCE)
    ).tolist()
    for first, end in pairwise(sorted({0, *edges, len(run)})):
        chunk = _Chunk(_part(run, first, end), positives, counts)
        keep[run.offsets[first] : run.offsets[end]] = chunk.kept(rules, teacher)
    if rules.compare and not counts["compared"]:
        raise InputError(
            "no-positive-scores",
            f"{name} lacks a positive of every training query, and sampler.absolute_margin and"
            " relative_margin compare with its score; write a deeper run (index.k) and raise"
            " sampler.depth, or set both to null",
        )
    kept = run.where(keep)
    trained = np.unique(positives.query_rows)
    left = np.isin(trained, kept.query_rows[kept.counts > 0]).sum()
    facts: dict[str, Any] = {
        "candidates": counts["candidates"],
        "removed": {rule: counts[rule] for rule in rules.names},
        "kept": len(kept.passage_rows),
        "queries": len(trained),
        "queries_without_candidates": len(trained) - int(left),
    }
    if rules.compare:
        facts["queries_without_positive_score"] = counts["lacking"]
    if is_main_process():
        without = facts["queries_without_candidates"] / max(len(trained), 1)
        level = logging.WARNING if without > MANY else logging.INFO
        removed = ", ".join(f"{rule} {counts[rule]:,}" for rule in rules.names) or "no rule"
        lacking = f"; {counts['lacking']:,} lack the score of a positive" if rules.compare else ""
        log.log(
            level,
            f"{name}: {facts['kept']:,} of {facts['candidates']:,} candidates left; removed by"
            f" {removed}; {facts['queries_without_candidates']:,} of {len(trained):,} training"
            f" queries have no candidate{lacking}",
        )
    return kept, facts


class _Chunk:
    """The lines of a run for some queries; `counts` is that of the whole run.

    A key is the place of a query in the chunk and a passage row, as one integer.
    """

    def __init__(self, run: Run, positives: Positives, counts: Counter[str]) -> None:
        self.run, self.counts, self.passages = run, counts, positives.passages
        self.at = np.repeat(np.arange(len(run)), run.counts)  # the place of each line's query
        self.keys = self.at * self.passages + run.passage_rows
        place = _find(run.query_rows, positives.query_rows)
        known = place >= 0
        self.place = place[known]  # of each positive's query
        self.positive_keys = self.place * self.passages + positives.passage_rows[known]
        self.found = _find(self.positive_keys, self.keys)  # the positive in a line
        trained = np.bincount(self.place, minlength=len(run)) > 0
        own = positives.own[_find(positives.queries, run.query_rows)]
        self.keep = trained[self.at] & (self.found < 0) & (run.passage_rows != own[self.at])
        counts["candidates"] += int(self.keep.sum())

    def kept(self, rules: Rules, teacher: Run | None) -> np.ndarray:
        """Which lines are candidates, [N] bool."""
        scores = self.run.scores
        if rules.compare:
            of_positives = np.full(len(self.place), np.nan, dtype=np.float32)
            held = self.found >= 0
            of_positives[self.found[held]] = scores[held]
            lacking = np.zeros(len(self.run), dtype=bool)
            lacking[self.place[np.isnan(of_positives)]] = True
            ranked = np.unique(self.place)
            self.counts["lacking"] += int(lacking.sum())
            self.counts["compared"] += len(ranked) - int(lacking.sum())
            self._remove(NO_SCORE, lacking[self.at])
            lowest = self._lowest(of_positives)
            lowest[np.isinf(lowest)] = 0  # queries whose passages are all removed already
            if rules.absolute_margin is not None:
                margin = np.float32(rules.absolute_margin)
                self._remove("absolute_margin", scores + margin > lowest[self.at])
            if rules.relative_margin is not None:
                limit = lowest - np.abs(lowest) * np.float32(rules.relative_margin)
                self._remove("relative_margin", scores > limit[self.at])
        if rules.max_score is not None:
            self._remove("max_score", scores > np.float32(rules.max_score))
        if rules.min_score is not None:
            self._remove("min_score", scores < np.float32(rules.min_score))
        if rules.teacher_margin is not None:
            assert teacher is not None  # a margin needs a teacher
            keys, taught = self._keys_and_scores(teacher)
            limit = self._lowest(_values(keys, taught, self.positive_keys))
            limit -= np.float32(rules.teacher_margin)
            self._remove("teacher_margin", _values(keys, taught, self.keys) > limit[self.at])
        before = np.concatenate(([0], np.cumsum(self.keep)))  # candidates before a line
        rank = before[:-1] - before[self.run.offsets[:-1]][self.at]
        if rules.range_max is not None:
            self._remove("range_max", rank >= rules.range_max)
        self._remove("range_min", rank < rules.range_min)
        return self.keep

    def _remove(self, rule: str, lines: np.ndarray) -> None:
        self.counts[rule] += int((self.keep & lines).sum())
        self.keep &= ~lines

    def _lowest(self, scores: np.ndarray) -> np.ndarray:
        """The lowest score of each query's positives, [Q] float32; infinity without any."""
        lowest = np.full(len(self.run), np.inf, dtype=np.float32)
        known = ~np.isnan(scores)
        np.minimum.at(lowest, self.place[known], scores[known])
        return lowest

    def _keys_and_scores(self, other: Run) -> tuple[np.ndarray, np.ndarray]:
        """Keys, ascending, and scores of another run for the queries of this chunk."""
        ends = self.run.query_rows[0], self.run.query_rows[-1] + 1
        part = _part(other, *np.searchsorted(other.query_rows, ends).tolist())
        place = np.repeat(_find(self.run.query_rows, part.query_rows), part.counts)
        keys = place * self.passages + part.passage_rows
        order = np.argsort(keys)[(place < 0).sum() :]
        return keys[order], part.scores[order]


def _part(run: Run, first: int, end: int) -> Run:
    """The queries first to end - 1 of a run, without a copy of their lines."""
    offsets = run.offsets[first : end + 1]
    lines = slice(offsets[0], offsets[-1])
    columns = run.passage_rows[lines], run.scores[lines]
    return Run(run.query_rows[first:end], offsets - offsets[0], *columns)


def _find(ordered: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The index of each wanted value in ascending, unique values; -1 where it is missing."""
    if not len(ordered):
        return np.full(len(wanted), -1)
    at = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
    return np.where(ordered[at] == wanted, at, -1)


def _values(ordered: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, float32; NaN where it is missing."""
    at = _find(ordered, wanted)
    found = np.full(len(wanted), np.nan, dtype=np.float32)
    found[at >= 0] = values[at[at >= 0]]
    return found
