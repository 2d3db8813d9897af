"""The estimate of memory: against what autograd saves, and a refusal before anything loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.refusals import refused
from torch import Tensor, nn

from caravan.models.adapters import LoRA
from caravan.models.hardware import settle_precisions
from caravan.training.memory import in_words, need, refuse_too_large, refuse_validation

TOKENS = 4 * 96
SEVEN_B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SEVEN_B |= {"num_key_value_heads": 32, "intermediate_size": 11008}


def _llama(**shape: Any) -> Any:
    given = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    given |= {"num_key_value_heads": 2, "intermediate_size": 344}
    config = transformers.LlamaConfig(vocab_size=200, use_cache=False, **{**given, **shape})
    model = transformers.LlamaModel(config)
    model.set_attn_implementation("sdpa")
    return model


def _saved(model: nn.Module, bf16: bool) -> float:
    """Bytes that autograd keeps, weights and their copies left out."""
    of_weights = {tuple(p.shape) for p in model.parameters()}
    of_weights |= {tuple(reversed(shape)) for shape in of_weights}
    seen: dict[int, Any] = {}  # by address; the tensors are kept, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in of_weights:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(input_ids=torch.arange(TOKENS).view(4, -1) % 200)
    return float(sum(storage.nbytes() for storage in seen.values()))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("dropout", "shape"),
    [
        (None, {}),
        (None, {"num_key_value_heads": 4}),
        (0.0, {}),
        (0.1, {}),
        (0.1, {"hidden_size": 256, "intermediate_size": 704}),
    ],
)
def test_activations_are_what_autograd_saves(
    bf16: bool, dropout: float | None, shape: dict[str, int]
) -> None:
    model = _llama(**shape)
    if dropout is not None:
        model = LoRA(rank=4, dropout=dropout).apply(model).train()
        model.active_peft_config.base_model_name_or_path = "base"
        settle_precisions(model, bf16)
    found = need(model, TOKENS, bf16)["activations"]
    assert found == pytest.approx(_saved(model, bf16), rel=0.1)


def test_recomputation_holds_one_block_of_one_chunk() -> None:
    model = _llama()
    layers = need(model, TOKENS, True, recomputes=True, chunk=0)["activations"]
    assert layers == 3 * TOKENS * 4 * 128  # the input of each layer
    block = need(model, TOKENS // 4, True)["activations"] / 3
    found = need(model, TOKENS, True, recomputes=True, chunk=TOKENS // 4)["activations"]
    assert found == pytest.approx(layers + block)


def test_a_7b_shape_is_counted_without_its_weights() -> None:
    with torch.device("meta"):
        model = _llama(**SEVEN_B)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(6.48e9, rel=0.01)
    full, shared = need(model, 1024, bf16=True), need(model, 1024, bf16=True, shares=8)
    sizes = [full[name] for name in ("weights", "gradients", "optimizer")]
    assert sizes == [4 * parameters, 4 * parameters, 8 * parameters]
    assert list(shared.values()) == [*(size / 8 for size in sizes), full["activations"]]
    recomputed = need(model, 1024, bf16=True, recomputes=True)
    assert recomputed["activations"] < full["activations"] / 5
    adapters: Any = LoRA(rank=32).apply(model)
    few = need(adapters, 1024, bf16=True)
    assert few["gradients"] == pytest.approx(4 * 80e6, rel=0.02)
    assert few["weights"] == pytest.approx(2 * parameters + 4 * 80e6, rel=0.01)
    packed = need(adapters, 1024, bf16=True, quantised=True)
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
