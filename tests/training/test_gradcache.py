from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitting import Fit, Sgd, random_candidates, told
from tests.two_ranks import TwoRanks
from torch import Tensor

from caravan.data.batch import Chunk, pack
from caravan.models.adapters import LoRA
from caravan.training import gradcache as module
from caravan.training.gradcache import GradCache

WHOLE = 1000
"""More texts than any chunk has: each chunk of the batch is a piece."""


def _close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=tolerance, rtol=1e-4, msg=name)


def _settings(fit: Fit, stage: str, folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"steps": 3, "optimizer": Sgd(), "queries_per_batch": 7}
    if stage == "reranker":
        settings["candidates"] = random_candidates(fit.collection, folder / "candidates.trec")
    return settings


@pytest.mark.parametrize("stage", ["retriever", "reranker"])
@pytest.mark.parametrize("chunk", [1, 2, WHOLE])
def test_cached_gradients_are_those_of_the_whole_batch(
    fit: Fit, tmp_path: Path, stage: str, chunk: int
) -> None:
    settings = _settings(fit, stage, tmp_path)
    whole = fit(**settings)
    cached = fit(**settings, gradcache=GradCache(chunk))
    _close(whole.weights, cached.weights)
    for name in ("train/loss", "train/accuracy", "train/gradient_norm", "train/negatives"):
        assert cached.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-4)
    assert cached.losses == pytest.approx(whole.losses, rel=1e-4)


def test_cached_gradients_are_those_of_the_whole_batch_with_dropout_and_adapters(fit: Fit) -> None:
    settings: dict[str, Any] = {"steps": 3, "optimizer": Sgd(), "token_budget": 40}
    settings["peft"] = LoRA(rank=2, alpha=4, dropout=0.5)
    _close(fit(**settings).weights, fit(**settings, gradcache=GradCache(WHOLE)).weights)


def test_without_the_random_state_dropout_would_differ(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 1, "optimizer": Sgd(), "token_budget": 40}
    settings["peft"] = LoRA(rank=2, alpha=4, dropout=0.5)
    whole = fit(**settings)
    monkeypatch.setattr(module, "_set_random_state", lambda state, device: None)
    with pytest.raises(AssertionError):
        _close(whole.weights, fit(**settings, gradcache=GradCache(WHOLE)).weights)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_cached_gradients_accumulate(fit: Fit, accumulate: int) -> None:
    settings: dict[str, Any] = {
        "steps": 3,
        "optimizer": Sgd(),
        "accumulate": accumulate,
        "queries_per_batch": 3,  # 6 batches an epoch
    }
    _close(fit(**settings).weights, fit(**settings, gradcache=GradCache(2)).weights)


def test_cached_gradients_pass_through_the_weights_copies_in_bf16(fit: Fit) -> None:
    settings: dict[str, Any] = {"steps": 2, "optimizer": Sgd(), "precision": "bf16-mixed"}
    settings["gradient_clip_val"] = None
    whole, cached = fit(**settings), fit(**settings, gradcache=GradCache(2))
    start = fit(**{**settings, "steps": 1, "limit_train_batches": 0}).weights
    for name, weight in whole.weights.items():
        moved, other = weight - start[name], cached.weights[name] - start[name]
        assert (moved - other).norm() <= 0.03 * moved.norm() + 1e-6, name


@pytest.mark.parametrize("stage", ["retriever", "reranker"])
def test_cached_gradients_on_two_ranks_equal_the_whole_batch_on_one(
    fit: Fit, two_ranks: TwoRanks, tmp_path: Path, stage: str
) -> None:
    settings = _settings(fit, stage, tmp_path)
    one = fit(**settings)
    fit.folder = tmp_path / "two"
    two, _ = two_ranks(told, fit, "ddp", **settings, gradcache=GradCache(2))
    for name in ("train/loss", "train/accuracy", "train/negatives"):
        assert two["metrics"][name] == pytest.approx(one.metrics[name], abs=1e-5)
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path, fit.folder)
    ]
    _close(*states, tolerance=2e-5)


def test_no_more_than_one_piece_has_a_graph_at_a_time() -> None:
    weight = torch.ones(1, requires_grad=True)
    alive: list[int] = []

    class Traced(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, rows: Tensor) -> Tensor:
            if context.needs_input_grad[0]:
                alive.append(1)
            return rows.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            alive.append(-1)
            return gradient

    def compute(chunk: Chunk) -> Tensor:
        rows: Tensor = chunk.input_ids.float().sum(dim=1, keepdim=True) * weight
        return Traced.apply(rows) if torch.is_grad_enabled() else rows

    texts = pack([[i] * (1 + i % 4) for i in range(40)], 8)
    loss = GradCache(3)(compute, [texts], lambda rows: (rows**2).sum())
    counts = torch.tensor(alive).cumsum(0)
    assert len(alive) > 20
    assert counts.max() == 1
    loss.backward()
    expected = sum(2 * (i * (1 + i % 4)) ** 2 for i in range(40))
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(expected / 2)
