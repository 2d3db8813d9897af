"""Two ranks, with DDP, FSDP or cached gradients, give what one process gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.commands import train
from tests.fitting import MEASURES, Fit, Fitted, KillAt, Sgd, assert_close, on_ranks
from tests.refusals import refused
from tests.tiny import tiny_backbone
from tests.two_ranks import TwoRanks
from transformers import LlamaConfig, LlamaModel

from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.training.gradcache import GradCache
from caravan.training.losses import InfoNCE

# Batches of 7, 7 and 2 queries: one rank has 4 of 7, and its mean must weigh more.
SETTINGS: dict[str, Any] = {"steps": 4, "optimizer": Sgd(), "queries_per_batch": 7}
SETTINGS["every_n_steps"] = 100  # it validates after the last update, and saves
STAGES: dict[str, dict[str, Any]] = {
    name: {"stage": name} for name in ("retriever", "reranker", "token", "adaptation")
}
STAGES["masked"] = {"loss": InfoNCE(0.05, false_negative_margin=0.01)}
STAGES["sizes"] = {"loss": InfoNCE(0.05, dims=[8, 16])}
STAGES["unpadded"] = {"backbone": tiny_backbone()}
STAGES["unpadded"]["backbone"].attention = "unpadded"


@pytest.fixture(scope="module")
def one_process(module_fit: Fit) -> dict[str, tuple[Fit, Fitted]]:
    found = {}
    for name, stage in STAGES.items():
        fit = module_fit.into(name)
        found[name] = fit, fit(**stage, **SETTINGS)
    return found


@pytest.mark.parametrize(
    ("stage", "strategy", "cached"),
    [
        ("retriever", "ddp", True),
        ("retriever", "fsdp", False),
        ("masked", "ddp", True),
        ("sizes", "ddp", True),
        ("sizes", "fsdp", False),
        ("unpadded", "fsdp", False),
        ("reranker", "ddp", False),
        ("reranker", "fsdp", True),
        ("token", "fsdp", True),
        ("adaptation", "ddp", False),
        ("adaptation", "fsdp", False),
    ],
)
def test_two_ranks_equal_one_process(
    one_process: dict[str, tuple[Fit, Fitted]],
    fit: Fit,
    two_ranks: TwoRanks,
    stage: str,
    strategy: str,
    cached: bool,
) -> None:
    cache = {"gradcache": GradCache(2)} if cached else {}
    two, _ = two_ranks(on_ranks, fit, strategy, **STAGES[stage], **SETTINGS, **cache)
    first, one = one_process[stage]
    assert {f"val/{measure}" for measure in MEASURES} < one.results.keys()
    assert two["metrics"] == pytest.approx(one.results, rel=2e-5, abs=1e-5)
    assert_close(first.state()["state_dict"], fit.state()["state_dict"])
    assert stage != "masked" or 0 < one.results["train/masked"] < 1
    lines = [(of.folder / "run.trec").read_text().splitlines()[0] for of in (first, fit)]
    assert lines[0].split()[:3] == lines[1].split()[:3]


@pytest.mark.slow
def test_adapters_with_dropout_and_cached_gradients_equal_those_of_ddp(
    fit: Fit, two_ranks: TwoRanks, saved: str
) -> None:
    settings: dict[str, Any] = {"steps": 4, "optimizer": Sgd(), "token_budget": 40}
    settings |= {"peft": LoRA(rank=2, alpha=4, dropout=0.5), "backbone": Pretrained(saved)}
    ddp, fsdp = fit.into("ddp"), fit.into("fsdp")
    plain, _ = two_ranks(on_ranks, ddp, "ddp", **settings)
    shards, _ = two_ranks(on_ranks, fsdp, "fsdp", **settings, gradcache=GradCache(1000))
    loss = plain["metrics"]["train/loss"]
    assert shards["metrics"]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(ddp.state()["state_dict"], fsdp.state()["state_dict"])
    assert len(fsdp.state()["state_dict"]) == 28  # A and B of 7 linear layers in 2 blocks


def test_a_run_resumes_under_another_strategy_and_number_of_ranks(
    fit: Fit, two_ranks: TwoRanks
) -> None:
    # With Adam: its moments count, and vectors are in a parameter group of their own.
    settings: dict[str, Any] = {"queries_per_batch": 7, "steps": 8, "every_n_steps": 4}
    whole = fit.into("whole")
    whole(**settings)
    two_ranks(on_ranks, fit, "fsdp", **settings, kill=KillAt(5))
    fit(**settings, resume=True)
    assert_close(whole.state()["state_dict"], fit.state()["state_dict"], atol=2e-4)
    assert fit.state()["global_step"] == whole.state()["global_step"] == 8


@pytest.mark.parametrize(
    "peft", [None, pytest.param(LoRA(rank=2, alpha=4, dropout=0.0), marks=pytest.mark.slow)]
)
def test_weights_stored_in_bf16_are_trained_as_float32_with_activations_recomputed(
    fit: Fit, two_ranks: TwoRanks, saved: str, peft: Any
) -> None:
    base = Path(saved)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    file = base / "model.safetensors"
    save_file({name: w.bfloat16() for name, w in load_file(file).items()}, file, {"format": "pt"})
    settings: dict[str, Any] = {"steps": 2, "optimizer": Sgd(), "peft": peft}
    whole, two = fit.into("one"), fit.into("two")
    one = whole(**settings, backbone=Pretrained(saved))
    recomputed = Pretrained(saved, checkpointing=True)
    found, _ = two_ranks(on_ranks, two, "fsdp", **settings, backbone=recomputed)
    loss = one.metrics["train/loss"]
    assert found["metrics"]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(whole.state()["state_dict"], two.state()["state_dict"])
    assert {weight.dtype for weight in two.state()["state_dict"].values()} == {torch.float32}


def test_shards_gathered_in_bf16_train_nearly_as_autocast_does(
    fit: Fit, two_ranks: TwoRanks
) -> None:
    settings: dict[str, Any] = {"steps": 3, "optimizer": Sgd(), "bf16": True}
    mixed, _ = two_ranks(on_ranks, fit.into("ddp"), "ddp", **settings)
    fit = fit.into("fsdp")
    shards, _ = two_ranks(on_ranks, fit, "fsdp", **settings)
    for step, loss in mixed["losses"].items():
        assert shards["losses"][step] == pytest.approx(loss, rel=0.05)
    assert {weight.dtype for weight in fit.state()["state_dict"].values()} == {torch.float32}


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[TwoRanks]:
    ranks = TwoRanks(4)
    yield ranks
    ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_two_replicas_of_two_shards_train_as_four_replicas_and_as_four_shards(
    fit: Fit, four_ranks: TwoRanks, cached: bool
) -> None:
    settings: dict[str, Any] = {"steps": 4, "optimizer": Sgd(), "every_n_steps": 100}
    settings |= {"gradcache": GradCache(2)} if cached else {}
    ddp = fit.into("ddp")
    whole = four_ranks(on_ranks, ddp, "ddp", **settings)
    for name, replicas in {"fsdp": 1, "hsdp": 2, "copies": 4}.items():
        shards = fit.into(name)
        ranks = four_ranks(on_ranks, shards, "fsdp", replicas=replicas, **settings)
        assert sum(rank["held"] for rank in ranks) == replicas * whole[0]["held"]
        assert ranks[0]["losses"] == pytest.approx(whole[0]["losses"], rel=1e-5)
        for metric in ("train/loss", "train/gradient_norm", "val/MRR@10"):
            expected = whole[0]["metrics"][metric]
            assert ranks[0]["metrics"][metric] == pytest.approx(expected, rel=2e-5), metric
        assert_close(ddp.state()["state_dict"], shards.state()["state_dict"])


@pytest.mark.slow
def test_a_killed_run_with_replicas_resumes_with_them_and_without(
    fit: Fit, four_ranks: TwoRanks, saved: str
) -> None:
    settings: dict[str, Any] = {"steps": 8, "every_n_steps": 4, "backbone": Pretrained(saved)}
    settings["peft"] = LoRA(rank=2, alpha=4, dropout=0.0)
    whole, last = fit.into("whole"), fit.into("last")
    four_ranks(on_ranks, whole, "fsdp", replicas=2, **settings)
    for killed in (fit, last):
        four_ranks(on_ranks, killed, "fsdp", replicas=2, **settings, kill=KillAt(5))
        assert killed.state()["global_step"] == 4
    four_ranks(on_ranks, fit, "fsdp", replicas=2, **settings, resume=True)
    last(**settings, resume=True)
    for resumed, atol in ((fit, 2e-5), (last, 2e-4)):
        assert resumed.state()["global_step"] == 8
        assert_close(whole.state()["state_dict"], resumed.state()["state_dict"], atol=atol)


@pytest.mark.slow
def test_replicas_of_unequal_size_are_refused_before_other_processes_start(
    beir: Path, tmp_path: Path
) -> None:
    with refused("uneven-replicas", "strategy.replicas", "2 ranks", "3 replicas"):
        train(
            *(beir, tmp_path / "run", "strategy=fsdp", "strategy.replicas=3"),
            "trainer.devices=2",
        )


def test_stored_weights_are_mapped_and_not_read(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(**shape, intermediate_size=2048, vocab_size=len(tokenizer))
    model = LlamaModel(config)
    megabytes = sum(p.numel() for p in model.parameters()) * 4 >> 20
    model.save_pretrained(tmp_path)
    del model
    before = _own_memory()
    backbone = Pretrained(str(tmp_path))
    backbone.dtype = "auto"
    loaded: Any = backbone.model(tokenizer)
    assert megabytes > 60
    assert _own_memory() - before < megabytes / 3
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def _own_memory() -> int:
    """MB of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) >> 10
