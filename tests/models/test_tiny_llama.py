from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import train
from tests.models.small import close
from tests.refusals import refused
from tests.tiny import tiny_backbone

from caravan.data.collection import Collection
from caravan.models import folder, tiny_llama
from caravan.models.bidirectional import is_causal
from caravan.models.tiny_llama import TinyLlama


def test_the_bpe_is_trained_once_a_collection(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, trained = tiny_backbone(), []
    train = tiny_llama.train_bpe

    def count(*given: Any) -> Any:
        trained.append(given)
        return train(*given)

    monkeypatch.setattr(tiny_llama, "train_bpe", count)
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


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_copying_initializes_the_product_of_value_and_output(share: float, tokenizer: Any) -> None:
    shape = {"vocab_size": 400, "hidden_size": 32, "heads": 2, "intermediate_size": 48}
    model: Any = TinyLlama(**shape, copying=share).model(tokenizer)  # type: ignore[arg-type]
    for layer in model.layers:
        product = layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight
        if share:
            close(product, share * torch.eye(32))
        else:
            assert product.abs().max() < 0.05


@pytest.mark.parametrize(
    ("settings", "code", "place"),
    [
        ({"hidden_size": 32, "heads": 3}, "indivisible-width", "heads=3"),
        ({"copying": -1}, "out-of-range", "backbone.copying"),
    ],
)
def test_an_impossible_shape_is_refused(settings: dict[str, Any], code: str, place: str) -> None:
    with refused(code, place):
        TinyLlama(**settings)


def test_it_can_be_bidirectional(beir: Path, tmp_path: Path) -> None:
    train(beir, tmp_path / "run", "backbone.bidirectional=true", "trainer.max_steps=0")
    assert not is_causal(folder.load(tmp_path / "run" / "model")[0].backbone)


@pytest.mark.parametrize("damage", ["other merges", "empty", "cut"])
def test_a_tokenizer_that_is_not_as_it_was_written_is_trained_again(
    damage: str, tmp_path: Path, collection: Collection
) -> None:
    backbone = tiny_backbone()
    first = backbone.tokenizer(collection, tmp_path)
    path = tmp_path / "tokenizers" / f"bpe-400-{collection.digest[:16]}.json"
    written = path.read_text()
    planted = {"empty": "", "cut": written[:99], "other merges": written.replace("Ġ", "G")}
    path.write_text(planted[damage])
    again = backbone.tokenizer(collection, tmp_path)
    assert path.read_text() == written
    assert again.get_vocab() == first.get_vocab()
