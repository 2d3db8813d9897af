"""The estimate of memory: against counted allocations, and a refusal before anything loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from tests.refusals import refused
from tests.training import allocations

from caravan.models.adapters import LoRA
from caravan.models.loading import set_attention
from caravan.models.preparing import prepared
from caravan.training.memory import Block, Step, in_words, need, refuse_too_large, refuse_validation

NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SMALL = dict(zip((*NAMES, "intermediate_size"), (1024, 2, 16, 8, 2816), strict=True))
WIDE = dict(zip((*NAMES, "intermediate_size"), (2048, 2, 32, 8, 8192), strict=True))
SEVEN_B = dict(zip((*NAMES, "intermediate_size"), (4096, 32, 32, 32, 11_008), strict=True))
BERT = {"attention_probs_dropout_prob": 0.0}  # a GPU's kernel keeps no probabilities
BLOCKS = SEVEN_B | {"num_hidden_layers": 2}
THREE = {"num_hidden_layers": 3}  # with one that is neither first nor last


def _decoder(kind: str = "llama", **shape: Any) -> Any:
    settings: dict[str, Any] = {**SMALL, **shape, "vocab_size": 200, "use_cache": False}
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **settings))


@dataclass
class Case:
    """A training step: of all weights, or of adapters with a dropout."""

    name: str
    dropout: float | None = None
    recomputes: bool = False
    chunks: int = 1
    attention: str = "sdpa"
    quantized: bool = False
    shards: int = 0
    bf16: bool = True
    steps: int = 1
    bf16_norms: bool = False
    kind: str = "llama"
    shape: dict[str, Any] = field(default_factory=dict)
    error: float = 0.1


CASES = [
    Case("full"),
    Case("full, 4 chunks", chunks=4),
    Case("full, accumulated", steps=2),
    Case("full, float32", bf16=False),
    Case("full, recomputed", recomputes=True),
    Case("full, recomputed, 4 chunks", recomputes=True, chunks=4),
    Case("full, unpadded", attention="unpadded"),
    Case("full, 7B blocks, recomputed", recomputes=True, shape=BLOCKS),
    Case("LoRA", dropout=0.0),
    Case("LoRA, dropout", dropout=0.1),
    Case("LoRA, dropout, float32", dropout=0.1, bf16=False),
    Case("LoRA, recomputed", dropout=0.0, recomputes=True),
    Case("LoRA, dropout, recomputed", dropout=0.1, recomputes=True),
    Case("LoRA, dropout, recomputed, 4 chunks", dropout=0.1, recomputes=True, chunks=4),
    Case("LoRA, dropout, wide", dropout=0.1, shape=WIDE),
    Case("LoRA, dropout, 7B blocks, recomputed", dropout=0.1, recomputes=True, shape=BLOCKS),
    Case("LoRA, unpadded", dropout=0.0, attention="unpadded"),
    Case("LoRA, dropout, unpadded, recomputed", 0.1, recomputes=True, attention="unpadded"),
    Case("QLoRA", dropout=0.0, quantized=True),
    Case("QLoRA, dropout", dropout=0.1, quantized=True),
    Case("QLoRA, dropout, recomputed", dropout=0.1, quantized=True, recomputes=True),
    Case("LoRA, bf16 norms", dropout=0.0, bf16_norms=True),
    Case("LoRA, dropout, bf16 norms, recomputed", 0.1, recomputes=True, bf16_norms=True),
    Case("QLoRA, dropout, bf16 norms", dropout=0.1, quantized=True, bf16_norms=True),
    Case("FSDP, full", shards=8),
    Case("FSDP, full, recomputed", shards=8, recomputes=True, shape=THREE),
    Case("FSDP, LoRA", dropout=0.0, shards=8),
    Case("FSDP, LoRA, dropout, recomputed", dropout=0.1, shards=8, recomputes=True, shape=THREE),
    Case("Qwen3", kind="qwen3", shape={"head_dim": 128}),
    Case("Qwen3, LoRA, recomputed", 0.1, recomputes=True, kind="qwen3", shape={"head_dim": 128}),
    Case("Gemma 3", kind="gemma3_text", shape={"head_dim": 64}),
    Case("BERT", kind="bert", shape=BERT, error=0.25),
    Case("BERT, LoRA, recomputed", 0.1, recomputes=True, kind="bert", shape=BERT, error=0.25),
]


def _adapted(case: Case, model: Any) -> Any:
    if case.dropout is None:
        return model
    adapted: Any = LoRA(dropout=case.dropout).apply(model)
    adapted.active_peft_config.base_model_name_or_path = "base"
    return adapted


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_peak_of_a_step_is_that_of_its_allocations(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        outline = _adapted(case, _decoder(case.kind, **case.shape))
        model = prepared(_decoder(case.kind, **case.shape), case.recomputes, bidirectional=False)
        model = set_attention(model, case.attention)
        if case.quantized:
            model = allocations.quantize(model)
        model = _adapted(case, model)
    batch = allocations.batch(32, 128, case.chunks, pads=case.attention == "sdpa")
    precision = case.bf16, case.bf16_norms
    counted = allocations.count(model, batch, monkeypatch, *precision, case.shards, case.steps)
    step = Step(
        batch.texts.sizes,
        bf16=case.bf16,
        recomputes=case.recomputes,
        quantized=case.quantized,
        shards=case.shards,
        accumulates=case.steps > 1,
        bf16_norms=case.bf16_norms,
    )
    found = need(outline, step)
    assert found.pop("weights") == pytest.approx(counted.weights, rel=0.02)
    del found["optimizer"]  # its step comes later
    assert sum(found.values()) == pytest.approx(counted.others, rel=case.error)


def test_a_7b_shape_is_counted_without_its_weights() -> None:
    with torch.device("meta"):
        model = _decoder(**SEVEN_B)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(6.48e9, rel=0.01)
    full = need(model, Step([1024], bf16=True, accumulates=True))
    sizes = [full[name] for name in ("weights", "gradients", "optimizer")]
    assert sizes == [4 * parameters, 4 * parameters, 8 * parameters]
    shared = need(model, Step([1024], bf16=True, shards=8, accumulates=True))
    assert (shared["weights"], shared["optimizer"]) == (parameters / 2, parameters)
    assert shared["gradients"] == pytest.approx(parameters / 2 + 6 * parameters / 32, rel=0.01)
    adapters: Any = LoRA(rank=32).apply(model)
    few = need(adapters, Step([1024], bf16=True, accumulates=True))
    assert few["gradients"] == pytest.approx(4 * 80e6, rel=0.02)
    assert few["weights"] == pytest.approx(2 * parameters + 4 * 80e6, rel=0.01)
    packed = need(adapters, Step([1024], bf16=True, quantized=True))
    assert packed["weights"] == pytest.approx(0.516 * parameters + 4 * 80e6, rel=0.01)


@pytest.mark.parametrize(
    ("largest", "remedy"),
    [("weights", "peft=lora"), ("activations", "backbone.checkpointing=true or gradcache.chunk")],
)
def test_a_device_that_is_too_small_is_refused_with_the_remedy(largest: str, remedy: str) -> None:
    needed = {"weights": 1.0, "activations": 1.0}
    refuse_too_large(needed, torch.device("cpu"))
    needed[largest] = 2.0**50
    with refused("out-of-memory", "the cpu has", in_words(needed), remedy):
        refuse_too_large(needed, torch.device("cpu"))


def test_a_validation_whose_embeddings_do_not_fit_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_validation(100_000, 384, processes=1)
    monkeypatch.setattr("caravan.training.memory.host_memory", lambda: 2 * (2 + 4) * 100_000 * 384)
    refuse_validation(100_000, 384, processes=2)
    with refused("out-of-memory", "100,001 passages"):
        refuse_validation(100_001, 384, processes=2)
    with refused("out-of-memory", "8,841,823 passages", "validation.passages=100000"):
        refuse_validation(8_841_823, 4096, processes=8)


def test_layers_that_share_their_weights_have_activations_each() -> None:
    def activations(layers: int) -> float:
        with torch.device("meta"):
            model = _decoder("albert", embedding_size=64, num_hidden_layers=layers)
        return need(model, Step([4096]))["activations"]

    assert activations(24) > 1.8 * activations(12)


def test_experts_are_counted_as_a_dense_mlp() -> None:
    found = []
    for kind in ("qwen3", "qwen3_moe"):  # whose experts are no linear layers
        with torch.device("meta"):
            model = _decoder(kind, head_dim=64)
        found.append(Block.of(model, Step([512])).kept)
    assert found[1] == pytest.approx(found[0], rel=0.25)
