"""Losses: functions of a score matrix and its targets, which know no model, batch or rank.

`Loss` describes the interface and has an example of an own loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from pydantic import AfterValidator, AllowInfNan, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional

from caravan.errors import InputError

Temperature = Annotated[PositiveFloat, AllowInfNan(False)]
Margin = Annotated[float, AllowInfNan(False)]


def _increasing(dims: list[int]) -> list[int]:
    if not dims or dims != sorted(set(dims)):
        raise ValueError("must list increasing sizes, such as [64, 128, 256]")
    return dims


Dims = Annotated[list[PositiveInt], AfterValidator(_increasing)]


class Loss(Protocol):
    """A loss of the scores of each query: `loss(scores, targets)` returns a scalar.

    - scores: [Q, N] float32, -inf where a column does not count. For a retriever N is all passages
      of the batch (or the query's own group), for a reranker the query's own group.
    - targets: the positive's column, [Q] int64. If `needs_teacher`, the scores of a teacher
      (`sampler.teacher`), [Q, N] float32, NaN where it has none.

    A loss divides the scores by its own temperature, if it has one, and returns the mean over
    queries (or over what it compares).

    Subclass it, and select the class by `loss._target_`:

    >>> class Hinge(Loss):
    ...     def __init__(self, margin: float = 0.1, temperature: float = 1.0) -> None:
    ...         self.margin, self.temperature = margin, temperature
    ...
    ...     def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
    ...         scores = scores / self.temperature
    ...         positive = scores.gather(1, targets.unsqueeze(1))  # [Q, 1]
    ...         excess = (scores - positive + self.margin).clamp(min=0)  # [Q, N], 0 for -inf
    ...         return excess.scatter(1, targets.unsqueeze(1), 0.0).sum(dim=1).mean()
    >>> scores = torch.tensor([[0.9, 0.2, 0.85], [0.1, 0.4, -torch.inf]])
    >>> round(Hinge()(scores, torch.tensor([0, 1])).item(), 4)
    0.025
    """

    needs_teacher: bool = False
    false_negative_margin: float | None = None
    """If set, `compute` masks columns that score above the positive plus this."""
    dims: Sequence[int] | None = None
    """If set, a retriever sums the loss over embeddings truncated to these sizes and full ones."""

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor: ...


@dataclass
class InfoNCE(Loss):
    """Cross-entropy of the positive among all columns: -log softmax(scores / temperature)[target].

    Over a batch's passages it is RepLLaMA's loss (arXiv 2310.08319, section 2.1), over the query's
    own group, with temperature 1, RankLLaMA's listwise softmax (section 2.2).

    Args:
        false_negative_margin: leave out columns that score above the positive plus this, as
            Qwen3-Embedding does with 0.1 (arXiv 2506.05176, section 3); None keeps all. It is in
            the unit of the scores before the temperature. `compute` applies it.

    >>> scores, targets = torch.tensor([[0.9, 0.8], [0.1, 0.2]]), torch.tensor([0, 1])
    >>> round(InfoNCE(temperature=0.1)(scores, targets).item(), 4)
    0.3133
    """

    temperature: Temperature = 0.01
    false_negative_margin: Margin | None = None
    dims: Dims | None = None

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(scores / self.temperature, targets)


@dataclass
class Likelihood(Loss):
    """The negative score of the positive, where scores are log probabilities: -scores[target].

    Negatives play no part, so `sampler.number` may be 0 (UPR's language model, arXiv 2204.07496).
    """

    temperature: Temperature = 1.0

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        return -(scores / self.temperature).gather(1, targets.unsqueeze(1)).mean()


@dataclass
class BCE(Loss):
    """Binary cross-entropy of each column by itself, relevant or not; the mean over all columns.

    Args:
        positive_weight: of a positive's term; above 1 it balances one positive and many negatives.
    """

    positive_weight: float = 1.0
    temperature: Temperature = 0.01
    dims: Dims | None = None

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        scores = scores / self.temperature
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


@dataclass
class RankNet(Loss):
    """Logistic loss of each pair of a better and a worse column: log(1 + exp(worse - better)).

    Burges et al. 2005, "Learning to Rank using Gradient Descent".

    Args:
        needs_teacher: order the columns by the teacher's scores, not positive before negative.
    """

    needs_teacher: bool = False
    temperature: Temperature = 0.01
    dims: Dims | None = None

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        scores = scores / self.temperature
        real = scores.isfinite()
        if self.needs_teacher:
            real = real & targets.isfinite()
            gains = targets
        else:
            gains = torch.zeros_like(scores).scatter(1, targets.unsqueeze(1), 1.0)
        better = gains.unsqueeze(2) > gains.unsqueeze(1)  # [Q, N, N], False for NaN
        pairs = better & real.unsqueeze(2) & real.unsqueeze(1)
        safe = scores.masked_fill(~real, 0.0)
        terms = functional.softplus(safe.unsqueeze(1) - safe.unsqueeze(2))
        return (terms * pairs).sum() / pairs.sum().clamp(min=1)


@dataclass
class MarginMSE(Loss):
    """Squared error between student's and teacher's margins of positive over negative.

    Hofstätter et al. 2020 (arXiv 2010.02666). The positive is the first column that the teacher has
    scored.
    """

    needs_teacher = True
    temperature: Temperature = 0.01
    dims: Dims | None = None

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        scores = scores / self.temperature
        known = targets.isfinite() & scores.isfinite()
        first = known.int().argmax(dim=1, keepdim=True)
        margins = scores.gather(1, first) - scores.masked_fill(~known, 0.0)
        wanted = targets.gather(1, first) - targets.masked_fill(~known, 0.0)
        pairs = known.scatter(1, first, False)
        squares = (margins - wanted).masked_fill(~pairs, 0.0).square()
        return squares.sum() / pairs.sum().clamp(min=1)


@dataclass
class KL(Loss):
    """Kullback-Leibler divergence of the student's softmax from the teacher's, over known columns.

    Args:
        teacher_temperature: divides the teacher's scores; above 1 softens them.
    """

    needs_teacher = True
    teacher_temperature: Temperature = 1.0
    temperature: Temperature = 0.01
    dims: Dims | None = None

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        scores = scores / self.temperature
        known = targets.isfinite() & scores.isfinite()
        known &= known.sum(dim=1, keepdim=True) > 1  # one column alone compares with nothing
        hidden = torch.finfo(scores.dtype).min
        student = scores.masked_fill(~known, hidden).log_softmax(dim=1)
        teacher = (targets / self.teacher_temperature).masked_fill(~known, hidden)
        teacher = teacher.log_softmax(dim=1)
        terms = (teacher.exp() * (teacher - student)).masked_fill(~known, 0.0)
        return terms.sum() / known.any(dim=1).sum().clamp(min=1)


class Sum:
    """A weighted sum of losses, each with its own kind of targets (see `compute`).

    Args:
        losses: with a temperature of 1, since the sum divides the scores by its own. They have
            the sum's `dims`.
        weights: one for each loss; None is 1 for all.
    """

    def __init__(
        self,
        losses: Sequence[Loss | Sum],
        weights: Sequence[float] | None = None,
        temperature: Temperature = 0.01,
        dims: Dims | None = None,
    ) -> None:
        self.losses = list(losses)
        self.weights = [1.0] * len(self.losses) if weights is None else list(weights)
        self.temperature, self.dims = temperature, dims
        if any(loss.dims is not None for loss in self.losses):
            raise InputError(
                "misplaced-dims", "loss.losses: a part has dims; set loss.dims instead"
            )
        if not self.losses or len(self.losses) != len(self.weights):
            raise InputError(
                "mismatched-lengths",
                f"loss: {len(self.losses)} losses and {len(self.weights)} weights; give each loss"
                " a weight",
            )

    @property
    def needs_teacher(self) -> bool:
        return any(loss.needs_teacher for loss in self.losses)


def false_negatives(loss: Loss | Sum, scores: Tensor, positive: Tensor) -> Tensor | None:
    """Columns that `loss`, or a part of it, masks by `false_negative_margin`, [Q, N] bool.

    None without a margin. Arguments as for `compute`.
    """
    if isinstance(loss, Sum):
        parts = [false_negatives(part, scores, positive) for part in loss.losses]
        masks = [mask for mask in parts if mask is not None]
        return torch.stack(masks).any(dim=0) if masks else None
    if loss.false_negative_margin is None:
        return None
    columns = positive.unsqueeze(1)
    above = scores > scores.gather(1, columns) + loss.false_negative_margin
    return above.scatter(1, columns, False)  # a margin below 0 must not mask the positive


def compute(
    loss: Loss | Sum,
    scores: Tensor,
    positive: Tensor,
    teacher: Tensor | None,
    divisor: float = 1.0,
) -> Tensor:
    """The value of a loss, given the targets of its kind.

    Args:
        scores: [Q, N] float32. positive: [Q] int64. teacher: [Q, N] float32, or None.
        divisor: the temperature of the sum that a loss is part of.

    Raises:
        InputError: The loss needs a teacher, and there is none.
    """
    if isinstance(loss, Sum):
        total, divisor = scores.new_zeros(()), divisor * loss.temperature
        for part, weight in zip(loss.losses, loss.weights, strict=True):
            total = total + weight * compute(part, scores, positive, teacher, divisor)
        return total
    masked = false_negatives(loss, scores, positive)
    scores = scores / divisor
    if masked is not None:
        scores = scores.masked_fill(masked, -torch.inf)
    if not loss.needs_teacher:
        return loss(scores, positive)
    if teacher is None:
        raise InputError(
            "teacher-missing",
            f"loss {type(loss).__name__} learns from a teacher's scores; give a run of them as"
            " sampler.teacher, or a sampler with teacher_scores",
        )
    return loss(scores, teacher)
