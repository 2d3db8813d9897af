"""Adapters: the layers that have them; saved ones on other weights, from other tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tests.models.released import save_base
from tests.models.small import close, edit_weights, embedded, model_of, save_adapter
from tests.refusals import refused
from tests.tiny import tiny_backbone

from caravan.encoding import Encoding, read_encoding
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.hardware import parameter_counts

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("targets", "layers"), [("all-linear", ALL), (["up_proj"], {"up_proj"})])
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


def test_layers_that_a_model_lacks_are_refused() -> None:
    with refused("unknown-layers", "peft.targets"):
        LoRA(targets=["nowhere"]).apply(model_of("llama"))


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    return save_base(tmp_path / "project" / "bases" / "llama", tokenizer)


def test_rank_stabilized_adapters_are_saved(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    models = [
        save_adapter(base, tmp_path / f"{rslora}", tokenizer, encoding, rslora=rslora)
        for rslora in (True, False)
    ]
    close(embedded(tmp_path / "True"), embedded(models[0]))
    assert (embedded(models[0]) - embedded(models[1])).abs().max() > 1e-4


def _change(base: Path) -> None:
    edit_weights(base / "model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(1))


def test_an_adapter_on_other_weights_of_its_base_is_refused(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    saved = tmp_path / "adapter"
    save_adapter(base, saved, tokenizer, encoding)
    _change(base)
    with refused("other-base-weights", str(saved)):
        folder.load(saved)
    spec = FromFolder(str(saved))
    spec.use_adapters(LoRA(rank=2, alpha=4))
    with refused("other-base-weights", str(saved)):
        spec.model(tokenizer)
    record = json.loads((saved / "caravan.json").read_text())
    del record["facts"]["base_weights"]  # as in folders of older versions
    (saved / "caravan.json").write_text(json.dumps(record))
    folder.load(saved)


def test_a_merged_model_records_no_base(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    save_adapter(base, tmp_path / "adapter", tokenizer, encoding)
    model, _, _, facts = folder.load(tmp_path / "adapter")
    assert facts["base_weights"]
    folder.save(tmp_path / "whole", model, tokenizer, encoding, facts)
    assert "base_weights" not in read_encoding(tmp_path / "whole")[1]
    close(embedded(tmp_path / "whole"), embedded(tmp_path / "adapter"), atol=1e-4)


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
    save_adapter("bases/llama", saved, tokenizer, encoding)
    expected = embedded(saved)
    if inside:
        project.rename(tmp_path / "moved")
        saved = tmp_path / "moved" / "runs" / "adapter"
    monkeypatch.chdir("/")
    close(embedded(saved), expected, atol=0)


def test_another_model_at_a_relative_base_is_refused(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "project")
    saved = tmp_path / "project" / "runs" / "a"
    save_adapter("bases/llama", saved, tokenizer, encoding)
    shutil.copytree(base, tmp_path / "other" / "bases" / "llama")
    _change(tmp_path / "other" / "bases" / "llama")
    monkeypatch.chdir(tmp_path / "other")
    with refused("other-base-weights", str(saved)):
        folder.load(saved)


def _foreign(base: Path, to: Path, resized: int = 0, task: str | None = "CAUSAL_LM") -> Any:
    """An adapter that PEFT alone has made of the language model; its model."""
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    if resized:
        model.resize_token_embeddings(resized)
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type=task)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(to)
    return adapted.eval()


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_a_language_models_adapter_embeds_as_its_transformer(
    task: str | None, base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    adapted = _foreign(base, tmp_path / "foreign", task=task)
    model = BiEncoder(Pretrained(str(tmp_path / "foreign")).model(tokenizer), encoding).eval()
    expected = embedded(BiEncoder(adapted.get_base_model().model, encoding))
    close(embedded(model), expected)
    folder.save(tmp_path / "adopted", model, tokenizer, encoding, {})
    close(embedded(tmp_path / "adopted"), expected)
    plain = PeftModel.from_pretrained(Pretrained(str(base)).model(tokenizer), tmp_path / "adopted")
    close(embedded(BiEncoder(plain.merge_and_unload(), encoding)), expected)


def test_an_adapter_with_a_resized_embedding_is_refused(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    _foreign(base, tmp_path / "foreign", resized=404)
    with refused("weights-mismatch", "embed_tokens.weight not used", "vocabulary"):
        Pretrained(str(tmp_path / "foreign")).model(tokenizer)
