"""A resume refuses damaged checkpoints, and works wherever the folder of the run was moved."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import SHORT, train
from tests.refusals import refused

from caravan.training.checkpoints import RESUMED, read_checkpoint

WEIGHTS = "model/model.safetensors"


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the state in a checkpoint and save it as torch does."""

    def damaging(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damaging


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _diverge(state: dict[str, Any]) -> None:
    next(iter(state["state_dict"].values())).mul_(torch.nan)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "a flipped bit": _flip,
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
    "a pickle in torch's archive": lambda path: torch.save({"state_dict": Path("x")}, path),
    "a list": lambda path: torch.save([1], path),
    "weights alone": _state(lambda state: state.pop("optimizer_states")),
    "no weights": _state(lambda state: state["state_dict"].clear()),
    "no loops": _state(lambda state: state["loops"].clear()),
    "NaN": _state(_diverge),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_kind_of_damage_is_found(kind: str, short: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    shutil.copy(short / "checkpoints" / "last.ckpt", path)
    read_checkpoint(path, RESUMED)
    DAMAGES[kind](path)
    with refused("damaged-checkpoint", str(path)) as caught:
        read_checkpoint(path, RESUMED)
    assert "weights_only" not in str(caught.value)


def test_a_damaged_last_checkpoint_is_refused_and_the_best_may_replace_it(
    killed: Path, short: Path, beir: Path
) -> None:
    last, best = (killed / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    DAMAGES["empty"](last)
    with refused("damaged-checkpoint", str(last), "best.ckpt"):
        train(beir, killed, *SHORT, "resume=true")
    assert not (killed / "model").exists()
    shutil.copy(best, last)
    train(beir, killed, *SHORT, "resume=true")
    assert (killed / WEIGHTS).read_bytes() == (short / WEIGHTS).read_bytes()


def test_a_damaged_best_checkpoint_is_refused(killed: Path, beir: Path) -> None:
    DAMAGES["truncated"](killed / "checkpoints" / "best.ckpt")
    with refused("damaged-checkpoint", "best.ckpt"):
        train(beir, killed, *SHORT, "resume=true")
    assert not (killed / "model").exists()


def test_the_best_checkpoint_of_another_model_is_refused(killed: Path, beir: Path) -> None:
    _state(lambda state: state["state_dict"].popitem())(killed / "checkpoints" / "best.ckpt")
    with refused("other-model", "1 trainable weights are missing"):
        train(beir, killed, *SHORT, "resume=true")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_that_was_moved_keeps_its_best_checkpoint(
    beir: Path, tmp_path: Path, steps: int
) -> None:
    falling = (*SHORT, "optimizer.lr=0.5", "optimizer.schedule=constant")
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
