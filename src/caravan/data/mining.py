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
from typing import Any

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
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                raise invalid(f"{name} is {value}; it must be finite, or null")
        first, end = self.range_min, self.range_max
        if first < 0 or (end is not None and end <= first):
            raise invalid(f"range_min={first} must be 0 or more, and range_max={end} above it")
        low, high = self.min_score, self.max_score
        if low is not None and high is not None and low > high:
            raise invalid(f"min_score={low} is above max_score={high}; lower it")

    @property
    def compare(self) -> bool:
        """Whether a rule compares with the positive's score in the run."""
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def names(self) -> list[str]:
        """The rules that are set; none keep all passages."""
        chosen = [of.name for of in fields(self) if getattr(self, of.name) != of.default]
        return [NO_SCORE, *chosen] if self.compare else chosen


def invalid(problem: str) -> InputError:
    """The error of a wrong setting of the sampler."""
    return InputError("invalid-setting", f"sampler.{problem}")


def mine(
    run: Run,
    qrels: Qrels,
    own: np.ndarray,
    rules: Rules,
    name: str,
    teacher: Run | None = None,
) -> tuple[Run, dict[str, Any]]:
    """The candidates of a run, and how many passages each rule removed.

    A passage counts for the first rule that removes it. The counts are logged, on rank 0.

    Args:
        own: a passage that is never a candidate of each judged query, [Q] int64; -1 for none.
        name: of the run, for messages.
        teacher: the run of `rules.teacher_margin`.

    Raises:
        InputError: "no-positive-scores", a margin has no positive to compare with.
    """
    counts: Counter[str] = Counter()
    own = own[_find(qrels.queries, run.query_rows)]
    keep = np.zeros(len(run.passage_rows), dtype=bool)
    edges = np.searchsorted(run.offsets, np.arange(LINES_AT_ONCE, len(keep), LINES_AT_ONCE))
    for first, end in pairwise(sorted({0, *edges.tolist(), len(run)})):
        chunk = _Chunk(_part(run, first, end), qrels.relevant, own[first:end], counts)
        keep[run.offsets[first] : run.offsets[end]] = chunk.kept(rules, teacher)
    kept = run.where(keep)
    if rules.compare and not counts["compared"]:
        raise InputError(
            "no-positive-scores",
            f"{name} lacks a positive of every training query, and sampler.absolute_margin and"
            " relative_margin compare with its score; write a deeper run (index.k) and raise"
            " sampler.depth, or set both to null",
        )
    trained = qrels.relevant.queries
    without = len(trained) - int(np.isin(trained, kept.query_rows[kept.counts > 0]).sum())
    facts: dict[str, Any] = {
        "candidates": counts["candidates"],
        "removed": {rule: counts[rule] for rule in rules.names},
        "kept": len(kept.passage_rows),
        "queries": len(trained),
        "queries_without_candidates": without,
    }
    if rules.compare:
        facts["queries_without_positive_score"] = counts["lacking"]
    if is_main_process():
        level = logging.WARNING if without > MANY * len(trained) else logging.INFO
        log.log(level, "%s: %s", name, ", ".join(f"{key} {value}" for key, value in facts.items()))
    return kept, facts


class _Chunk:
    """The lines of a run for some queries; `counts` is that of the whole run.

    A key is the place of a query in the chunk and a passage row, as one integer.
    """

    def __init__(self, run: Run, positives: Qrels, own: np.ndarray, counts: Counter[str]) -> None:
        self.run, self.counts = run, counts
        self.at = np.repeat(np.arange(len(run)), run.counts)  # the place of each line's query
        self.keys = self.at << 32 | run.passage_rows
        place = _find(run.query_rows, positives.query_rows)
        known = place >= 0
        self.place = place[known]  # of each positive's query
        self.positive_keys = self.place << 32 | positives.passage_rows[known]
        trained = np.isin(np.arange(len(run)), self.place)
        self.keep = trained[self.at] & (run.passage_rows != own[self.at])
        self.keep &= _find(self.positive_keys, self.keys) < 0
        counts["candidates"] += int(self.keep.sum())

    def kept(self, rules: Rules, teacher: Run | None) -> np.ndarray:
        """Which lines are candidates, [N] bool."""
        scores = self.run.scores
        if rules.compare:
            lowest, lacking = self._of_positives(self.run)
            self.counts["lacking"] += int(lacking.sum())
            self.counts["compared"] += len(np.unique(self.place)) - int(lacking.sum())
            self._remove(NO_SCORE, lacking[self.at])
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
            limit = self._of_positives(teacher)[0] - np.float32(rules.teacher_margin)
            taught = self._scores(teacher, self.keys)
            self._remove("teacher_margin", taught > limit[self.at])
        before = np.concatenate(([0], np.cumsum(self.keep)))  # candidates before a line
        rank = before[:-1] - before[self.run.offsets[:-1]][self.at]
        if rules.range_max is not None:
            self._remove("range_max", rank >= rules.range_max)
        self._remove("range_min", rank < rules.range_min)
        return self.keep

    def _remove(self, rule: str, lines: np.ndarray) -> None:
        self.counts[rule] += int((self.keep & lines).sum())
        self.keep &= ~lines

    def _of_positives(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """The lowest score that a run gives a positive, by query, and whether it lacks one.

        Returns:
            [Q] float32, infinity without any score, and [Q] bool.
        """
        scores = self._scores(run, self.positive_keys)
        unknown = np.isnan(scores)
        lowest = np.full(len(self.run), np.inf, dtype=np.float32)
        np.minimum.at(lowest, self.place[~unknown], scores[~unknown])
        lacking = np.isin(np.arange(len(self.run)), self.place[unknown])
        return lowest, lacking

    def _scores(self, run: Run, keys: np.ndarray) -> np.ndarray:
        """The score of each key in a run, float32; NaN where it is missing."""
        ends = self.run.query_rows[0], self.run.query_rows[-1] + 1
        part = _part(run, *np.searchsorted(run.query_rows, ends).tolist())
        place = np.repeat(_find(self.run.query_rows, part.query_rows), part.counts)
        known = place >= 0
        own = place[known] << 32 | part.passage_rows[known]
        return values_of(own, part.scores[known], keys)


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


def values_of(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, float32; NaN where it is missing.

    Args:
        keys, values: [n]; the keys are unique, in any order.
    """
    order = np.argsort(keys)
    at = _find(keys[order], wanted)
    found = np.full(len(wanted), np.nan, dtype=np.float32)
    found[at >= 0] = values[order][at[at >= 0]]
    return found
