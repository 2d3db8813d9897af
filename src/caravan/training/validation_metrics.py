"""The mean of per-query figures as a torchmetrics Metric: sums, added up over ranks.

Each rank gives the figures of the queries that it has searched; `compute` is the mean over all
queries of all ranks, one value everywhere. What is added up is sums and counts and not means, so
that ranks may have different numbers of queries, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric


class MeanMeasures(Metric):
    """Mean over queries of each measure.

    Args:
        measures: Their names, such as "MRR@10".
    """

    full_state_update = False
    total: Tensor  # [M] float64
    queries: Tensor  # [] float64

    def __init__(self, measures: Sequence[str]) -> None:
        super().__init__()
        self.measures = list(measures)
        zeros = torch.zeros(len(self.measures), dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, figures: Mapping[str, np.ndarray]) -> None:
        """Add queries' figures: {measure: values [Q]}, as `metrics.per_query` gives them."""
        values = torch.as_tensor(
            np.stack([figures[name] for name in self.measures]), device=self.device
        )
        self.total += values.double().sum(dim=1)
        self.queries += values.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """{measure: mean over the queries of all ranks}, 0 where there was none."""
        means = self.total / self.queries.clamp(min=1)
        return dict(zip(self.measures, means.float(), strict=True))
