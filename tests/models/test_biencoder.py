from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.small import ARCHITECTURES, TEXTS, close, model_of, padded
from tests.refusals import refused
from torch import Tensor

from caravan.data.batch import pack
from caravan.encoding import Encoding, read_encoding
from caravan.export import sentence_transformers, transformers
from caravan.models import folder
from caravan.models.biencoder import BiEncoder
from caravan.models.pooling import pooling_of

PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda states: states[-1],
    "cls": lambda states: states[0],
    "mean": lambda states: states.mean(dim=0),
}


@pytest.mark.parametrize("pooling", PLACES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embeddings_equal_plain_transformers_in_any_batch_and_padding(
    name: str, pooling: str
) -> None:
    backbone = model_of(name)
    model = BiEncoder(backbone, Encoding(pooling=pooling))
    with torch.no_grad():
        states = [backbone(input_ids=torch.tensor([t])).last_hidden_state[0] for t in TEXTS]
        expected = torch.stack([PLACES[pooling](rows) for rows in states])
        expected = torch.nn.functional.normalize(expected, dim=-1)
        batched = [model(*padded(TEXTS, side)) for side in ("left", "right")]
        for found in (*batched, model.embed(pack(TEXTS, token_budget=20))):
            close(found, expected)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("last", [6.0, 7.0]), ("cls", [0.0, 1.0]), ("mean", [3.0, 4.0]), ("slots", [4.5, 5.5])],
)
def test_pooling_leaves_padding_out_and_is_float32(pooling: str, expected: list[float]) -> None:
    """Real tokens are found by the mask, whatever their ids: EOS and padding may be one token."""
    states = torch.tensor([[0.0, 1.0], [3.0, 4.0], [6.0, 7.0], [99.0, 99.0]])
    slotted = dict.fromkeys(("query_template", "passage_template"), "{text} {next}")
    settings: Any = {"slots": 2, "append_eos": False, **slotted} if pooling == "slots" else {}
    pool = pooling_of(Encoding(pooling=pooling, **settings))
    found = pool(states[None].bfloat16(), torch.tensor([[1, 1, 1, 0]]))
    assert found.dtype == torch.float32
    assert found.tolist() == [expected]


def test_unnormalized_embeddings_are_left_as_they_are(
    encoder: BiEncoder, encoding: Encoding
) -> None:
    raw = BiEncoder(encoder.backbone, replace(encoding, normalize=False))
    texts = pack(TEXTS, 100)
    with torch.no_grad():
        close(torch.nn.functional.normalize(raw.embed(texts), dim=-1), encoder.embed(texts))
        assert not torch.allclose(raw.embed(texts).norm(dim=-1), torch.ones(len(TEXTS)))


class Max:
    def __call__(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = attention_mask.unsqueeze(-1) == 0
        return states.float().masked_fill(hidden, -torch.inf).amax(dim=1)


@pytest.fixture
def custom(monkeypatch: pytest.MonkeyPatch) -> Encoding:
    """A user's module with a pooling; remembers in `imported` whether it was looked up."""
    module: Any = types.ModuleType("users_poolings")
    module.Max, module.Weighted = Max, lambda: torch.nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "users_poolings", module)
    return Encoding(pooling="users_poolings.Max", query_length=16, passage_length=24)


def test_a_users_pooling_is_used_and_its_folder_needs_the_command_to_trust_it(
    custom: Encoding, tokenizer: Any, tmp_path: Path
) -> None:
    backbone = model_of("qwen3", vocab_size=400)
    model = BiEncoder(backbone, custom)
    folder.save(tmp_path / "m", model, tokenizer, custom, {})
    with refused("remote-code", "trust_remote_code=true"):
        folder.load(tmp_path / "m")
    assert read_encoding(tmp_path / "m")[1]["own_code"] is True
    for attention in ("auto", "unpadded"):
        loaded = folder.load(tmp_path / "m", attention=attention, trust_remote_code=True)[0]
        with torch.no_grad():
            for text, found in zip(TEXTS, loaded.embed(pack(TEXTS, 40)), strict=True):
                states = backbone(input_ids=torch.tensor([text])).last_hidden_state[0]
                close(found, torch.nn.functional.normalize(states.amax(dim=0), dim=0))
    for exporter in (sentence_transformers, transformers):
        with refused("remote-code", str(tmp_path / "m")):
            exporter.export(tmp_path / "m", tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("users_poolings.Min", "unreadable"),
        ("nowhere.Max", "unreadable"),
        ("users_poolings.Weighted", "invalid-pooling"),
    ],
)
def test_a_path_that_leads_to_no_pooling_is_refused(path: str, code: str, custom: Encoding) -> None:
    with refused(code, f"encoding.pooling={path}"):
        BiEncoder(model_of("qwen3"), replace(custom, pooling=path))


@pytest.mark.parametrize("normalize", [True, False])
def test_shorter_embeddings_are_the_first_dimensions_normalized_again(
    encoder: BiEncoder, encoding: Encoding, normalize: bool
) -> None:
    whole = replace(encoding, normalize=normalize)
    short = BiEncoder(encoder.backbone, replace(whole, dim=8))
    texts = pack(TEXTS, 100)
    with torch.no_grad():
        expected = BiEncoder(encoder.backbone, whole).embed(texts)[:, :8]
        expected = torch.nn.functional.normalize(expected, dim=-1) if normalize else expected
        close(short.embed(texts), expected)
    with refused("dim-too-large", "encoding.dim is 33", "32"):
        BiEncoder(encoder.backbone, replace(encoding, dim=33))
