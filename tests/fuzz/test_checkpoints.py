"""Damaged files of a training: a resume ends with the same weights, or in a sentence.

Nothing in a file is executed: a pickle that would write a file is among the mutants.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import ROOT, train, train_arguments
from tests.fuzz.mutations import (
    Mutant,
    Snapshot,
    amounts,
    file_mutants,
    noted,
    outcome,
    put,
    sampled,
)

from caravan.cli.compose import compose
from caravan.cli.train import train as train_config
from caravan.errors import InputError

STEPS = (
    *("trainer.val_check_interval=1", "callbacks.resume_point.every_n_steps=1"),
    *("optimizer.schedule=constant", "logger.tensorboard=null", "trainer.max_steps=2"),
)
WEIGHTS = "model/model.safetensors"
STATES = ("checkpoints/last.ckpt", "checkpoints/best.ckpt")
RECORDS = ("config.yaml", "config.yaml.manifest.json", "metrics.json", "model.manifest.json")
MODEL = (WEIGHTS, "model/caravan.json", "model/config.json", "model/tokenizer.json")


@pytest.fixture(scope="module")
def run(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The folder of a finished training of two updates."""
    folder = tmp_path_factory.mktemp("training") / "run"
    train(beir, folder, *STEPS)
    return Snapshot(folder)


class _Writes:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


def _pickles(data: bytes, marker: Path) -> Iterator[Mutant]:
    """A pickle with code: on its own, in torch's archive, and in place of this one's."""
    attack = pickle.dumps(_Writes(marker), protocol=2)
    yield Mutant("a pickle with code", attack)
    saved = io.BytesIO()
    torch.save({"state_dict": _Writes(marker)}, saved)
    yield Mutant("code in torch's archive", saved.getvalue())
    if zipfile.is_zipfile(io.BytesIO(data)):
        changed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
            for name in old.namelist():
                new.writestr(name, attack if name.endswith("data.pkl") else old.read(name))
        yield Mutant("code in place of data.pkl", changed.getvalue())


def _state_mutants(data: bytes) -> Iterator[Mutant]:
    """A checkpoint without one of its parts, or with a weight that is not finite."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    for key in state:
        others = {name: value for name, value in state.items() if name != key}
        yield Mutant(f"{key} removed", _saved(others))
    weights = state["state_dict"]
    for name in (next(iter(weights)), next(reversed(weights))):
        changed = {**weights, name: weights[name] * torch.nan}
        yield Mutant(f"{name} NaN", _saved({**state, "state_dict": changed}))


def _saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _mutants(path: Path, data: bytes, marker: Path) -> Iterator[Mutant]:
    yield from file_mutants(path, data)
    yield from _pickles(data, marker)
    if path.suffix == ".ckpt":
        yield from _state_mutants(data)


CASES = [
    *((file, False) for file in (*STATES, *RECORDS[:2])),
    *((file, True) for file in (*MODEL, *RECORDS, *STATES)),
]


@amounts(2, 40)  # of 30 and more of each file
@pytest.mark.parametrize(("file", "finished"), CASES)
def test_a_resume_over_damaged_files_ends_with_the_same_weights(
    run: Snapshot, beir: Path, file: str, finished: bool, number: int, tmp_path: Path
) -> None:
    """Without `finished`, the training was killed before it wrote the model folder."""
    given = train_arguments(beir, run.folder, *STEPS, "resume=true")
    cfg = compose(ROOT / "conf", "train", given)
    marker = tmp_path / "marker"
    path, weights = run.folder / file, run.folder / WEIGHTS
    for mutant in sampled(_mutants(path, run.files[path], marker), number, seed=1):
        run.restore()
        put(path, mutant)
        if not finished:
            (run.folder / "model.manifest.json").unlink(missing_ok=True)
            shutil.rmtree(run.folder / "model", ignore_errors=True)
        with noted(f"{file}: {mutant.name}"):
            found = outcome(lambda: train_config(cfg))
            assert not marker.exists(), "a pickle was executed"
            if isinstance(found, InputError):
                assert any(name in str(found) for name in (path.name, str(run.folder))), found
            else:
                assert weights.read_bytes() == run.files[weights]
                best = json.loads((run.folder / "metrics.json").read_text())["best"]
                assert found == best
