from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_backbone

from caravan.contract import Contract
from caravan.data.collection import Collection
from caravan.errors import InputError
from caravan.models import backbone as backbone_module
from caravan.models.adapters import LoRA
from caravan.models.backbone import TinyLlama, parameter_counts
from caravan.models.biencoder import BiEncoder


def test_the_bpe_is_trained_once_a_collection(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, trained = tiny_backbone(), []
    train = backbone_module.train_bpe
    monkeypatch.setattr(
        backbone_module, "train_bpe", lambda *given: trained.append(given) or train(*given)
    )
    first = backbone.tokenizer(collection, tmp_path)
    again = backbone.tokenizer(collection, tmp_path)
    assert len(trained) == 1
    backbone.tokenizer(replace(collection, digest="f" * 32), tmp_path)
    assert len(trained) == 2
    text = "camel caravan \N{BACTRIAN CAMEL}\n"
    assert first(text)["input_ids"] == again(text)["input_ids"]
    assert first.decode(first(text)["input_ids"], skip_special_tokens=True) == text


def test_weights_are_a_function_of_torchs_seed(tokenizer: object) -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(tiny_backbone().model(tokenizer).state_dict())
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(models[0][name], models[1][name])
    assert not torch.equal(models[0][name], models[2][name])


def test_lora_trains_adapters_alone(tokenizer: object) -> None:
    model = LoRA(rank=2, alpha=4).apply(tiny_backbone().model(tokenizer))
    trainable, total = parameter_counts(model)
    assert 0 < trainable < total
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    layers = {
        part
        for name, _ in model.named_parameters()
        if "lora_A" in name
        for part in name.split(".")
        if part.endswith("_proj")
    }
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_recomputed_activations_give_the_same_gradient(tokenizer: object) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = tiny_backbone()
        backbone.checkpointing = checkpointing
        torch.manual_seed(0)
        model = BiEncoder(backbone.model(tokenizer), Contract()).train()
        ids = torch.arange(5, 15).reshape(2, 5)
        model(ids, torch.ones_like(ids), True).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of heads=3"):
        TinyLlama(hidden_size=32, heads=3)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_tiny_llama_begins_by_handing_on_a_share_of_what_it_attends_to(
    share: float, tokenizer: Any
) -> None:
    shape = {"vocab_size": 400, "hidden_size": 32, "heads": 2, "intermediate_size": 48}
    model: Any = TinyLlama(**shape, copying=share).model(tokenizer)  # type: ignore[arg-type]
    for layer in model.layers:
        product = layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight
        if share:
            torch.testing.assert_close(product, share * torch.eye(32), atol=1e-5, rtol=0)
        else:
            assert product.abs().max() < 0.05


def test_a_negative_share_is_refused() -> None:
    with pytest.raises(InputError, match=r"backbone\.copying is -1; it must be 0 or more"):
        TinyLlama(copying=-1)
