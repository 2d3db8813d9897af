"""Checkpoint files: written atomically, verified before a resume, valid after run_dir has moved.

A checkpoint is a zip archive with a checksum of each part. A resume reads `last.ckpt`, or if that
is damaged `best.ckpt`, which has the whole state of training at an earlier update. Both have these
parts:

- state_dict: trainable weights, unsharded on the CPU (`Stage.on_save_checkpoint`).
- optimizer_states, lr_schedulers: Adam's moments, unsharded on the CPU; position in the schedule.
- loops: updates, batches and validations done; epoch and position of the training loader
  (`caravan.data.loaders`).
- callbacks: best metric and path, patience, ...; paths below run_dir are relative to it.
- should_stop: early stopping has ended the run, which it does not repeat after a resume.

There are no frozen weights (the manifest of the run has the digest of the base model) and no random
states: dropout, negatives and batches are functions of the seed and the position
(`Stage.on_train_batch_start`, `caravan.data.negatives`).
"""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor

from caravan.distributed import is_main_process
from caravan.errors import InputError, first_line
from caravan.files import replacing
from caravan.models.loading import is_finite

LAST, BEST = "last.ckpt", "best.ckpt"
RESUMED = ("state_dict", "optimizer_states", "loops")
"""Parts that a resume needs; a checkpoint of weights alone has only the first."""

log = logging.getLogger(__name__)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes beside the final place and renames: a kill leaves the old or the new checkpoint."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        with replacing(Path(path)) as scratch, scratch.open("wb") as file:
            torch.save(checkpoint, file)


def resumable(folder: Path) -> Path | None:
    """The checkpoint to resume from: `last.ckpt`, or `best.ckpt` if that one is damaged; or None.

    Raises:
        InputError: `last.ckpt` is damaged, and `best.ckpt` is damaged or missing.
    """
    last, best = folder / LAST, folder / BEST
    if not last.exists():
        return None
    reason = damage(last, RESUMED)
    if reason is None:
        return last
    if damage(best, RESUMED) is not None:
        raise _damaged(last, reason)
    if is_main_process():
        log.warning("%s is damaged (%s); resuming from %s", last, reason, best)
    return best


def best_weights(path: Path) -> dict[str, Tensor]:
    """The weights of the best checkpoint, at the end of training.

    Raises:
        InputError: The file is missing or damaged.
    """
    reason = damage(path)
    if reason is not None:
        raise _damaged(path, reason)
    weights: dict[str, Tensor] = _load(path)["state_dict"]
    return weights


def damage(path: Path, parts: Sequence[str] = ("state_dict",)) -> str | None:
    """What is wrong with a checkpoint; None if it is intact. Reads the whole file.

    Args:
        parts: what must be in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                return f"the checksum of its part {part} is wrong"
        state = _load(path)
        for name in parts:
            if not state.get(name):
                return f"it has no {name}"
        for name, weight in state["state_dict"].items():
            if not is_finite(weight):
                return f"{name} is NaN or infinite; the run has probably diverged"
    except PermissionError:
        raise
    except pickle.UnpicklingError:  # torch's message recommends to load the file unsafely
        return "it holds objects that no checkpoint has"
    except Exception as error:  # noqa: BLE001 - damaged bytes raise anything
        return first_line(error)
    return None


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        "damaged-checkpoint",
        f"{path} is damaged ({reason}), and no other checkpoint can take its place; put back a copy"
        f" and repeat the command with resume=true, or remove {path.parent} to train from the"
        " start",
    )


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
