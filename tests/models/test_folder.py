from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from caravan.data.batch import pack
from caravan.data.collection import Collection
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding, adapter_base, files_digest, folder_digest
from caravan.errors import InputError
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, with_head

TEXTS = [[5, 6, 7], [8, 9, 10, 11], [12]]


@pytest.fixture
def saved(encoder: BiEncoder, tokenizer: Any, encoding: Encoding, tmp_path: Path) -> Path:
    folder.save(tmp_path / "model", encoder, tokenizer, encoding, {"name": "tiny", "best": 0.5})
    return tmp_path / "model"


def test_a_saved_model_loads_with_the_same_embeddings_and_encoding(
    saved: Path, encoder: BiEncoder, tokenizer: Any, encoding: Encoding
) -> None:
    model, loaded_tokenizer, loaded_encoding, facts = folder.load(saved)
    assert loaded_encoding == encoding
    assert facts == {"name": "tiny", "best": 0.5, "weights": "full", "own_code": False}
    assert loaded_tokenizer("camel caravan")["input_ids"] == tokenizer("camel caravan")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model.embed(pack(TEXTS, 99)), encoder.embed(pack(TEXTS, 99)))


def test_a_folder_is_safetensors_tokenizer_and_encoding(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert {"caravan.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_saving_again_replaces_the_folder(
    saved: Path, encoder: BiEncoder, tokenizer: Any, encoding: Encoding
) -> None:
    (saved / "stale.txt").touch()
    folder.save(saved, encoder, tokenizer, encoding, {})
    assert not (saved / "stale.txt").exists()


def test_an_adapter_folder_loads_onto_its_base(
    tokenizer: Any, encoding: Encoding, saved: Path, tmp_path: Path
) -> None:
    base = Pretrained(str(saved)).model(tokenizer)
    model = BiEncoder(LoRA(rank=2, alpha=4).apply(base), encoding).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    folder.save(tmp_path / "adapter", model, tokenizer, encoding, {})
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    loaded, *_ = folder.load(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded.embed(pack(TEXTS, 99)), model.embed(pack(TEXTS, 99)))


def test_an_adapter_with_missing_weights_is_refused(
    tokenizer: Any, encoding: Encoding, saved: Path, tmp_path: Path
) -> None:
    base = Pretrained(str(saved)).model(tokenizer)
    model = BiEncoder(LoRA(rank=2, alpha=4).apply(base), encoding)
    folder.save(tmp_path / "adapter", model, tokenizer, encoding, {})
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    with pytest.raises(InputError, match="1 weights missing, 0 not used"):
        folder.load(tmp_path / "adapter")


def test_missing_weights_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors.pop("norm.weight")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"norm\.weight missing"):
        folder.load(saved)


def test_mis_shaped_weights_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="model"):
        folder.load(saved)


def test_a_truncated_weights_file_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="no model could be loaded"):
        folder.load(saved)


