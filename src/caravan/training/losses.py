"""Losses: f(scores, targets) -> scalar, nothing else.

Scores are similarities already divided by the temperature, in float32; what must not count as a
negative is -inf in them. So a loss knows no model, no batch, no rank, and can be checked by hand.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


class InfoNCE:
    """Cross-entropy of the target among all passages of the row (RepLLaMA, section 2.1)."""

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean over queries of -log softmax(scores)[target].

        Args:
            scores: [Q, N] float32, -inf where masked.
            targets: [Q] int64, the column of each query's positive.
        """
        return functional.cross_entropy(scores, targets)
