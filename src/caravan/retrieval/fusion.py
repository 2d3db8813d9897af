"""Fusion of runs: by reciprocal ranks, or by weighted normalized scores.

Ranks need no calibration (Cormack et al. 2009); scores, normalized query by query, keep distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from caravan.data.runs import Run
from caravan.errors import InputError

Fusion = Callable[[Sequence[Run]], Run]
"""Makes one run of several."""


@dataclass
class ReciprocalRank:
    """The sum over runs of 1 / (k + rank), with ranks from 1.

    Args:
        k: larger values give the top ranks less weight; 60 in the literature.
        weights: one per run; None weighs all the same.
    """

    k: float = 60
    weights: Sequence[float] | None = None

    def __call__(self, runs: Sequence[Run]) -> Run:
        parts = []
        for run in runs:
            rank = np.arange(len(run.scores)) - np.repeat(run.offsets[:-1], run.counts) + 1
            parts.append(1.0 / (self.k + rank))
        return _added(runs, parts, self.weights)


@dataclass
class Weighted:
    """The weighted sum of scores, normalized for each query and run.

    Args:
        weights: one per run; None weighs all the same.
        normalise: "minmax" to 0..1, "zscore" to deviation 1, or "none". A passage that a run lacks
            gets the run's lowest score ("none": 0).
    """

    weights: Sequence[float] | None = None
    normalise: Literal["minmax", "zscore", "none"] = "minmax"

    def __call__(self, runs: Sequence[Run]) -> Run:
        parts = []
        for run in runs:
            scores = run.scores.astype(np.float64)
            starts, counts = run.offsets[:-1][run.counts > 0], run.counts[run.counts > 0]
            if len(starts):
                if self.normalise == "minmax":
                    low = np.repeat(np.minimum.reduceat(scores, starts), counts)
                    high = np.repeat(np.maximum.reduceat(scores, starts), counts)
                    scores = (scores - low) / np.where(high > low, high - low, 1.0)
                elif self.normalise == "zscore":
                    mean = np.repeat(np.add.reduceat(scores, starts) / counts, counts)
                    squares = np.add.reduceat((scores - mean) ** 2, starts) / counts
                    deviation = np.repeat(np.sqrt(squares), counts)
                    scores = (scores - mean) / np.where(deviation > 0, deviation, 1.0)
                if self.normalise != "none":
                    # A missing passage adds nothing, so the lowest score of a run must be 0.
                    scores = scores - np.repeat(np.minimum.reduceat(scores, starts), counts)
            parts.append(scores)
        return _added(runs, parts, self.weights)


def _added(
    runs: Sequence[Run], parts: Sequence[np.ndarray], weights: Sequence[float] | None
) -> Run:
    """The run of the weighted sums by (query, passage)."""
    weights = [1.0] * len(runs) if weights is None else weights
    if len(weights) != len(runs):
        raise InputError(
            "wrong-number-of-weights",
            f"fuse.weights has {len(weights)} numbers for {len(runs)} runs; give one for each",
        )
    query_rows = np.concatenate([np.repeat(run.query_rows, run.counts) for run in runs])
    passage_rows = np.concatenate([run.passage_rows for run in runs])
    scores = np.concatenate([weight * part for weight, part in zip(weights, parts, strict=True)])
    size = int(passage_rows.max(initial=0)) + 1
    pairs, inverse = np.unique(query_rows * size + passage_rows, return_inverse=True)
    total = np.zeros(len(pairs))
    np.add.at(total, inverse, scores)
    every = np.unique(np.concatenate([run.query_rows for run in runs]))
    return Run.from_flat(pairs // size, pairs % size, total, all_queries=every)
