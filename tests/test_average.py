"""The average of model folders against float64 means of the loaded weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.refusals import refused
from tests.tiny import tiny_backbone
from torch import Tensor

from caravan.average import average, main
from caravan.encoding import Encoding, read_encoding
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.digests import folder_digest

FACTS = {"base_model": "tiny", "best": 0.5, "updates": 3}


def _shaken(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def base(tokenizer: Any, encoding: Encoding, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = BiEncoder(tiny_backbone().model(tokenizer), encoding)
    folder.save(tmp_path / "base", network, tokenizer, encoding, FACTS)
    return tmp_path / "base"


@pytest.fixture
def member(base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path) -> Callable[..., Path]:
    """A model folder of the base with other weights, or of an adapter on it."""

    def saved(seed: int, lora: LoRA | None = None, on: Path = base, **settings: Any) -> Path:
        transformer = Pretrained(str(on)).model(tokenizer)
        if lora is not None:
            transformer = lora.apply(transformer)
        own = replace(encoding, **settings)
        network = BiEncoder(_shaken(transformer, seed), own)
        facts = {**FACTS, "updates": seed}
        folder.save(tmp_path / f"seed{seed}", network, tokenizer, own, facts)
        return tmp_path / f"seed{seed}"

    return saved


def _weights(model: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = folder.load(model)[0].state_dict()
    return state


@pytest.mark.parametrize(
    "adapters",
    [
        [None] * 3,
        [LoRA(rank=2, alpha=4), LoRA(rank=4, alpha=2, rslora=True), LoRA(rank=3, alpha=9)],
    ],
    ids=["whole", "adapters"],
)
def test_weights_are_the_mean_of_the_members(
    member: Callable[..., Path], base: Path, tmp_path: Path, adapters: list[LoRA | None]
) -> None:
    models = [member(seed, lora) for seed, lora in enumerate(adapters, 1)]
    average(models, tmp_path / "average")
    members = [_weights(model) for model in models]
    found = _weights(tmp_path / "average")
    before = _weights(base)
    assert found.keys() == members[0].keys()
    moved = 0
    for name, weight in found.items():
        mean = torch.stack([of[name].double() for of in members]).mean(dim=0)
        torch.testing.assert_close(weight.double(), mean, atol=1e-6, rtol=1e-6, msg=name)
        moved += not torch.allclose(weight, before[name], atol=1e-3)
    assert moved >= 14
    encoding, facts = read_encoding(tmp_path / "average")
    assert encoding == read_encoding(models[0])[0]
    assert facts["base_model"] == "tiny"
    assert not {"best", "updates"} & facts.keys()
    assert facts["average"] == {str(model): folder_digest(model) for model in models}
    assert (tmp_path / "average" / "README.md").is_file()
    written = folder_digest(tmp_path / "average")
    average(models, tmp_path / "average")  # it exists already
    assert folder_digest(tmp_path / "average") == written
    with refused("output-occupied", "average"):
        average(models[:2], tmp_path / "average")


def test_models_with_other_settings_are_refused_by_name(
    member: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    first, output = member(1), tmp_path / "average"
    others = {
        "encoding.query_length": member(2, query_length=12),
        "weights (full or adapter)": member(3, LoRA(rank=2, alpha=4)),
    }
    tokenized, configured, narrower = (member(seed) for seed in (4, 5, 6))
    vocabulary = json.loads((tokenized / "tokenizer.json").read_text())
    (tokenized / "tokenizer.json").write_text(json.dumps({**vocabulary, "truncation": None}))
    config = json.loads((configured / "config.json").read_text())
    (configured / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    others |= {"tokenizer.json": tokenized, "config.json: rms_norm_eps": configured}
    for setting, other in others.items():
        with refused("settings-differ", setting, str(first), str(other)):
            average([first, other], output)
    weights = load_file(narrower / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name][:-1].clone()}, narrower / "model.safetensors")
    with refused("weights-mismatch", name, str(narrower)):
        average([first, narrower], output)
    on_another = member(7, LoRA(rank=2, alpha=4), on=configured)
    with refused("settings-differ", "the base of the adapter"):
        average([others["weights (full or adapter)"], on_another], output)
    with refused("too-few-models"):
        average([first, first], output)
    assert not output.exists()


def test_the_command_reports_a_mistake_in_a_sentence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["average", str(base), str(tmp_path / "none"), "--output", str(tmp_path / "average")]
    monkeypatch.setattr(sys, "argv", line)
    assert main() == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
