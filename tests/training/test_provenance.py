"""A run_dir belongs to one run: what is refused, what may change, what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.commands import ROOT, SHORT, evaluate, train
from tests.refusals import refused
from tests.tiny import write_beir

from caravan import manifests
from caravan.cli.compose import compose
from caravan.cli.train import train as train_config
from caravan.training.provenance import file_digests


def test_another_run_in_the_same_run_dir_is_refused(
    short: Path, beir: Path, tmp_path: Path
) -> None:
    other, before = write_beir(tmp_path / "tiny", seed=1), file_digests(short)
    for overrides, change in (
        (["optimizer.lr=0.5"], "optimizer.lr: 0.01 -> 0.5"),
        (["resume=true", "seed=3"], "seed: 0 -> 3"),
        (["resume=true", f"data.path={other}"], "collection: "),
    ):
        with refused("run-dir-occupied", change):
            train(beir, short, *SHORT, *overrides)
    assert file_digests(short) == before
    assert (short / "model.manifest.json").exists()


@pytest.mark.parametrize(
    "lost",
    [
        (),
        pytest.param(("metrics.json",), marks=pytest.mark.slow),
        pytest.param(("config.yaml.manifest.json",), marks=pytest.mark.slow),
    ],
    ids=["whole", "early", "old"],
)
def test_a_training_does_not_replace_an_evaluation(
    lost: tuple[str, ...], beir: Path, tmp_path: Path
) -> None:
    evaluate(beir, tmp_path / "run", "bm25")
    for name in lost:
        (tmp_path / "run" / name).unlink()
    before = file_digests(tmp_path / "run")
    with refused("run-dir-occupied", "evaluation"):
        train(beir, tmp_path / "run")
    assert file_digests(tmp_path / "run") == before


def test_a_run_can_be_made_longer(
    copied: Path, beir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(beir, copied, *SHORT, "trainer.max_steps=4", "resume=true")
    assert "trainer.max_steps: 2 -> 4" in caplog.text
    assert json.loads((copied / "metrics.json").read_text())["updates"] == 4


def test_other_weights_in_the_backbones_folder_are_another_run(copied: Path, beir: Path) -> None:
    given = [
        *("backbone=hf", f"backbone.name={copied / 'model'}", "trainer.max_steps=0"),
        *("data=beir", f"data.path={beir}", f"run_dir={copied.parent / 'adopted'}"),
    ]
    train_config(compose(ROOT / "conf", "train", given))
    weights = copied / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with refused("run-dir-occupied", "backbone_digest: "):
        train_config(compose(ROOT / "conf", "train", [*given, "resume=true"]))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param("model/model.safetensors", Path.unlink, marks=pytest.mark.slow),
        ("metrics.json", lambda path: path.write_text(path.read_text() + " ")),
    ],
    ids=["lost weights", "changed metrics"],
)
def test_the_files_of_a_finished_run_are_verified(
    name: str, damage: Any, copied: Path, beir: Path
) -> None:
    before = json.loads((copied / "metrics.json").read_text())
    content = (copied / name).read_bytes()
    damage(copied / name)
    (copied / "model" / "README.md").write_text("another card")
    with refused("changed-file", Path(name).name):
        train(beir, copied, *SHORT)
    assert train(beir, copied, *SHORT, "resume=true") == before["best"]
    if name != "metrics.json":  # which has the seconds
        assert (copied / name).read_bytes() == content


@pytest.mark.slow
def test_other_versions_are_reported(
    copied: Path, beir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    versions = manifests.versions()
    train(beir, copied, *SHORT)
    assert "under other versions" not in caplog.text
    monkeypatch.setattr(manifests, "versions", lambda *_: {**versions, "torch": "9"})
    train(beir, copied, *SHORT)
    assert f"torch {versions['torch']} -> 9" in caplog.text
    caplog.clear()
    manifests.remove(copied / "model")
    train(beir, copied, *SHORT, "resume=true")
    assert f"torch {versions['torch']} -> 9" in caplog.text


@pytest.mark.slow
def test_a_run_dir_of_one_character_changes_no_recorded_number(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(beir, Path("1"), *SHORT)
    recorded = manifests.read(Path("1/config.yaml"))
    assert recorded is not None
    assert recorded["inputs"]["optimizer"]["lr"] == 0.01
