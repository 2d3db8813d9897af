"""A run that is resumed: from damaged checkpoints, elsewhere, under other versions."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import train

from caravan import manifests
from caravan.errors import InputError
from caravan.training.checkpoints import damage

STEPS = ("trainer.val_check_interval=1", "callbacks.last.every_n_steps=1")
WEIGHTS = "model/model.safetensors"


def _state(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def _other_shape(state: dict[str, Any]) -> None:
    name = next(iter(state["state_dict"]))
    state["state_dict"][name] = torch.zeros(3, 5)


def _weight(state: dict[str, Any]) -> torch.Tensor:
    weight: torch.Tensor = next(iter(state["state_dict"].values()))
    return weight


def _other_type(state: dict[str, Any]) -> None:
    name = next(iter(state["state_dict"]))
    state["state_dict"][name] = state["state_dict"][name].int()


def _without_callback_state(state: dict[str, Any]) -> None:
    state["callbacks"] = {name: {} for name in state["callbacks"]}


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "a flipped bit": _flipped,
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
    "a pickle in torch's archive": lambda path: torch.save({"state_dict": Path("x")}, path),
    "other shapes": lambda path: _state(path, _other_shape),
    "no optimizer": lambda path: _state(path, lambda state: state.pop("optimizer_states")),
    "no weights": lambda path: _state(path, lambda state: state["state_dict"].clear()),
    "a list": lambda path: torch.save([1], path),
    "NaN": lambda path: _state(path, lambda state: _weight(state).fill_(torch.nan)),
    "other types": lambda path: _state(path, _other_type),
    "no state of a callback": lambda path: _state(path, _without_callback_state),
}


@pytest.fixture(scope="module")
def short(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two updates."""
    run_dir = tmp_path_factory.mktemp("short") / "run"
    train(beir, run_dir, *STEPS, "trainer.max_steps=2")
    return run_dir


