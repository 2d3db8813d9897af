"""Checkpoint files: written atomically, verified before a resume, independent of run_dir's place.

A checkpoint is a zip archive with a checksum of each part. A resume reads `last.ckpt`, or if that
is damaged `best.ckpt`, which has the whole state of training at an earlier update. For the contents
see `caravan.training.callbacks.LastCheckpoint`.
"""

from __future__ import annotations

import logging
import os
import traceback
import zipfile
from collections import Counter
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
_PARTS = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "epoch": int,
    "global_step": int,
}
_RUN_DIR = "<run_dir>"

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
        InputError: Both are damaged.
    """
    last, best = folder / LAST, folder / BEST
    if not last.exists():
        return None
    reason = damage(last)
    if reason is None:
        return last
    if best.exists() and damage(best) is None:
        if is_main_process():
            log.warning("%s is damaged (%s); resuming from %s", last, reason, best)
        return best
    raise InputError(
        "damaged-checkpoint",
        f"{last} is damaged ({reason}), and there is no other checkpoint to resume from; put back a"
        f" copy of the file, or remove {folder} to train from the start",
    )


def best_weights(path: Path) -> dict[str, Tensor]:
    """The weights of the best checkpoint, at the end of training.

    Raises:
        InputError: The file is missing or damaged.
    """
    reason = damage(path)
    if reason is not None:
        raise InputError(
            "damaged-checkpoint",
            f"{path}, the best checkpoint, is damaged ({reason}); put back a copy and repeat the"
            f" command with resume=true, or remove {path.parent} to train from the start",
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state["state_dict"]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is intact. Reads the whole file."""
    if not path.is_file():
        return "it is missing"
    if not path.stat().st_size:
        return "it is empty"
    if not zipfile.is_zipfile(path):
        return "it is truncated, or no checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                return f"the checksum of its part {part} is wrong"
        return _defect(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except PermissionError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged bytes raise anything
        if "weights_only" in str(error):  # torch would recommend to load the file unsafely
            return "it holds objects that no checkpoint has"
        return first_line(error)


def _defect(state: Any) -> str | None:
    """What is missing or impossible in a checkpoint that can be read."""
    if not isinstance(state, dict):
        return "it holds no state of training"
    for name, kind in _PARTS.items():
        if not isinstance(state.get(name), kind):
            return f"it has no {name}"
    for name in ("loops", "callbacks"):
        if not all(isinstance(part, dict) and part for part in state[name].values()):
            return f"a part of its {name} has no state"
    weights, optimizers = state["state_dict"], state["optimizer_states"]
    if not weights or not all(isinstance(weight, Tensor) for weight in weights.values()):
        return "it has no weights"
    for name, weight in weights.items():
        if not is_finite(weight):
            return f"{name} is NaN or infinite, as after a training that has diverged"
    moments: Counter[tuple[Any, ...]] = Counter()
    for optimizer in optimizers or [None]:
        if not isinstance(optimizer, dict) or not {"state", "param_groups"} <= optimizer.keys():
            return "it has no state of the optimizer"
        averages = [of["exp_avg"] for of in optimizer["state"].values() if "exp_avg" in of]
        moments.update((average.dtype, *average.shape) for average in averages)
    if not moments <= Counter((weight.dtype, *weight.shape) for weight in weights.values()):
        return "its weights and its optimizer have different shapes or types"
    return None


def refuse_damage(error: Exception, path: Path | None) -> None:
    """Raise an InputError if the error comes from Lightning's restoring of the checkpoint."""
    restoring = any(
        frame.f_code.co_filename.endswith("checkpoint_connector.py")
        and frame.f_code.co_name.startswith(("restore", "resume"))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    if not restoring or path is None or isinstance(error, torch.OutOfMemoryError):
        return
    if isinstance(error, InputError):  # of `Stage.on_load_checkpoint`, which knows no file
        raise InputError(error.code, f"{path}: {error}") from None
    raise InputError(
        "damaged-checkpoint",
        f"{path} cannot be restored ({first_line(error)}); remove it to resume from an earlier"
        " checkpoint or to train from the start",
    ) from None


def relative(state: Any, run_dir: Path) -> Any:
    """A copy of callbacks' state in which paths below run_dir start with `<run_dir>`."""
    return _mapped(state, os.path.realpath(run_dir), _RUN_DIR)


def absolute(state: Any, run_dir: Path) -> Any:
    """The inverse of `relative`, for where run_dir is now."""
    return _mapped(state, _RUN_DIR, os.path.realpath(run_dir))


def _mapped(tree: Any, old: str, new: str) -> Any:
    if isinstance(tree, dict):
        return {_mapped(key, old, new): _mapped(value, old, new) for key, value in tree.items()}
    if isinstance(tree, str) and (tree == old or tree.startswith(old + os.sep)):
        return new + tree[len(old) :]
    return tree