def test_a_folder_from_before_a_setting_was_there_has_its_default(saved: Path) -> None:
    path = saved / "caravan.json"
    record = json.loads(path.read_text())
    del record["scoring"]
    path.write_text(json.dumps(record))
    assert folder.load(saved)[2].scoring == "head"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("pooling"), "missing 'pooling'"),
        (lambda c: c.update(poling="last"), "unknown 'poling'"),
        (lambda c: c.update(pooling="max"), "pooling is 'max'"),
        (lambda c: c.update(query_length="32"), "'query_length' is '32'"),
        (lambda c: c.update(format=99), "format is not 1"),
        (lambda c: c.update(query_length=3), "query_length is 3"),
        (lambda c: c.update(passage_template="{body}"), r"lacks \{text\}"),
        (lambda c: c["facts"].pop("weights"), "lacks 'weights'"),
    ],
)
def test_a_broken_encoding_is_refused(saved: Path, change: Any, told: str) -> None:
    record = json.loads((saved / "caravan.json").read_text())
    change(record)
    (saved / "caravan.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=told):
        folder.load(saved)


def test_a_encoding_that_is_no_json_is_refused(saved: Path) -> None:
    (saved / "caravan.json").write_text("{")
    with pytest.raises(InputError, match="not a encoding"):
        folder.load(saved)


def test_a_folder_without_encoding_says_how_to_adopt_it(saved: Path) -> None:
    (saved / "caravan.json").unlink()
    with pytest.raises(InputError, match=r"python train.py backbone=hf backbone.name="):
        folder.load(saved)


def test_the_digest_follows_weights_and_encoding(
    saved: Path, encoder: BiEncoder, tokenizer: Any, encoding: Encoding
) -> None:
    before = folder_digest(saved)
    folder.save(saved, encoder, tokenizer, encoding, {"name": "another card"})
    assert folder_digest(saved) == before
    with torch.no_grad():
        next(encoder.parameters())[0, 0] += 1
    folder.save(saved, encoder, tokenizer, encoding, {})
    assert folder_digest(saved) != before


def test_a_model_that_is_not_to_be_had_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        Pretrained(str(tmp_path)).tokenizer(None, tmp_path)
    with pytest.raises(InputError, match="no model could be loaded"):
        Pretrained(str(tmp_path)).model(None)


def _adapter(base: Path, tokenizer: Any, encoding: Encoding, path: Path) -> BiEncoder:
    """A model folder with an adapter that changes the embeddings; the model as it was saved."""
    model = BiEncoder(LoRA(rank=2, alpha=4).apply(Pretrained(str(base)).model(tokenizer)), encoding)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    folder.save(path, model, tokenizer, encoding, {})
    return model.eval()


def test_the_digest_of_an_adapter_follows_its_base(
    saved: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    _adapter(saved, tokenizer, encoding, tmp_path / "adapter")
    before = folder_digest(tmp_path / "adapter")
    assert folder_digest(tmp_path / "adapter") == before
    tensors = load_file(saved / "model.safetensors")
    tensors["norm.weight"] += 1
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    assert folder_digest(tmp_path / "adapter") != before


def test_the_digest_of_files_leaves_the_encoding_and_the_card_out(saved: Path) -> None:
    before = files_digest(saved)
    (saved / "caravan.json").write_text("{}")
    (saved / "README.md").write_text("another card")
    assert files_digest(saved) == before
    (saved / "tokenizer.json").write_text("{}")
    assert files_digest(saved) != before


def test_an_adapter_folder_encodes_as_the_model_that_was_saved(
    saved: Path, tokenizer: Any, encoding: Encoding, collection: Collection, tmp_path: Path
) -> None:
    from caravan.retrieval.inference import Inference
    from caravan.retrieval.store import Store

    model = _adapter(saved, tokenizer, encoding, tmp_path / "adapter")
    opened = Inference(tmp_path / "adapter", precision="float32", token_budget=256)
    product = (Store(tmp_path / "store"), "passages", {"model": "a"})
    rows = np.arange(20)
    assert opened.encode_rows(collection.corpus, rows, "passage", 16, *product).rows == 20
    ids = Templates(tokenizer, encoding).passages(collection.corpus.get(np.arange(20)))
    with torch.no_grad():
        expected = model.embed(pack(ids, 99))
        found = opened.model.embed(pack(ids, 99).to(opened.device)).cpu()
        base = folder.load(saved)[0].embed(pack(ids, 99))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(base, expected, atol=1e-2)


def test_a_merged_adapter_is_saved_as_a_whole_model(
    saved: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    model = _adapter(saved, tokenizer, encoding, tmp_path / "adapter")
    merged, *_ = folder.load(tmp_path / "adapter")
    folder.save(tmp_path / "whole", merged, tokenizer, encoding, {})
    assert (tmp_path / "whole" / "model.safetensors").exists()
    with torch.no_grad():
        found = folder.load(tmp_path / "whole")[0].embed(pack(TEXTS, 99))
        torch.testing.assert_close(found, model.embed(pack(TEXTS, 99)), atol=1e-4, rtol=0)


def test_an_adapter_keeps_the_revision_of_its_base(
    saved: Path,
    tokenizer: Any,
    encoding: Encoding,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = Pretrained(str(saved), revision="0123abc").model(tokenizer)
    model = BiEncoder(LoRA(rank=2, alpha=4).apply(base), encoding)
    folder.save(tmp_path / "adapter", model, tokenizer, encoding, {})
    assert adapter_base(tmp_path / "adapter") == (str(saved), "0123abc")
    asked, load_weights = [], folder.load_weights
    monkeypatch.setattr(
        folder,
        "load_weights",
        lambda name, revision, **given: (
            asked.append((name, revision)) or load_weights(name, **given)
        ),
    )
    folder.load(tmp_path / "adapter")
    assert asked == [(str(saved), "0123abc")]


@pytest.mark.parametrize("loader", ["folder", "released"])
def test_weights_of_a_layer_that_the_config_does_not_count_are_refused(
    loader: str, saved: Path
) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:-1]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"layers\.1\.\S+ not used"):
        folder.load(saved) if loader == "folder" else Pretrained(str(saved)).model(None)


def test_a_released_model_may_bring_heads_and_a_model_folder_may_not(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    heads = ["lm_head.weight", "classifier.weight", "pooler.dense.weight", "cls.predictions.bias"]
    added = {name: torch.ones(3, 3) for name in heads}
    save_file({**tensors, **added}, saved / "model.safetensors", metadata={"format": "pt"})
    Pretrained(str(saved)).model(None)
    with pytest.raises(InputError, match=r"4 weights .*classifier\.weight not used"):
        folder.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_by_its_name_and_file(
    value: float, dtype: torch.dtype, saved: Path
) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["layers.0.self_attn.q_proj.weight"][3, 4] = value
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    told = r"model\.safetensors: layers\.0\.self_attn\.q_proj\.weight holds values that are NaN"
    with pytest.raises(InputError, match=told):
        folder.load(saved, dtype)


def test_a_weight_of_an_adapter_that_is_not_finite_is_refused(
    saved: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    _adapter(saved, tokenizer, encoding, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: .* NaN or infinite"):
        folder.load(tmp_path / "adapter")


def test_a_head_that_is_not_finite_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    encoding = Encoding(kind="reranker", pooling="cls", query_length=16, passage_length=24)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=400, intermediate_size=48, **shape))
    scorer: Any = with_head(bert)
    with torch.no_grad():
        scorer.score.weight[0, 0] = float("nan")
    folder.save(tmp_path / "model", CrossEncoder(scorer, encoding), tokenizer, encoding, {})
    with pytest.raises(InputError, match=r"score\.safetensors: score\.weight holds values"):
        folder.load(tmp_path / "model")


@pytest.mark.parametrize("file", ["config.json", "caravan.json", "tokenizer.json"])
def test_json_that_is_nested_too_deeply_is_refused_by_its_folder(file: str, saved: Path) -> None:
    (saved / file).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(InputError, match=str(saved)):
        folder.load(saved)


def test_a_value_of_another_type_in_the_config_is_refused_by_its_file(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": "small"}))
    with pytest.raises(InputError, match=r"config\.json: no model could be loaded"):
        folder.load(saved)


def test_a_config_that_counts_endless_layers_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**31}))
    with pytest.raises(InputError, match=r"config\.json"):
        folder.load(saved)


def test_a_tokenizer_of_a_newer_version_is_refused(saved: Path) -> None:
    record = json.loads((saved / "tokenizer.json").read_text())
    record["model"]["type"] = "BPE2"
    (saved / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        folder.load(saved)
