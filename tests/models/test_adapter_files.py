"""Saved adapters: on other base weights, from other tasks, with an embedding of their own."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.released import save_base
from torch import Tensor

from caravan.data.batch import pack
from caravan.encoding import Encoding, read_encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder
from caravan.models.digests import adapter_base

TEXTS = [[5, 6, 7], [8, 9, 10, 11], [12]]
RESCORED = Encoding(kind="reranker", query_length=16, passage_length=24)


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    return save_base(tmp_path / "project" / "bases" / "llama", tokenizer)


def _adapter(name: str, to: Path, tokenizer: Any, encoding: Encoding) -> Path:
    transformer = LoRA(rank=2, alpha=4).apply(Pretrained(name).model(tokenizer))
    folder.save(to, BiEncoder(transformer, encoding), tokenizer, encoding, {})
    return to


def _embedded(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = folder.load(path)[0].embed(pack(TEXTS, 99))
    return found


def _change(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_an_adapter_on_other_weights_of_its_base_is_refused(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    saved = _adapter(str(base), tmp_path / "adapter", tokenizer, encoding)
    _embedded(saved)
    _change(base)
    with pytest.raises(InputError, match="are not those that the adapter was trained on"):
        folder.load(saved)
    with pytest.raises(InputError, match="are not those that the adapter was trained on"):
        FromFolder(str(saved)).model(tokenizer)


def test_an_adapter_that_records_no_base_weights_loads_and_the_log_says_so(
    base: Path,
    tokenizer: Any,
    encoding: Encoding,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = _adapter(str(base), tmp_path / "adapter", tokenizer, encoding)
    record = json.loads((saved / "caravan.json").read_text())
    del record["facts"]["base_weights"]
    (saved / "caravan.json").write_text(json.dumps(record))
    with caplog.at_level(logging.INFO):
        folder.load(saved)
    assert "does not record the weights of its base" in caplog.text


def test_whole_weights_record_no_base(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    saved = _adapter(str(base), tmp_path / "adapter", tokenizer, encoding)
    model, _, _, facts = folder.load(saved)
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
    to = project / "runs" / "adapter" if inside else tmp_path / "elsewhere" / "adapter"
    saved = _adapter("bases/llama", to, tokenizer, encoding)
    expected = _embedded(saved)
    if inside:
        project.rename(tmp_path / "moved")
        saved = tmp_path / "moved" / "runs" / "adapter"
    monkeypatch.chdir("/")
    torch.testing.assert_close(_embedded(saved), expected, atol=0, rtol=0)


def test_another_model_at_a_relative_base_is_refused(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "project")
    saved = _adapter("bases/llama", tmp_path / "project" / "runs" / "a", tokenizer, encoding)
    shutil.copytree(base, tmp_path / "other" / "bases" / "llama")
    _change(tmp_path / "other" / "bases" / "llama")
    monkeypatch.chdir(tmp_path / "other")
    assert adapter_base(saved)[0] == "bases/llama"
    with pytest.raises(InputError, match="are not those that the adapter was trained on"):
        folder.load(saved)


def _foreign(base: Path, to: Path, resized: int = 0, **settings: Any) -> tuple[Path, Any]:
    """An adapter that PEFT alone has made of the language model; its model."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(base)
    if resized:
        model.resize_token_embeddings(resized)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(to)
    return to, adapted.eval()


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_an_adapter_of_a_language_model_embeds_as_its_transformer(
    task: str | None, base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    foreign, adapted = _foreign(base, tmp_path / "foreign", task_type=task)
    model = BiEncoder(Pretrained(str(foreign)).model(tokenizer), encoding).eval()
    with torch.no_grad():
        found = model.embed(pack(TEXTS, 99))
        expected = BiEncoder(adapted.get_base_model().model, encoding).embed(pack(TEXTS, 99))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    folder.save(tmp_path / "adopted", model, tokenizer, encoding, {})
    torch.testing.assert_close(_embedded(tmp_path / "adopted"), expected, atol=1e-5, rtol=0)
    plain = PeftModel.from_pretrained(Pretrained(str(base)).model(tokenizer), tmp_path / "adopted")
    with torch.no_grad():
        again = BiEncoder(plain.merge_and_unload(), encoding).embed(pack(TEXTS, 99))
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


def test_a_reranker_of_an_adapter_without_a_head_is_refused(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    foreign, _ = _foreign(base, tmp_path / "foreign", task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="is an adapter without a head"):
        CrossEncoder(Pretrained(str(foreign)).scorer(tokenizer), RESCORED)


def test_an_adapter_with_the_embedding_of_a_resized_vocabulary_is_loaded_with_it(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    foreign, adapted = _foreign(base, tmp_path / "foreign", resized=404, task_type="CAUSAL_LM")
    model = BiEncoder(Pretrained(str(foreign)).model(tokenizer), encoding).eval()
    folder.save(tmp_path / "adopted", model, tokenizer, encoding, {})
    loaded = folder.load(tmp_path / "adopted")[0]
    ids = [[5, 403, 401], [402, 6]]
    with torch.no_grad():
        expected = BiEncoder(adapted.get_base_model().model, encoding).embed(pack(ids, 99))
        torch.testing.assert_close(model.embed(pack(ids, 99)), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(loaded.embed(pack(ids, 99)), expected, atol=1e-5, rtol=0)
