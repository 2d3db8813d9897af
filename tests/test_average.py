"""The average of model folders against float64 means of the loaded weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from tests.commands import evaluate
from tests.conftest import Call
from tests.models.small import shaken
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
from caravan.report.compare import holm
from caravan.report.tables import p_value

FACTS = {"base_model": "tiny", "best": 0.5, "updates": 3}


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
        network = BiEncoder(shaken(transformer, seed=seed), own)
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


@pytest.fixture
def command(call: Call, tmp_path: Path) -> Call:
    def run(models: list[Path], *evaluated: object) -> tuple[int, str, str]:
        return call(main, *models, "--output", tmp_path / "average/model", *evaluated)

    return run


@pytest.mark.slow
def test_the_average_is_evaluated_and_tested_against_each_member(
    command: Call, member: Callable[..., Path], beir: Path, tmp_path: Path
) -> None:
    models, run_dir = [member(1), member(2)], tmp_path / "dev"
    settings = ("precision=float32", "measures=[nDCG@10]")
    data = ("data=beir", f"data.path={beir}", f"cache_dir={tmp_path / 'cache'}", "num_workers=0")
    given = ("--evaluate", *data, f"run_dir={run_dir}", *settings)
    code, shown, _ = command(models, *given)
    assert code == 0
    values = []
    for model in (*models, tmp_path / "average/model"):
        alone = evaluate(
            beir, tmp_path / f"alone/{model.parent.name}{model.name}", model, *settings
        )
        name = model.parent.name if model.name == "model" else model.name
        found = json.loads((run_dir / name / "metrics.json").read_text())
        assert found["per_query"] == alone["per_query"]
        values.append([*alone["per_query"]["nDCG@10"].values()])
    p = [stats.ttest_rel(values[-1], of).pvalue for of in values[:-1]]
    sentence = shown.strip().splitlines()[-1]
    assert p[0] != p[1]
    for of, corrected in zip(values, holm(p), strict=False):
        assert f"{abs(sum(values[-1]) - sum(of)) / len(of):.4f}" in sentence or corrected >= 0.05
        assert p_value(corrected) in sentence
    assert {path.name for path in run_dir.iterdir()} == {"seed1", "seed2", "average", "store"}
    code, again, _ = command(models, *given)  # reuses the average and the evaluations
    assert (code, again) == (0, shown)


def test_a_mistake_is_found_before_the_models_are_averaged(
    command: Call, member: Callable[..., Path], tmp_path: Path
) -> None:
    models = [member(1), member(2)]
    for given, place in (
        ([[models[0], tmp_path / "none"]], str(tmp_path / "none")),
        ([models, "--evaluate", "data.pth=x"], "data.pth"),
        ([models, "--evaluate", "retriever=bm25"], "retriever"),
    ):
        code, _, error = command(*given)
        assert (code, place in error) == (2, True)
    assert not (tmp_path / "average").exists()
