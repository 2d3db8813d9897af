from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.small import TEXTS, padded, saved_base
from tests.refusals import refused
from tests.tiny import tiny_backbone
from transformers import AutoModelForCausalLM

from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.local_copy import local_copy


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> str:
    model = tiny_backbone().language_model(tokenizer)
    return str(saved_base(tokenizer, tmp_path / "base", model))


def test_the_first_layers_compute_what_they_compute_in_the_whole_model(
    base: str, tokenizer: Any, tmp_path: Path
) -> None:
    backbone = Pretrained(base, layers=1)
    backbone.tokenizer(None, tmp_path)
    kept: Any = backbone.language_model(tokenizer)
    whole: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    ids, mask = padded(TEXTS, "right")
    with torch.no_grad():
        states = whole(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
        expected = whole.model.norm(states)
        found = kept.eval().base_model(ids, attention_mask=mask).last_hidden_state
    assert kept.config.num_hidden_layers == 1
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


def test_an_adapter_on_the_first_layers_finds_its_base_again(
    base: str, tokenizer: Any, tmp_path: Path, encoding: Any
) -> None:
    backbone = Pretrained(base, layers=1)
    backbone.tokenizer(None, tmp_path / "cache")
    model = BiEncoder(LoRA(rank=2).apply(backbone.model(tokenizer)), encoding).eval()
    folder.save(tmp_path / "m", model, tokenizer, encoding, {})
    loaded, *_ = folder.load(tmp_path / "m")
    assert loaded.transformer.config.num_hidden_layers == 1


def test_a_model_that_is_available_is_used_as_it_is(base: str, tmp_path: Path) -> None:
    assert local_copy(tmp_path, base) is None
    assert local_copy(tmp_path, base, gguf_file="not/read.gguf") is None
    assert not list(tmp_path.glob("models/*"))


def test_a_copy_is_written_once_and_again_when_damaged(base: str, tmp_path: Path) -> None:
    copy = local_copy(tmp_path, base, layers=1)
    assert copy is not None
    weights = copy / "model.safetensors"
    content, written = weights.read_bytes(), weights.stat().st_mtime_ns
    assert local_copy(tmp_path, base, layers=1) == copy
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(content[:-1])
    local_copy(tmp_path, base, layers=1)
    assert weights.read_bytes() == content


def test_the_copy_of_other_weights_is_another(base: str, tmp_path: Path) -> None:
    before = local_copy(tmp_path, base, layers=1)
    changed: Any = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.model.norm.weight.mul_(2)
    changed.save_pretrained(base)
    assert local_copy(tmp_path, base, layers=1) != before


def test_more_layers_than_the_model_has_are_refused(base: str, tmp_path: Path) -> None:
    with refused("too-many-layers", "backbone.layers=9"):
        local_copy(tmp_path, base, layers=9)


@pytest.mark.parametrize("file", ["no/such.gguf", "no_such_package/model.gguf", "torch/no.gguf"])
def test_a_gguf_file_that_is_not_there_or_is_none_is_refused(file: str, tmp_path: Path) -> None:
    with refused("file-not-found", file):
        local_copy(tmp_path, None, gguf_file=file)
    (tmp_path / "x.gguf").write_bytes(b"GGUF nothing")
    with refused("unreadable", "tokenizer"):
        local_copy(tmp_path, None, gguf_file=str(tmp_path / "x.gguf"))


def test_neither_a_name_nor_a_gguf_file_is_refused() -> None:
    with refused("nothing-chosen", "backbone.name"):
        Pretrained(None)
