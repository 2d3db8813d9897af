from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.small import close, edit_weights, embedded, model_of, save_adapter
from tests.refusals import refused

from caravan.data.batch import pack
from caravan.data.collection import Collection
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, with_head
from caravan.models.digests import adapter_base, files_digest, folder_digest
from caravan.retrieval.inference import Inference


@pytest.fixture
def saved(encoder: BiEncoder, tokenizer: Any, encoding: Encoding, tmp_path: Path) -> Path:
    folder.save(tmp_path / "model", encoder, tokenizer, encoding, {"name": "tiny", "best": 0.5})
    return tmp_path / "model"


def _edit_json(path: Path, change: Any) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_saved_model_loads_with_the_same_embeddings_and_encoding(
    saved: Path, encoder: BiEncoder, tokenizer: Any, encoding: Encoding
) -> None:
    _, loaded_tokenizer, loaded_encoding, facts = folder.load(saved)
    assert loaded_encoding == encoding
    assert facts == {"name": "tiny", "best": 0.5, "weights": "full", "own_code": False}
    assert loaded_tokenizer("camel caravan")["input_ids"] == tokenizer("camel caravan")["input_ids"]
    assert torch.equal(embedded(saved), embedded(encoder))


def test_an_adapter_folder_encodes_a_collection_as_the_model_that_was_saved(
    saved: Path, tokenizer: Any, encoding: Encoding, collection: Collection, tmp_path: Path
) -> None:
    model = save_adapter(saved, tmp_path / "adapter", tokenizer, encoding)
    opened = Inference(tmp_path / "adapter", precision="float32", token_budget=256)
    ids = Templates(tokenizer, encoding).passages(collection.corpus.get(np.arange(20)))
    with torch.no_grad():
        expected = model.embed(pack(ids, 99))
        found = opened.model.embed(pack(ids, 99).to(opened.device)).cpu()
        base = folder.load(saved)[0].embed(pack(ids, 99))
    close(found, expected, atol=1e-4)
    assert not torch.allclose(base, expected, atol=1e-2)


def test_an_adapter_keeps_the_revision_of_its_base(
    saved: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    save_adapter(saved, tmp_path / "adapter", tokenizer, encoding, revision="0123abc")
    assert adapter_base(tmp_path / "adapter") == (str(saved), "0123abc")


@pytest.mark.parametrize("change", ["pop", "cut"])
def test_missing_and_misshapen_weights_are_refused(change: str, saved: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        norm = tensors.pop("norm.weight")
        if change == "cut":
            tensors["norm.weight"] = norm[:-1].clone()

    edit_weights(saved / "model.safetensors", edit)
    # transformers refuses a shape itself, so both codes are right.
    code = "weights-mismatch" if change == "pop" else "unreadable"
    with refused(code, str(saved)):
        folder.load(saved)


@pytest.mark.parametrize("loader", ["folder", "released"])
def test_weights_of_a_layer_beyond_the_configs_number_are_refused(loader: str, saved: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] -= 1
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:-1]

    _edit_json(saved / "config.json", edit)
    with refused("weights-mismatch", "layers.1.", "not used"):
        folder.load(saved) if loader == "folder" else Pretrained(str(saved)).model(None)


def test_a_released_model_may_have_heads_and_a_model_folder_may_not(saved: Path) -> None:
    heads = ["lm_head.weight", "classifier.weight", "pooler.dense.weight", "cls.predictions.bias"]
    edit_weights(
        saved / "model.safetensors",
        lambda tensors: tensors.update({h: torch.ones(3, 3) for h in heads}),
    )
    Pretrained(str(saved)).model(None)
    with refused("weights-mismatch", "4 weights", "classifier.weight not used"):
        folder.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_by_its_name_and_folder(
    value: float, dtype: torch.dtype, saved: Path
) -> None:
    name = "layers.0.self_attn.q_proj.weight"
    edit_weights(saved / "model.safetensors", lambda tensors: tensors[name][3].fill_(value))
    with refused("not-finite", str(saved), name):
        folder.load(saved, dtype)


def test_an_adapter_or_head_that_is_not_finite_is_refused(
    saved: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    save_adapter(saved, tmp_path / "a", tokenizer, encoding)
    edit_weights(tmp_path / "a" / folder.ADAPTER, lambda t: next(iter(t.values())).fill_(torch.nan))
    with refused("not-finite", str(tmp_path / "a")):
        folder.load(tmp_path / "a")
    own = Encoding(kind="reranker", pooling="cls", query_length=16, passage_length=24)
    scorer: Any = with_head(model_of("bert"))
    with torch.no_grad():
        scorer.score.weight[0, 0] = float("nan")
    folder.save(tmp_path / "m", CrossEncoder(scorer, own), tokenizer, own, {})
    with refused("not-finite", "score.safetensors", "score.weight"):
        folder.load(tmp_path / "m")


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("caravan.json", lambda text: "{"),
        *((name, lambda text: DEEP) for name in ("config.json", "caravan.json", "tokenizer.json")),
        ("config.json", lambda text: json.dumps({**json.loads(text), "rms_norm_eps": "small"})),
        ("config.json", lambda text: json.dumps({**json.loads(text), "num_hidden_layers": 2**31})),
        ("tokenizer.json", lambda text: text.replace('"type":"BPE"', '"type":"BPE2"', 1)[:-1]),
    ],
)
def test_a_damaged_json_file_is_reported_by_its_folder(file: str, damage: Any, saved: Path) -> None:
    (saved / file).write_text(damage((saved / file).read_text()))
    with refused("unreadable", str(saved)):
        folder.load(saved)


def test_a_truncated_weights_file_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with refused("unreadable", str(saved)):
        folder.load(saved)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer_config.json", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(file: str, saved: Path) -> None:
    (saved / file).unlink()
    with refused("incomplete-folder", str(saved)):
        folder.load(saved)


def test_a_folder_without_encoding_is_refused_with_the_command_to_adopt_it(saved: Path) -> None:
    (saved / "caravan.json").unlink()
    with refused("not-a-model-folder", f"backbone=hf backbone.name={saved}"):
        folder.load(saved)


def test_the_digest_follows_weights_encoding_and_an_adapters_base(
    saved: Path, encoder: BiEncoder, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    save_adapter(saved, tmp_path / "adapter", tokenizer, encoding)
    before, of_adapter = folder_digest(saved), folder_digest(tmp_path / "adapter")
    folder.save(saved, encoder, tokenizer, encoding, {"name": "another card"})
    assert (folder_digest(saved), folder_digest(tmp_path / "adapter")) == (before, of_adapter)
    with torch.no_grad():
        next(encoder.parameters())[0, 0] += 1
    folder.save(saved, encoder, tokenizer, encoding, {})
    assert folder_digest(saved) != before
    assert folder_digest(tmp_path / "adapter") != of_adapter


def test_the_digest_of_files_leaves_the_encoding_and_the_card_out(saved: Path) -> None:
    before = files_digest(saved)
    (saved / "caravan.json").write_text("{}")
    (saved / "README.md").write_text("another card")
    assert files_digest(saved) == before
    (saved / "tokenizer.json").write_text("{}")
    assert files_digest(saved) != before
