"""A run resumes from damaged checkpoints, or refuses to; and wherever its folder was moved."""

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
from tests.refusals import refused

from caravan.training.checkpoints import damage

STEPS = (
    "trainer.val_check_interval=1",
    "callbacks.resume_point.every_n_steps=1",
    "trainer.max_steps=2",
)
WEIGHTS = "model/model.safetensors"


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the state in a checkpoint and save it as torch does."""

    def damaging(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damaging


def _first_weight(new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(state: dict[str, Any]) -> None:
        name = next(iter(state["state_dict"]))
        state["state_dict"][name] = new(state["state_dict"][name])

    return _state(change)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "a flipped bit": _flip,
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
    "a pickle in torch's archive": lambda path: torch.save({"state_dict": Path("x")}, path),
    "a list": lambda path: torch.save([1], path),
    "no optimizer": _state(lambda state: state.pop("optimizer_states")),
    "no weights": _state(lambda state: state["state_dict"].clear()),
    "a missing weight": _state(
        lambda state: state["state_dict"].pop(next(iter(state["state_dict"])))
    ),
    "a loop without progress": _state(lambda state: state["loops"].update(fit_loop={})),
    "no state of a callback": _state(
        lambda state: state.update(callbacks={name: {} for name in state["callbacks"]})
    ),
    "other shapes": _first_weight(lambda _: torch.zeros(3, 5)),
    "other types": _first_weight(lambda weight: weight.int()),
    "NaN": _first_weight(lambda weight: weight * torch.nan),
}


@pytest.fixture(scope="module")
def short(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two updates."""
    run_dir = tmp_path_factory.mktemp("short") / "run"
    train(beir, run_dir, *STEPS)
    return run_dir


@pytest.fixture
def killed(short: Path, tmp_path: Path) -> Path:
    """The same, killed before its model folder was written."""
    shutil.copytree(short, tmp_path / "run", ignore=shutil.ignore_patterns("model*"))
    return tmp_path / "run"


def test_every_kind_of_damage_is_found(short: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for kind, damaging in DAMAGES.items():
        shutil.copy(short / "checkpoints" / "last.ckpt", path)
        assert damage(path) is None
        damaging(path)
        reason = damage(path)
        assert reason is not None, kind
        assert "weights_only" not in reason


def test_a_damaged_last_checkpoint_is_replaced_by_the_best(
    killed: Path, short: Path, beir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES["empty"](killed / "checkpoints" / "last.ckpt")
    train(beir, killed, *STEPS, "resume=true")
    assert "resuming from " in caplog.text
    assert (killed / WEIGHTS).read_bytes() == (short / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("damages", "place"),
    [
        ({"last.ckpt": "empty", "best.ckpt": "missing"}, "last.ckpt"),
        ({"last.ckpt": "empty", "best.ckpt": "zeros"}, "last.ckpt"),
        ({"best.ckpt": "missing"}, "best.ckpt"),
        ({"best.ckpt": "truncated"}, "best.ckpt"),
        ({"last.ckpt": "no loops"}, "last.ckpt"),
    ],
)
def test_without_an_intact_checkpoint_a_resume_is_refused(
    killed: Path, beir: Path, damages: dict[str, str], place: str
) -> None:
    kinds = DAMAGES | {"no loops": _state(lambda state: state["loops"].clear())}
    for name, kind in damages.items():
        kinds[kind](killed / "checkpoints" / name)
    with refused("damaged-checkpoint", place):
        train(beir, killed, *STEPS, "resume=true")
    assert not (killed / "model").exists()


@pytest.mark.parametrize("steps", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.slow
def test_a_run_that_was_moved_keeps_its_best_checkpoint(
    beir: Path, tmp_path: Path, steps: int
) -> None:
    falling = (*STEPS, "optimizer.lr=0.5", "optimizer.schedule=constant")
    train(beir, tmp_path / "whole", *falling, f"trainer.max_steps={steps}")
    train(beir, tmp_path / "half", *falling)
    shutil.rmtree(tmp_path / "half" / "model")
    (tmp_path / "half" / "model.manifest.json").unlink()
    (tmp_path / "half").rename(tmp_path / "moved")
    train(beir, tmp_path / "moved", *falling, f"trainer.max_steps={steps}", "resume=true")
    whole, moved = (tmp_path / name for name in ("whole", "moved"))
    best = [json.loads((run / "metrics.json").read_text())["best"] for run in (whole, moved)]
    assert best[0] == best[1] is not None
    assert (moved / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    paths = [run / "checkpoints" / "best.ckpt" for run in (whole, moved)]
    states = [torch.load(path, weights_only=True)["callbacks"] for path in paths]
    assert states[0] == states[1]
    assert str(tmp_path) not in str(states[0])
