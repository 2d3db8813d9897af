"""Files that are whole or not there: a kill during a write leaves the old one or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, alone: bool = False) -> Iterator[Path]:
    """A scratch path beside `path`, which takes its place when the block ends without an error.

    Args:
        path: what is written or replaced; its folder is made if need be.
        alone: no other process writes this file, so that what a kill has left is written over.
            Else each process has a scratch of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part" if alone else f".{path.name}.{os.getpid()}.part")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())  # before the rename, or a power cut leaves an empty file
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
