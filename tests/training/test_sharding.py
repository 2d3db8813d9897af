"""FSDP on two processes gives what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitting import Fit, KillAt, Sgd, on_two_ranks, random_candidates

from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.training.gradcache import GradCache


def _last(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return state


@pytest.mark.parametrize("stage", ["retriever", "reranker", "adaptation"])
def test_shards_on_two_ranks_equal_one_process(fit: Fit, tmp_path: Path, stage: str) -> None:
    settings: dict[str, Any] = {"steps": 5, "optimizer": Sgd(), "queries_per_batch": 7}
    settings["adapts"] = stage == "adaptation"
    if stage == "reranker":
        settings["candidates"] = random_candidates(fit.collection, tmp_path / "candidates.trec")
    one = fit(**settings)
    fit.folder = tmp_path / "two"
    fit.folder.mkdir()
    two = on_two_ranks(fit, **settings)
    for name, value in one.metrics.items():
        if name != "train/tokens_per_second" and name != "train/padding":
            assert two["metrics"][name] == pytest.approx(value, abs=1e-5), name
    state, first = _last(fit.folder)["state_dict"], _last(tmp_path)["state_dict"]
    assert state.keys() == first.keys()
    for name, weight in first.items():
        torch.testing.assert_close(state[name], weight, atol=2e-5, rtol=1e-4, msg=name)


def test_adapters_with_dropout_and_cached_gradients_equal_those_without_shards(
    fit: Fit, tmp_path: Path, saved: str
) -> None:
    settings: dict[str, Any] = {"steps": 4, "optimizer": Sgd(), "token_budget": 40}
    settings |= {"peft": LoRA(rank=2, alpha=4, dropout=0.5), "backbone": Pretrained(saved)}
    plain = fit(**settings, devices=2, strategy="ddp_spawn")
    for cache in (None, GradCache(1000)):
        fit.folder = tmp_path / f"sharded{cache is None}"
        fit.folder.mkdir()
        shards = on_two_ranks(fit, **settings, gradcache=cache)
        assert shards["metrics"]["train/loss"] == pytest.approx(
            plain.metrics["train/loss"], rel=1e-5
        )
        state, first = (_last(folder)["state_dict"] for folder in (fit.folder, tmp_path))
        assert len(first) == 28
        assert state.keys() == first.keys()
        for name, weight in first.items():
            torch.testing.assert_close(state[name], weight, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_run_goes_on_under_another_strategy_and_number_of_ranks(
    fit: Fit, tmp_path: Path, sharded_first: bool
) -> None:
    # Adam's moments matter here, and vectors are in a group of their own.
    settings: dict[str, Any] = {"queries_per_batch": 7, "steps": 8}
    whole = fit(**settings)
    fit.folder = tmp_path / "changed"
    fit.folder.mkdir()
    for resume in (False, True):
        killed = None if resume else KillAt(4, "step")
        if resume != sharded_first:
            on_two_ranks(fit, **settings, kill=killed, resume=resume)
        else:
            fit(**settings, kill=killed, resume=resume)
    state, first = (_last(folder)["state_dict"] for folder in (fit.folder, tmp_path))
    for name, weight in first.items():
        torch.testing.assert_close(state[name], weight, atol=2e-4, rtol=1e-3, msg=name)
    assert _last(fit.folder)["global_step"] == 8
    assert whole.trainer.global_step == 8
