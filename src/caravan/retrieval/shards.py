"""Work that is written block by block, and goes on after a kill where it was.

    folder/begun.manifest.json   what the blocks are made from, written before the first
    folder/00000042.npy          a block, written beside its place and renamed
    <folder>.manifest.json       written last: the whole is there

Each block is computed on its own, so the files are the same bytes however often a start was cut
short; nothing that is on disk is computed again. Blocks of other inputs are thrown away.
Of several processes (torchrun, srun) each has its share of the blocks, by their numbers; they meet
in the folder alone, which all must see, and it is the same folder whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifest
from caravan.atomic import replacing
from caravan.ranks import leads, rank, wait_until, world


def shard(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.npy"


def fill(
    folder: Path,
    inputs: dict[str, Any],
    blocks: int,
    compute: Callable[[list[int]], Iterable[np.ndarray]],
) -> None:
    """Write the blocks that are not there yet; returns when all are, whoever wrote them.

    Args:
        inputs: digests and settings that determine the blocks.
        compute: gives, for the numbers of blocks that are missing, the array of each in turn.
    """
    if not _missing(folder, blocks) and manifest.matches(folder, inputs):
        return
    if leads():
        _begin(folder, inputs)
    wait_until(lambda: manifest.matches(folder / "begun", inputs))
    own = [i for i in _missing(folder, blocks) if i % world() == rank()]
    for number, array in zip(own, compute(own) if own else (), strict=True):
        _write(shard(folder, number), array)
    if leads():
        wait_until(lambda: not _missing(folder, blocks))
        manifest.write(folder, inputs)
    wait_until(lambda: manifest.matches(folder, inputs))


def _missing(folder: Path, blocks: int) -> list[int]:
    return [i for i in range(blocks) if not shard(folder, i).exists()]


def _begin(folder: Path, inputs: dict[str, Any]) -> None:
    """Say from the start whose blocks these are, so that an interrupted start can be resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "begun"
    if not manifest.matches(begun, inputs):
        manifest.remove(folder)  # before the blocks: they are no longer what it says they are
        manifest.remove(begun)
        for old in folder.iterdir():
            old.unlink()
        begun.touch()
        manifest.write(begun, inputs)


def _write(path: Path, array: np.ndarray) -> None:
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.save(file, array)
