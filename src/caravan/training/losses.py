"""Losses: f(scores, targets) -> scalar, nothing else.

Scores [Q, N] are float32, a row for each query, -inf where a column must not count. Targets are the
positive's column [Q] int64 or, for a loss that distils, the scores [Q, N] of a teacher (a run),
NaN where it has none. So a loss knows no model, no batch and no rank, serves retriever and reranker
alike, and can be checked by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from caravan.errors import InputError


class InfoNCE:
    """Cross-entropy of the positive among all columns: -log softmax(scores)[target].

    Over a batch's passages it is RepLLaMA's loss (arXiv 2310.08319, section 2.1), over the query's
    own group RankLLaMA's listwise softmax (section 2.2).
    """

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(scores, targets)


class Likelihood:
    """The positive's score itself, where the score is a log probability: -scores[target].

    Negatives play no part, so `sampler.number` may be 0 (UPR's language model, arXiv 2204.07496).
    """

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        return -scores.gather(1, targets.unsqueeze(1)).mean()


class BCE:
    """Each column by itself, relevant or not: mean of the binary cross-entropy.

    With one positive to many negatives the positive is the rare class; `positive_weight` evens
    that out.
    """

    def __init__(self, positive_weight: float = 1.0) -> None:
        self.positive_weight = positive_weight

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        real = scores.isfinite()
        labels = torch.zeros_like(scores).scatter(1, targets.unsqueeze(1), 1.0)
        terms = functional.binary_cross_entropy_with_logits(
            scores.masked_fill(~real, 0.0),
            labels,
            weight=real.float(),
            pos_weight=scores.new_tensor(self.positive_weight),
            reduction="sum",
        )
        return terms / real.sum()


class RankNet:
    """Every pair of a better and a worse column: log(1 + exp(worse - better)) (Burges 2005).

    Args:
        distils: order the columns by a teacher instead of by which one is the positive.
    """

    def __init__(self, distils: bool = False) -> None:
        self.distils = distils

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        real = scores.isfinite()
        if self.distils:
            real = real & targets.isfinite()
            gains = targets
        else:
            gains = torch.zeros_like(scores).scatter(1, targets.unsqueeze(1), 1.0)
        better = gains.unsqueeze(2) > gains.unsqueeze(1)  # [Q, N, N], False for NaN
        pairs = better & real.unsqueeze(2) & real.unsqueeze(1)
        safe = scores.masked_fill(~real, 0.0)
        terms = functional.softplus(safe.unsqueeze(1) - safe.unsqueeze(2))
        return (terms * pairs).sum() / pairs.sum().clamp(min=1)


class MarginMSE:
    """The positive's lead over each negative should be the teacher's (arXiv 2010.02666).

    The positive is the teacher's first known column, where a group has it.
    """

    distils = True

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        known = targets.isfinite() & scores.isfinite()
        first = known.int().argmax(dim=1, keepdim=True)
        margins = scores.gather(1, first) - scores.masked_fill(~known, 0.0)
        wanted = targets.gather(1, first) - targets.masked_fill(~known, 0.0)
        pairs = known.scatter(1, first, False)
        squares = (margins - wanted).masked_fill(~pairs, 0.0).square()
        return squares.sum() / pairs.sum().clamp(min=1)


class KL:
    """Kullback-Leibler divergence from the teacher's softmax to the student's, over known columns.

    Args:
        teacher_temperature: the teacher's scores are divided by it; above 1 softens them.
    """

    distils = True

    def __init__(self, teacher_temperature: float = 1.0) -> None:
        self.teacher_temperature = teacher_temperature

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        known = targets.isfinite() & scores.isfinite()
        # A query with fewer than two known columns has nothing to compare.
        rows = known.sum(dim=1) > 1
        if not rows.any():
            return scores.masked_fill(~known, 0.0).sum() * 0.0
        known, scores, targets = known[rows], scores[rows], targets[rows]
        hidden = torch.finfo(scores.dtype).min
        student = scores.masked_fill(~known, hidden).log_softmax(dim=1)
        teacher = (targets / self.teacher_temperature).masked_fill(~known, hidden)
        teacher = teacher.log_softmax(dim=1)
        terms = (teacher.exp() * (teacher - student)).masked_fill(~known, 0.0)
        return terms.sum(dim=1).mean()


class Sum:
    """A weighted sum of losses, each with the targets that it learns from."""

    def __init__(self, losses: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        self.losses = list(losses)
        self.weights = [1.0] * len(self.losses) if weights is None else list(weights)
        if not self.losses or len(self.losses) != len(self.weights):
            raise InputError(
                f"loss: {len(self.losses)} losses and {len(self.weights)} weights; give as many"
            )

    @property
    def distils(self) -> bool:
        return any(getattr(loss, "distils", False) for loss in self.losses)


def value(
    loss: Callable[[Tensor, Tensor], Tensor] | Sum,
    scores: Tensor,
    positive: Tensor,
    teacher: Tensor | None,
) -> Tensor:
    """The value of a loss, given the targets of its kind.

    Args:
        scores: [Q, N] float32. positive: [Q] int64. teacher: [Q, N] float32, or None.

    Raises:
        InputError: the loss distils, and there is no teacher.
    """
    if isinstance(loss, Sum):
        parts = zip(loss.losses, loss.weights, strict=True)
        total = torch.zeros((), device=scores.device)
        for part, weight in parts:
            total = total + weight * value(part, scores, positive, teacher)
        return total
    if not getattr(loss, "distils", False):
        return loss(scores, positive)
    if teacher is None:
        raise InputError(
            f"loss {type(loss).__name__} learns from a teacher's scores: give a run with them as"
            " sampler.teacher"
        )
    return loss(scores, teacher)