@pytest.fixture
def killed(short: Path, tmp_path: Path) -> Path:
    """The same, killed before its model folder was written."""
    shutil.copytree(short, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "model.manifest.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_to_a_checkpoint_is_noticed(kind: str, short: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    shutil.copy(short / "checkpoints" / "last.ckpt", path)
    assert damage(path) is None
    DAMAGES[kind](path)
    reason = damage(path)
    assert reason is not None
    assert "weights_only" not in reason


def test_a_damaged_last_checkpoint_is_replaced_by_the_best(
    killed: Path, short: Path, beir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (killed / "checkpoints" / "last.ckpt").write_bytes(b"")
    train(beir, killed, *STEPS, "trainer.max_steps=2", "resume=true")
    assert "last.ckpt is damaged (it is empty); resuming from " in caplog.text
    assert (killed / WEIGHTS).read_bytes() == (short / WEIGHTS).read_bytes()


@pytest.mark.parametrize("gone", [True, False])
def test_without_a_whole_checkpoint_a_resume_is_refused(
    killed: Path, beir: Path, gone: bool
) -> None:
    (killed / "checkpoints" / "last.ckpt").write_bytes(b"")
    best = killed / "checkpoints" / "best.ckpt"
    best.unlink() if gone else best.write_bytes(b"x")
    with pytest.raises(InputError, match=r"last\.ckpt is damaged .*; put back a copy .* or remove"):
        train(beir, killed, *STEPS, "trainer.max_steps=2", "resume=true")


@pytest.mark.parametrize("gone", [True, False])
def test_a_lost_best_checkpoint_is_not_replaced_by_the_last_weights(
    killed: Path, beir: Path, gone: bool
) -> None:
    best = killed / "checkpoints" / "best.ckpt"
    best.unlink() if gone else DAMAGES["cut short"](best)
    with pytest.raises(InputError, match=r"best\.ckpt, the best checkpoint, is damaged"):
        train(beir, killed, *STEPS, "trainer.max_steps=2", "resume=true")
    assert not (killed / "model").exists()


def test_a_checkpoint_that_lightning_cannot_restore_is_named(killed: Path, beir: Path) -> None:
    last = killed / "checkpoints" / "last.ckpt"
    _state(last, lambda state: state["loops"].clear())
    with pytest.raises(InputError, match=r"last\.ckpt cannot be restored .*; remove it to resume"):
        train(beir, killed, *STEPS, "trainer.max_steps=2", "resume=true")


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_was_moved_keeps_its_best_checkpoint(
    beir: Path, tmp_path: Path, steps: int
) -> None:
    falling = (*STEPS, "optimizer.lr=0.5", "optimizer.schedule=constant")
    train(beir, tmp_path / "whole", *falling, f"trainer.max_steps={steps}")
    train(beir, tmp_path / "half", *falling, "trainer.max_steps=2")
    shutil.rmtree(tmp_path / "half" / "model")
    (tmp_path / "half" / "model.manifest.json").unlink()
    (tmp_path / "half").rename(tmp_path / "moved")
    train(beir, tmp_path / "moved", *falling, f"trainer.max_steps={steps}", "resume=true")
    whole, moved = (tmp_path / name for name in ("whole", "moved"))
    best = [json.loads((run / "metrics.json").read_text())["best"] for run in (whole, moved)]
    assert best[0] == best[1] is not None
    assert (moved / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    states = [
        torch.load(run / "checkpoints" / "best.ckpt", weights_only=True) for run in (whole, moved)
    ]
    assert states[0]["callbacks"] == states[1]["callbacks"]
    assert str(tmp_path) not in str(states[0])


@pytest.mark.parametrize(("file", "gone"), [("model.safetensors", True), ("caravan.json", False)])
def test_a_finished_model_folder_is_verified(
    short: Path, beir: Path, tmp_path: Path, file: str, gone: bool
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(short, run_dir)
    path = run_dir / "model" / file
    path.unlink() if gone else _flipped(path)
    (run_dir / "model" / "README.md").write_text("another card")
    with pytest.raises(InputError, match=f"{file} is missing or has changed .* resume=true"):
        train(beir, run_dir, *STEPS, "trainer.max_steps=2")
    train(beir, run_dir, *STEPS, "trainer.max_steps=2", "resume=true")
    assert path.read_bytes() == (short / "model" / file).read_bytes()


def test_the_metrics_of_a_finished_training_are_verified(
    short: Path, beir: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(short, run_dir)
    metrics = run_dir / "metrics.json"
    _flipped(metrics)
    with pytest.raises(InputError, match=r"run/metrics\.json is missing or has changed"):
        train(beir, run_dir, *STEPS, "trainer.max_steps=2")
    best = train(beir, run_dir, *STEPS, "trainer.max_steps=2", "resume=true")
    assert json.loads(metrics.read_text())["best"] == best is not None


def test_trainings_of_other_versions_are_reported(
    short: Path, killed: Path, beir: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level("INFO")
    record = manifests.read(short / "model")
    assert record is not None
    assert record["facts"]["versions"] == manifests.versions()
    train(beir, short, *STEPS, "trainer.max_steps=2")
    assert "versions" not in caplog.text
    monkeypatch.setattr(
        manifests, "versions", lambda *_: {**record["facts"]["versions"], "torch": "9"}
    )
    train(beir, short, *STEPS, "trainer.max_steps=2")
    assert "was trained under other versions: torch " in caplog.text
    train(beir, killed, *STEPS, "trainer.max_steps=2", "resume=true")
    assert "resumed under other versions, " in caplog.text
    assert "-> 9" in caplog.text


def test_a_training_without_a_logger_runs(beir: Path, tmp_path: Path) -> None:
    train(beir, tmp_path / "run", "trainer.max_steps=1", "logger.tensorboard=null")
    assert not (tmp_path / "run" / "tensorboard").exists()
