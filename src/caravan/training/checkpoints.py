"""Checkpoint files: written atomically, verified before a resume, valid after run_dir has moved.

A checkpoint is a zip archive with a checksum of each part. A resume reads `last.ckpt`; `best.ckpt`
has the whole state of training too, at an earlier update. Both have these parts:

- state_dict: trainable weights, unsharded on the CPU (`Stage.on_save_checkpoint`).
- optimizer_states, lr_schedulers: Adam's moments, unsharded on the CPU; position in the schedule.
- loops: updates, batches and validations done; epoch and position of the training loader
  (`caravan.data.loaders`).
- callbacks: best metric and path, patience, ...; paths below run_dir are relative to it.
- should_stop: set by early stopping, which does not set it again after a resume.

Frozen weights are not saved (the manifest of the run has the digest of the base model), nor are RNG
states: dropout, negatives and batches are functions of the seed and the position
(`Stage.on_train_batch_start`, `caravan.data.negatives`).
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from caravan.errors import reading
from caravan.files import replacing
from caravan.models.loading import is_finite

LAST = "last.ckpt"
RESUMED = ("state_dict", "optimizer_states", "loops", "callbacks", "pytorch-lightning_version")
"""Parts that a resume needs; a checkpoint of weights alone has only the first."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside the final place and renames: a kill leaves the old or the new checkpoint."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        with replacing(Path(path)) as scratch, scratch.open("wb") as file:
            torch.save(checkpoint, file)


def read_checkpoint(path: Path, parts: Sequence[str] = ("state_dict",)) -> dict[str, Any]:
    """Read and verify a whole checkpoint.

    Args:
        parts: what must be in it.

    Raises:
        InputError: "damaged-checkpoint", also if the file is missing.
    """
    intact = "best.ckpt (from an earlier update) or a backup" if path.name == LAST else "a backup"
    problem = (
        f"the checkpoint is missing or damaged; copy {intact} to it and repeat the command with"
        f" resume=true, or remove {path.parent} to train from the start"
    )
    with reading(path, problem, "damaged-checkpoint"):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of its part {damaged} is wrong")
        try:
            state: dict[str, Any] = torch.load(
                path, map_location="cpu", weights_only=True, mmap=True
            )
        except pickle.UnpicklingError:  # torch's message recommends to load the file unsafely
            raise ValueError("it holds objects that no checkpoint has") from None
        for name in parts:
            if name not in state or not (state[name] or name == "callbacks"):  # they may be empty
                raise ValueError(f"it has no {name}")
        for name, weight in state["state_dict"].items():
            if not is_finite(weight):
                raise ValueError(f"{name} is NaN or infinite; the run has probably diverged")
    return state


def with_paths(state: Any, old: str, new: str) -> Any:
    """A copy of the callbacks' state in which paths at or below the folder `old` are below `new`.

    In a checkpoint, paths below run_dir start with `callbacks.RUN_DIR`, since it may be moved.
    """
    if isinstance(state, dict):
        return {
            with_paths(key, old, new): with_paths(value, old, new) for key, value in state.items()
        }
    if isinstance(state, str) and (state == old or state.startswith(old + os.sep)):
        return new + state[len(old) :]
    return state
