"""Cached gradients are those of the whole batch; on two ranks, see test_fsdp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.fitting import Fit, Sgd, assert_close
from tests.tiny import tiny_backbone
from torch import Tensor

from caravan.data.batch import Chunk, pack
from caravan.models.adapters import LoRA
from caravan.training import gradcache
from caravan.training.gradcache import GradCache
from caravan.training.losses import InfoNCE
from caravan.training.retriever import Retriever

WHOLE = 1000
"""More texts than any chunk has: the chunks of the batch stay as they are."""
SETTINGS: dict[str, Any] = {"steps": 3, "optimizer": Sgd(), "every_n_steps": 100}
DROPOUT: dict[str, Any] = {"steps": 1, "optimizer": Sgd(), "token_budget": 40}
DROPOUT["peft"] = LoRA(rank=2, alpha=4, dropout=0.5)


STAGES: dict[str, dict[str, Any]] = {
    name: {"stage": name} for name in ("retriever", "reranker", "token")
}
STAGES["masked"] = {"loss": InfoNCE(0.05, false_negative_margin=0.01, dims=[8, 16])}


@pytest.mark.parametrize(
    ("stage", "chunk"), [("retriever", 1), ("reranker", 2), ("token", 1), ("masked", 2)]
)
def test_cached_gradients_are_those_of_the_whole_batch(fit: Fit, stage: str, chunk: int) -> None:
    settings = {**SETTINGS, **STAGES[stage], "queries_per_batch": 7}
    whole, cached = fit(**settings), fit(**settings, gradcache=GradCache(chunk))
    assert_close(whole.weights, cached.weights)
    assert cached.results == pytest.approx(whole.results, rel=1e-4)
    assert cached.losses == pytest.approx(whole.losses, rel=1e-4)
    assert stage != "masked" or 0 < whole.results["train/masked"] < 1


@pytest.mark.parametrize("chunk", [None, 3])
def test_queries_and_passages_in_one_chunk_train_as_in_separate_chunks(
    fit: Fit, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In-batch negatives, attention without padding."""
    settings = {**SETTINGS, "queries_per_batch": 7, "token_budget": 256}
    settings["gradcache"] = None if chunk is None else GradCache(chunk)
    backbone = tiny_backbone()
    backbone.attention = "unpadded"
    together = fit(**settings, backbone=backbone)
    monkeypatch.setattr(Retriever, "pads", True)
    apart = fit(**settings, backbone=backbone)
    assert together.metrics["train/padding"] == 0 < apart.metrics["train/padding"]
    assert together.losses == pytest.approx(apart.losses, rel=1e-6)
    assert_close(apart.weights, together.weights, atol=1e-6)


@pytest.mark.slow
def test_dropout_is_the_same_in_both_passes(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fit(**DROPOUT).weights
    assert_close(expected, fit(**DROPOUT, gradcache=GradCache(WHOLE)).weights)
    monkeypatch.setattr(gradcache, "_set_random_state", lambda state, device: None)
    with pytest.raises(AssertionError):
        assert_close(expected, fit(**DROPOUT, gradcache=GradCache(WHOLE)).weights)


def test_cached_gradients_accumulate(fit: Fit) -> None:
    settings = {**SETTINGS, "accumulate": 3, "queries_per_batch": 3}  # 6 batches an epoch
    assert_close(fit(**settings).weights, fit(**settings, gradcache=GradCache(2)).weights)


def test_cached_gradients_reach_the_weights_through_their_copies_in_bf16(fit: Fit) -> None:
    settings: dict[str, Any] = {**SETTINGS, "steps": 2, "precision": "bf16-mixed"}
    settings["gradient_clip_val"] = None
    expected, cached = fit(**settings), fit(**settings, gradcache=GradCache(2))
    start = fit(**{**settings, "steps": 1}, limit_train_batches=0).weights
    for name, weight in expected.weights.items():
        moved, other = weight - start[name], cached.weights[name] - start[name]
        assert (moved - other).norm() <= 0.03 * moved.norm() + 1e-6, name


def test_only_one_chunk_has_a_graph_at_a_time() -> None:
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
    loss = GradCache(3)(compute, texts, lambda rows: (rows**2).sum())
    assert len(alive) > 20
    assert torch.tensor(alive).cumsum(0).max() == 1
    loss.backward()
    expected = sum(2 * (i * (1 + i % 4)) ** 2 for i in range(40))
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(expected / 2)
