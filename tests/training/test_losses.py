"""Losses against references that loop, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from caravan.errors import InputError
from caravan.training.losses import (
    BCE,
    KL,
    InfoNCE,
    Likelihood,
    MarginMSE,
    RankNet,
    Sum,
    value,
)

SCORES = torch.tensor(
    [[2.0, 0.5, -torch.inf, 1.0], [0.3, 3.0, 0.1, -0.4], [1.0, 1.0, 1.0, 1.0]], requires_grad=True
)
POSITIVE = torch.tensor([0, 1, 2])
TEACHER = torch.tensor(
    [[4.0, 1.0, 2.0, torch.nan], [torch.nan, 5.0, 0.0, 1.0], [torch.nan] * 4], dtype=torch.float32
)


def _rows(*tensors: Tensor) -> list[tuple[list[float], ...]]:
    return list(zip(*(tensor.detach().double().tolist() for tensor in tensors), strict=True))


def _softmax(row: list[float]) -> list[float]:
    exps = [math.exp(x) for x in row]
    return [x / sum(exps) for x in exps]


def _infonce(scores: Tensor, targets: Tensor) -> float:
    rows = scores.detach().double().tolist()
    return float(
        np.mean([-math.log(_softmax(r)[t]) for r, t in zip(rows, targets.tolist(), strict=True)])
    )


def _bce(scores: Tensor, targets: Tensor) -> float:
    terms = []
    for row, target in zip(scores.detach().double().tolist(), targets.tolist(), strict=True):
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


def _margin_mse(scores: Tensor, teacher: Tensor) -> float:
    terms = []
    for row, told in _rows(scores, teacher):
        known = [i for i in range(len(row)) if math.isfinite(row[i]) and math.isfinite(told[i])]
        for i in known[1:]:
            terms.append(((row[known[0]] - row[i]) - (told[known[0]] - told[i])) ** 2)
    return float(np.mean(terms))


def _kl(scores: Tensor, teacher: Tensor) -> float:
    terms = []
    for row, told in _rows(scores, teacher):
        known = [i for i in range(len(row)) if math.isfinite(row[i]) and math.isfinite(told[i])]
        if len(known) > 1:
            q, p = _softmax([row[i] for i in known]), _softmax([told[i] for i in known])
            terms.append(sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True)))
    return float(np.mean(terms))


def _label_ranknet(scores: Tensor, targets: Tensor) -> float:
    return _ranknet(scores, torch.nn.functional.one_hot(targets, scores.shape[1]).float())


@pytest.mark.parametrize(
    ("loss", "reference", "targets"),
    [
        (InfoNCE(), _infonce, POSITIVE),
        (BCE(), _bce, torch.tensor([0, 1, 2])),
        (RankNet(), _label_ranknet, POSITIVE),
        (RankNet(distils=True), _ranknet, TEACHER),
        (MarginMSE(), _margin_mse, TEACHER),
        (KL(), _kl, TEACHER),
    ],
    ids=["infonce", "bce", "ranknet", "ranknet distilled", "margin_mse", "kl"],
)
def test_a_loss_equals_its_reference_and_masked_columns_play_no_part(
    loss: Any, reference: Callable[[Tensor, Tensor], float], targets: Tensor
) -> None:
    found = loss(SCORES, targets)
    assert float(found) == pytest.approx(reference(SCORES, targets), abs=1e-5)
    (gradient,) = torch.autograd.grad(found, SCORES)
    assert gradient.isfinite().all()
    assert gradient[0, 2] == 0
    if targets is TEACHER:
        assert not gradient[targets.isnan()].any()


def test_a_teacher_that_knows_nothing_gives_no_loss_and_no_gradient() -> None:
    unknown = torch.full_like(TEACHER, torch.nan)
    for loss in (KL(), MarginMSE(), RankNet(distils=True)):
        found = loss(SCORES, unknown)
        assert float(found) == 0
        assert not torch.autograd.grad(found, SCORES)[0].nan_to_num(1).any()


def test_a_sum_gives_each_loss_its_own_targets() -> None:
    both = Sum([InfoNCE(), KL(teacher_temperature=2.0)], [1.0, 0.5])
    found = value(both, SCORES, POSITIVE, TEACHER)
    wanted = InfoNCE()(SCORES, POSITIVE) + 0.5 * KL(2.0)(SCORES, TEACHER)
    torch.testing.assert_close(found, wanted)
    assert both.distils
    with pytest.raises(InputError, match="2 losses and 1 weights"):
        Sum([InfoNCE(), KL()], [1.0])


def test_a_loss_that_distils_without_a_teacher_is_refused() -> None:
    with pytest.raises(InputError, match=r"KL learns from a teacher.*sampler\.teacher"):
        value(KL(), SCORES, POSITIVE, None)


def test_a_likelihood_is_the_positives_score_whatever_the_negatives() -> None:
    scores = torch.tensor([[-2.0, -torch.inf], [-1.0, -0.5]], requires_grad=True)
    loss = Likelihood()(scores, torch.tensor([0, 1]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx((2.0 + 0.5) / 2)
    assert scores.grad is not None
    assert scores.grad.tolist() == [[-0.5, 0.0], [0.0, -0.5]]
