"""Files and folders that are whole or absent, and locks: what a kill or a full disk cannot break.

A write happens beside its place and is renamed at the end, so a kill leaves the old content or the
new. A lock is the operating system's (`flock`): it ends with its process, however that ends, and
Linux passes it on to NFS servers. Its file stays behind and means nothing by itself.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from caravan.errors import InputError, disk_error

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and fs.h

log = logging.getLogger(__name__)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in the error of a full or read-only disk; libraries leave out file and errno.

    Raises:
        OSError: with errno and file name, in place of whatever the library raised.
    """
    try:
        yield
    except Exception as error:
        number = disk_error(error)
        if number is None or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


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
        with writing(path):
            yield scratch
            _sync(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new scratch folder beside `folder`, which takes its place when the block ends.

    Only one process may write `folder` at a time: the scratch that a kill left is deleted first.
    Where there was a folder there always is one, except for an instant on file systems that cannot
    exchange two names.
    """
    scratch, aside = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    for leftover in (scratch, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with writing(folder):
            yield scratch
            for path in scratch.rglob("*"):
                if path.is_file():
                    _sync(path)
        if not folder.exists():
            os.replace(scratch, folder)
        elif not _exchange(scratch, folder):
            os.replace(folder, aside)
            os.replace(scratch, folder)
    finally:
        for leftover in (scratch, aside):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file, which is made if need be; other processes are kept out.

    A file system without locks is reported, and nothing is locked.

    Args:
        wait: until another process releases it; else that raises at once.

    Raises:
        TimeoutError: another process has it.
    """
    from filelock import FileLock

    # Without flock, filelock would leave a marker file that outlives a killed process.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning(
            "%s: this file system has no locks (%s), so nothing keeps a second process out; do not"
            " start two that write the same folder",
            *(path, error.strerror),
        )
        yield
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold a run_dir for one training or evaluation, and delete what a killed one left half.

    Raises:
        InputError: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    with ExitStack() as held:
        try:
            held.enter_context(locked(path, wait=False))
        except TimeoutError:
            holder = path.read_text("utf-8", errors="replace").strip() or "another process"
            raise InputError(
                f"run_dir is in use by {holder}: {run_dir}; wait until that ends, or choose another"
                " name="
            ) from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with writing(path):
            program = Path(sys.argv[0]).name
            path.write_text(
                f"{program}, process {os.getpid()} on {socket.gethostname()}, {since}\n"
            )
        for folder in (run_dir / "checkpoints", run_dir / "runs"):
            for leftover in folder.glob(".*.part"):
                leftover.unlink(missing_ok=True)
        for leftover in run_dir.glob(".model.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _sync(path: Path) -> None:
    """Before the rename: a power cut would otherwise leave an empty file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
