"""Adapters: the layers that have them; saved ones on other weights, from other tasks."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.models.released import save_base
from tests.models.small import close, model_of, shaken
from tests.refusals import refused
from tests.tiny import tiny_backbone
from torch import Tensor

from caravan.data.batch import pack
from caravan.encoding import Encoding, read_encoding
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained, parameter_counts
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder
from caravan.models.digests import adapter_base

TEXTS = [[5, 6, 7], [8, 9, 10, 11], [12]]
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", ATTENTION | MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        (["up_proj"], {"up_proj"}),
    ],
)
def test_lora_trains_the_target_layers_adapters_and_the_head(
    targets: Any, layers: set[str], tokenizer: object
) -> None:
    model = LoRA(rank=2, alpha=4, targets=targets).apply(tiny_backbone().scorer(tokenizer))
    trainable, total = parameter_counts(model)
    assert 0 < trainable < total
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name for name in trained)
    found = {name.split(".lora_A")[0].rpartition(".")[2] for name in trained if "lora_A" in name}
    assert found == layers


def test_layers_of_an_encoder_with_similar_names_are_distinguished() -> None:
    model = LoRA(rank=2, targets="mlp").apply(model_of("bert", num_hidden_layers=1))
    names = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    ends = ("layer.0.intermediate.dense", "layer.0.output.dense")
    assert len(names) == 2
    assert all(name.endswith(ends) and "attention" not in name for name in names)


@pytest.mark.parametrize("targets", ["attention", ["nowhere"]])
def test_layers_that_a_model_lacks_are_refused(targets: Any) -> None:
    model = model_of("mamba") if targets == "attention" else model_of("llama")
    with refused("unknown-layers", "peft.targets"):
        LoRA(targets=targets).apply(model)


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    return save_base(tmp_path / "project" / "bases" / "llama", tokenizer)


def _adapter(name: str, to: Path, tokenizer: Any, encoding: Encoding, **settings: Any) -> BiEncoder:
    """A model folder with an adapter; its model."""
    adapters = LoRA(rank=2, alpha=4, dropout=0.0, **settings)
    torch.manual_seed(0)
    model = BiEncoder(shaken(adapters.apply(Pretrained(name).model(tokenizer))), encoding).eval()
    folder.save(to, model, tokenizer, encoding, {})
    return model


def _embedded(model: BiEncoder | Path, texts: list[list[int]] = TEXTS) -> Tensor:
    loaded = folder.load(model)[0] if isinstance(model, Path) else model
    with torch.no_grad():
        found: Tensor = loaded.embed(pack(texts, 99))
    return found


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_variants_of_lora_are_saved(
    kind: str, base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    embedded = []
    for settings in ({}, {kind: True}):
        to = tmp_path / f"model{len(embedded)}"
        model = _adapter(str(base), to, tokenizer, encoding, **settings)
        torch.testing.assert_close(_embedded(to), _embedded(model))
        embedded.append(_embedded(model))
    assert (embedded[0] - embedded[1]).abs().max() > 1e-4


def _change(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_an_adapter_on_other_weights_of_its_base_is_refused(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    saved = tmp_path / "adapter"
    _adapter(str(base), saved, tokenizer, encoding)
    _embedded(saved)
    _change(base)
    with refused("other-base-weights", str(saved)):
        folder.load(saved)
    spec = FromFolder(str(saved))
    spec.use_adapters(LoRA(rank=2, alpha=4))
    with refused("other-base-weights", str(saved)):
        spec.model(tokenizer)


def test_an_older_adapter_that_records_no_base_weights_loads_with_a_log_line(
    base: Path,
    tokenizer: Any,
    encoding: Encoding,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = tmp_path / "adapter"
    _adapter(str(base), saved, tokenizer, encoding)
    record = json.loads((saved / "caravan.json").read_text())
    del record["facts"]["base_weights"]
    (saved / "caravan.json").write_text(json.dumps(record))
    with caplog.at_level(logging.INFO):
        folder.load(saved)
    assert str(base) in caplog.text


def test_whole_weights_record_no_base(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    _adapter(str(base), tmp_path / "adapter", tokenizer, encoding)
    model, _, _, facts = folder.load(tmp_path / "adapter")
    assert facts["base_weights"]
    folder.save(tmp_path / "whole", model, tokenizer, encoding, facts)
    assert "base_weights" not in read_encoding(tmp_path / "whole")[1]


@pytest.mark.parametrize("inside", [True, False])
def test_a_relative_base_is_found_from_another_working_directory(
    inside: bool,
    base: Path,
    tokenizer: Any,
    encoding: Encoding,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Saved below the working directory it may move with it; elsewhere the path is absolute."""
    project = tmp_path / "project"
    monkeypatch.chdir(project)
    saved = project / "runs" / "adapter" if inside else tmp_path / "elsewhere" / "adapter"
    _adapter("bases/llama", saved, tokenizer, encoding)
    expected = _embedded(saved)
    if inside:
        project.rename(tmp_path / "moved")
        saved = tmp_path / "moved" / "runs" / "adapter"
    monkeypatch.chdir("/")
    close(_embedded(saved), expected, atol=0)


def test_another_model_at_a_relative_base_is_refused(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "project")
    saved = tmp_path / "project" / "runs" / "a"
    _adapter("bases/llama", saved, tokenizer, encoding)
    shutil.copytree(base, tmp_path / "other" / "bases" / "llama")
    _change(tmp_path / "other" / "bases" / "llama")
    monkeypatch.chdir(tmp_path / "other")
    assert adapter_base(saved)[0] == "bases/llama"
    with refused("other-base-weights", str(saved)):
        folder.load(saved)


def _foreign(base: Path, to: Path, resized: int = 0, **settings: Any) -> tuple[Path, Any]:
    """An adapter that PEFT alone has made of the language model; its model."""
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    if resized:
        model.resize_token_embeddings(resized)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(to)
    return to, adapted.eval()


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_a_language_models_adapter_embeds_as_its_transformer(
    task: str | None, base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    foreign, adapted = _foreign(base, tmp_path / "foreign", task_type=task)
    model = BiEncoder(Pretrained(str(foreign)).model(tokenizer), encoding).eval()
    expected = _embedded(BiEncoder(adapted.get_base_model().model, encoding))
    close(_embedded(model), expected)
    folder.save(tmp_path / "adopted", model, tokenizer, encoding, {})
    close(_embedded(tmp_path / "adopted"), expected)
    plain = PeftModel.from_pretrained(Pretrained(str(base)).model(tokenizer), tmp_path / "adopted")
    close(_embedded(BiEncoder(plain.merge_and_unload(), encoding)), expected)


def test_a_reranker_of_an_adapter_without_a_head_is_refused(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    foreign, _ = _foreign(base, tmp_path / "foreign", task_type="CAUSAL_LM")
    with refused("adapter-without-head", str(foreign)):
        CrossEncoder(Pretrained(str(foreign)).scorer(tokenizer), Encoding(kind="reranker"))


def test_an_adapter_with_a_resized_embedding_is_loaded_with_it(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    foreign, adapted = _foreign(base, tmp_path / "foreign", resized=404, task_type="CAUSAL_LM")
    model = BiEncoder(Pretrained(str(foreign)).model(tokenizer), encoding).eval()
    folder.save(tmp_path / "adopted", model, tokenizer, encoding, {})
    ids = [[5, 403, 401], [402, 6]]
    expected = _embedded(BiEncoder(adapted.get_base_model().model, encoding), ids)
    close(_embedded(model, ids), expected)
    close(_embedded(tmp_path / "adopted", ids), expected)
