"""Losses against references that loop, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.refusals import refused
from torch import Tensor

from caravan.training.losses import (
    BCE,
    KL,
    InfoNCE,
    Likelihood,
    MarginMSE,
    RankNet,
    Sum,
    compute,
    false_negatives,
)

SCORES = torch.tensor(
    [[2.0, 0.5, -torch.inf, 1.0], [0.3, 3.0, 0.1, -0.4], [1.0, 1.0, 1.0, 1.0]], requires_grad=True
)
POSITIVE = torch.tensor([0, 1, 2])
TEACHER = torch.tensor(
    [[4.0, 1.0, 2.0, torch.nan], [torch.nan, 5.0, 0.0, 1.0], [torch.nan] * 4], dtype=torch.float32
)
T = 0.5


def _rows(scores: Tensor, targets: Tensor) -> Iterator[tuple[list[float], Any]]:
    return zip((scores.detach().double() / T).tolist(), targets.tolist(), strict=True)


def _softmax(row: list[float]) -> list[float]:
    exps = [math.exp(x) for x in row]
    return [x / sum(exps) for x in exps]


def _known(row: list[float], teacher: list[float]) -> list[int]:
    return [i for i in range(len(row)) if math.isfinite(row[i]) and math.isfinite(teacher[i])]


def _infonce(scores: Tensor, targets: Tensor) -> float:
    return float(np.mean([-math.log(_softmax(r)[t]) for r, t in _rows(scores, targets)]))


def _likelihood(scores: Tensor, targets: Tensor) -> float:
    return float(np.mean([-row[target] for row, target in _rows(scores, targets)]))


def _bce(scores: Tensor, targets: Tensor) -> float:
    terms = []
    for row, target in _rows(scores, targets):
        for i, score in enumerate(row):
            if math.isfinite(score):
                p = 1 / (1 + math.exp(-score))
                terms.append(-math.log(p if i == target else 1 - p))
    return float(np.mean(terms))


def _ranknet(scores: Tensor, gains: Tensor) -> float:
    terms = []
    for row, gain in _rows(scores, gains):
        for i, a in enumerate(row):
            for j, b in enumerate(row):
                if math.isfinite(a) and math.isfinite(b) and gain[i] > gain[j]:
                    terms.append(math.log(1 + math.exp(b - a)))
    return float(np.mean(terms))


def _ranknet_of_labels(scores: Tensor, targets: Tensor) -> float:
    return _ranknet(scores, torch.nn.functional.one_hot(targets, scores.shape[1]).float())


def _margin_mse(scores: Tensor, teacher: Tensor) -> float:
    terms = []
    for row, wanted in _rows(scores, teacher):
        known = _known(row, wanted)
        for i in known[1:]:
            terms.append(((row[known[0]] - row[i]) - (wanted[known[0]] - wanted[i])) ** 2)
    return float(np.mean(terms))


def _kl(scores: Tensor, teacher: Tensor) -> float:
    terms = []
    for row, wanted in _rows(scores, teacher):
        known = _known(row, wanted)
        if len(known) > 1:
            q, p = _softmax([row[i] for i in known]), _softmax([wanted[i] for i in known])
            terms.append(sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True)))
    return float(np.mean(terms))


@pytest.mark.parametrize(
    ("loss", "reference", "targets"),
    [
        (InfoNCE(T), _infonce, POSITIVE),
        (Likelihood(T), _likelihood, POSITIVE),
        (BCE(temperature=T), _bce, POSITIVE),
        (RankNet(temperature=T), _ranknet_of_labels, POSITIVE),
        (RankNet(needs_teacher=True, temperature=T), _ranknet, TEACHER),
        (MarginMSE(T), _margin_mse, TEACHER),
        (KL(temperature=T), _kl, TEACHER),
    ],
    ids=["infonce", "likelihood", "bce", "ranknet", "ranknet distilled", "margin_mse", "kl"],
)
def test_a_loss_equals_its_reference_and_masked_columns_have_no_gradient(
    loss: Any, reference: Callable[[Tensor, Tensor], float], targets: Tensor
) -> None:
    found = loss(SCORES, targets)
    assert float(found) == pytest.approx(reference(SCORES, targets), abs=1e-5)
    (gradient,) = torch.autograd.grad(found, SCORES)
    assert gradient.isfinite().all()
    assert gradient[0, 2] == 0
    assert loss.needs_teacher == (targets is TEACHER)
    if targets is TEACHER:
        assert not gradient[targets.isnan()].any()


def test_a_teacher_without_scores_gives_no_loss_and_no_gradient() -> None:
    unknown = torch.full_like(TEACHER, torch.nan)
    for loss in (KL(), MarginMSE(), RankNet(needs_teacher=True)):
        found = loss(SCORES, unknown)
        assert float(found) == 0
        assert not torch.autograd.grad(found, SCORES)[0].nan_to_num(1).any()


def test_a_sum_gives_each_loss_its_own_targets_and_divides_the_scores_once() -> None:
    both = Sum([InfoNCE(1.0), KL(2.0, 1.0)], [1.0, 0.5], temperature=T)
    found = compute(both, SCORES, POSITIVE, TEACHER)
    wanted = InfoNCE(T)(SCORES, POSITIVE) + 0.5 * KL(2.0, T)(SCORES, TEACHER)
    torch.testing.assert_close(found, wanted)
    assert both.needs_teacher
    with refused("mismatched-lengths", "2 losses and 1 weights"):
        Sum([InfoNCE(), KL()], [1.0])
    with refused("misplaced-dims", "loss.losses"):
        Sum([InfoNCE(dims=[8]), KL()])


@pytest.mark.parametrize("margin", [0.0, 0.3, -0.5])
def test_a_margin_masks_columns_that_score_higher_in_the_loss_that_has_it(margin: float) -> None:
    """The loss without these columns: test_retriever. The margin is that of undivided scores."""
    positive = torch.tensor([3, 0, 2])  # with better columns, worse ones and equal ones
    above = {
        (i, j)
        for i, target in enumerate(positive.tolist())
        for j in range(4)
        if j != target and SCORES[i, j] > SCORES[i, target] + margin
    }
    alone = InfoNCE(T, false_negative_margin=margin)
    both = Sum([InfoNCE(1.0, margin), KL(1.0, 1.0)], [1.0, 0.5], temperature=T)
    for loss in (alone, both):
        masked = false_negatives(loss, SCORES, positive)
        assert masked is not None
        assert {(i, j) for i, j in masked.nonzero().tolist()} == above
    assert false_negatives(InfoNCE(T), SCORES, positive) is None
    found = compute(alone, SCORES, positive, None)
    together = compute(both, SCORES, positive, TEACHER)
    torch.testing.assert_close(together, found + 0.5 * KL(1.0, T)(SCORES, TEACHER))


def test_a_loss_without_its_teacher_is_refused() -> None:
    with refused("teacher-missing", "sampler.teacher"):
        compute(KL(), SCORES, POSITIVE, None)
