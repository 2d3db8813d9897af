"""Files and folders that are whole or absent: a kill leaves the old content or the new content.

A file is written as `.<name>.<8 hex digits>.part` beside its path, then renamed. The process holds
a lock (flock) on the scratch file while it writes. The system releases the lock when the process
dies, so the next writer of the same path recognizes what a kill has left, and removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNLOCKED_S = 24 * 3600
"""Where the file system has no locks, a scratch is an orphan if it has not changed for so long."""


@contextmanager
def replacing(path: Path, alone: bool = False) -> Iterator[Path]:
    """A scratch path beside `path`, which replaces `path` when the block ends without an error.

    Args:
        path: the file to write or replace; its folder is made if need be.
        alone: no other process writes this file, so that a scratch file that a kill has left is
            overwritten. Otherwise each call has a scratch file of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = None
    if alone:
        scratch = path.with_name(f".{path.name}.part")
    else:
        _remove_orphans(path)
        scratch, held = _new_file(path)
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())  # before the rename, or a power cut leaves an empty file
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, removed when the block ends unless the block renames it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(folder)
    scratch = _scratch(folder)
    scratch.mkdir(mode=0o775)
    held = os.open(scratch, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(held)


def _scratch(path: Path) -> Path:
    """A name that no other process has, on this machine or another."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def _new_file(path: Path) -> tuple[Path, int]:
    """A new scratch file, locked, and its descriptor."""
    while True:
        scratch = _scratch(path)
        held = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        if scratch.exists():
            return scratch, held
        os.close(held)  # another process took it for an orphan before it was locked


def _remove_orphans(path: Path) -> None:
    """Remove the scratch files and folders of `path` whose process has died."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.part")
    for found in path.parent.iterdir():
        if name.fullmatch(found.name) and not found.is_symlink():
            with suppress(OSError):
                _remove_orphan(found)


def _remove_orphan(scratch: Path) -> None:
    held = os.open(scratch, os.O_RDONLY if scratch.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            if time.time() - os.fstat(held).st_mtime < UNLOCKED_S:
                return
        if scratch.is_dir():
            shutil.rmtree(scratch)
        else:
            scratch.unlink()
    finally:
        os.close(held)
