"""FSDP on two processes gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fitting import Fit, KillAt, Sgd, random_candidates, told
from tests.two_ranks import TwoRanks
from transformers import LlamaConfig, LlamaModel

from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.training.gradcache import GradCache


def _last(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return state


def _refuse_other_weights(folder: Path, other: Path) -> None:
    state, first = (_last(place)["state_dict"] for place in (folder, other))
    assert state.keys() == first.keys()
    for name, weight in first.items():
        torch.testing.assert_close(state[name], weight, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("stage", ["retriever", "reranker", "adaptation"])
def test_shards_on_two_ranks_equal_one_process(
    fit: Fit, two_ranks: TwoRanks, tmp_path: Path, stage: str
) -> None:
    settings: dict[str, Any] = {"steps": 5, "optimizer": Sgd(), "queries_per_batch": 7}
    settings["adapts"] = stage == "adaptation"
    if stage == "reranker":
        settings["candidates"] = random_candidates(fit.collection, tmp_path / "candidates.trec")
    one = fit(**settings)
    fit.folder = tmp_path / "two"
    fit.folder.mkdir()
    two, _ = two_ranks(told, fit, "fsdp", **settings)
    for name, value in one.metrics.items():
        if name != "train/tokens_per_second" and name != "train/padding":
            assert two["metrics"][name] == pytest.approx(value, abs=1e-5), name
    _refuse_other_weights(fit.folder, tmp_path)


def test_adapters_with_dropout_and_cached_gradients_equal_those_without_shards(
    fit: Fit, two_ranks: TwoRanks, tmp_path: Path, saved: str
) -> None:
    settings: dict[str, Any] = {"steps": 4, "optimizer": Sgd(), "token_budget": 40}
    settings |= {"peft": LoRA(rank=2, alpha=4, dropout=0.5), "backbone": Pretrained(saved)}
    plain, _ = two_ranks(told, fit, "ddp", **settings)
    for cache in (None, GradCache(1000)):
        fit.folder = tmp_path / f"sharded{cache is None}"
        fit.folder.mkdir()
        shards, _ = two_ranks(told, fit, "fsdp", **settings, gradcache=cache)
        assert shards["metrics"]["train/loss"] == pytest.approx(
            plain["metrics"]["train/loss"], rel=1e-5
        )
        assert len(_last(tmp_path)["state_dict"]) == 28
        _refuse_other_weights(fit.folder, tmp_path)


@pytest.mark.parametrize("sharded_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_goes_on_under_another_strategy_and_number_of_ranks(
    fit: Fit, two_ranks: TwoRanks, tmp_path: Path, sharded_first: bool
) -> None:
    # Adam's moments matter here, and vectors are in a group of their own.
    settings: dict[str, Any] = {"queries_per_batch": 7, "steps": 8}
    whole = fit(**settings)
    fit.folder = tmp_path / "changed"
    fit.folder.mkdir()
    for resume in (False, True):
        killed = None if resume else KillAt(4, "step")
        if resume != sharded_first:
            two_ranks(told, fit, "fsdp", **settings, kill=killed, resume=resume)
        else:
            fit(**settings, kill=killed, resume=resume)
    state, first = (_last(folder)["state_dict"] for folder in (fit.folder, tmp_path))
    for name, weight in first.items():
        torch.testing.assert_close(state[name], weight, atol=2e-4, rtol=1e-3, msg=name)
    assert _last(fit.folder)["global_step"] == 8
    assert whole.trainer.global_step == 8


@pytest.mark.parametrize("peft", [None, LoRA(rank=2, alpha=4, dropout=0.0)])
def test_weights_that_are_stored_in_bf16_are_shared_out_as_float32(
    fit: Fit, two_ranks: TwoRanks, tmp_path: Path, saved: str, peft: Any
) -> None:
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    file = tmp_path / "base" / "model.safetensors"
    save_file({name: w.bfloat16() for name, w in load_file(file).items()}, file, {"format": "pt"})
    settings: dict[str, Any] = {"steps": 1, "optimizer": Sgd(), "peft": peft}
    one = fit(**settings, backbone=Pretrained(saved))
    fit.folder = tmp_path / "two"
    fit.folder.mkdir()
    two, _ = two_ranks(told, fit, "fsdp", **settings, backbone=Pretrained(saved))
    assert two["metrics"]["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=1e-5)
    state, first = (_last(folder)["state_dict"] for folder in (fit.folder, tmp_path))
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    for name, weight in first.items():
        torch.testing.assert_close(state[name], weight, atol=1e-5, rtol=1e-4)


def test_stored_weights_are_mapped_and_not_read(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(**shape, intermediate_size=2048, vocab_size=len(tokenizer))
    model = LlamaModel(config)
    megabytes = sum(p.numel() for p in model.parameters()) * 4 >> 20
    model.save_pretrained(tmp_path)
    del model
    before = _own_memory()
    backbone = Pretrained(str(tmp_path))
    backbone.dtype = "auto"
    loaded: Any = backbone.model(tokenizer)
    assert megabytes > 120
    assert _own_memory() - before < megabytes / 4
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def _own_memory() -> int:
    """MB of this process that are no file's."""
    told = Path("/proc/self/status").read_text()
    return int(told.split("RssAnon:")[1].split()[0]) >> 10


@pytest.mark.parametrize(
    "peft", [None, pytest.param(LoRA(rank=2, alpha=4, dropout=0.0), marks=pytest.mark.slow)]
)
def test_activations_that_are_computed_again_change_nothing(
    fit: Fit, two_ranks: TwoRanks, tmp_path: Path, saved: str, peft: Any
) -> None:
    settings: dict[str, Any] = {"steps": 2, "optimizer": Sgd(), "peft": peft}
    one = fit(**settings, backbone=Pretrained(saved))
    fit.folder = tmp_path / "two"
    again = Pretrained(saved, checkpointing=True)
    two, _ = two_ranks(told, fit, "fsdp", **settings, backbone=again)
    assert two["metrics"]["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=1e-5)
    _refuse_other_weights(fit.folder, tmp_path)


@pytest.mark.parametrize("adapts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_shards_that_are_gathered_in_bf16_train_nearly_as_autocast_does(
    fit: Fit, two_ranks: TwoRanks, tmp_path: Path, adapts: bool
) -> None:
    settings: dict[str, Any] = {"steps": 3, "optimizer": Sgd(), "adapts": adapts, "bf16": True}
    mixed, _ = two_ranks(told, fit, "ddp", **settings)
    fit.folder = tmp_path / "sharded"
    shards, _ = two_ranks(told, fit, "fsdp", **settings)
    for step, loss in mixed["losses"].items():
        assert shards["losses"][step] == pytest.approx(loss, rel=0.05)
    assert {w.dtype for w in _last(fit.folder)["state_dict"].values()} == {torch.float32}
