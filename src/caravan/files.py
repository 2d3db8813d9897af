"""Atomic writes of files and folders, locks, and the cache folder.

A file is written as `.<name>.<8 hex digits>.part` beside its path and renamed at the end, so a kill
leaves the old content or the new. The process holds a lock on the scratch while it writes; the next
writer of the same path recognizes by it what a kill has left, and removes it.
Locks are the operating system's (`flock`): a lock ends with its process, however that ends, and
Linux passes it on to NFS servers. A leftover lock file does not hold a lock.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from caravan.errors import InputError, disk_error

LOCK = ".lock"
TRUST = "CARAVAN_TRUST_CACHE"
"""Environment variable; 1 trusts a cache folder whoever owns it."""
ORPHAN_S = 24 * 3600
"""Without locks, a scratch that has not changed for so long is an orphan."""
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
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside `path`, which replaces `path` when the block ends without an error.

    The folder of `path` is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(path)
    scratch, held = _new_file(path)
    try:
        with writing(path):
            yield scratch
            _sync(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
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
        with writing(folder):
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
    """Remove a scratch that no process holds; without locks, one that is a day old.

    Raises:
        OSError: Another process holds it, or may hold it.
    """
    held = os.open(scratch, os.O_RDONLY if scratch.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            age = time.time() - os.fstat(held).st_mtime
            if error.errno not in _NO_LOCKS or age < ORPHAN_S:
                raise
        if scratch.is_dir():
            shutil.rmtree(scratch)
        else:
            scratch.unlink()
    finally:
        os.close(held)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new scratch folder beside `folder`, which takes its place when the block ends.

    Only one process may write `folder` at a time: the scratch that a kill left is deleted first.
    Where there was a folder there always is one, except for an instant on file systems that cannot
    exchange two names.
    """
    scratch, aside = _leftovers(folder)
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


def _leftovers(folder: Path) -> tuple[Path, Path]:
    """What a kill leaves of `replacing_folder`: the new folder, and the old one moved aside."""
    return folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")


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
            "%s: this file system has no locks (%s); do not start two processes that write the same"
            " folder",
            path,
            error.strerror,
        )
        yield
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold a run_dir for one training or evaluation; delete unfinished files of a killed one.

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
            message = f"run_dir is in use by {holder}: {run_dir}; wait until that ends, or choose"
            raise InputError("run-dir-in-use", f"{message} another name=") from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        process = f"process {os.getpid()} on {socket.gethostname()}"
        with writing(path):
            path.write_text(f"{Path(sys.argv[0]).name}, {process}, {since}\n")
        for folder in (run_dir / "checkpoints", run_dir / "runs"):
            for leftover in folder.glob(".*.part"):
                leftover.unlink(missing_ok=True)
        for leftover in _leftovers(run_dir / "model"):
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


def listed(folder: Path) -> list[Path]:
    """The entries of a folder in order, without hidden ones: `._x` and `.DS_Store` are no data."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def cache_folder(cache_dir: str | Path, part: str) -> Path:
    """`cache_dir/part`, made if need be: collections, tokenizers and digests, shared by runs.

    Raises:
        InputError: If it, or `cache_dir`, belongs to another user or is writable by everybody.
    """
    folder = Path(cache_dir) / part
    for path in (Path(cache_dir), folder):
        path.mkdir(mode=0o775, parents=True, exist_ok=True)  # even if the umask is 0
        refuse_foreign(path)
    return folder


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder of the cache that another user may have filled.

    Files in the cache are used by their names, so whoever can write there decides what is searched
    and trained on. Folders of root are trusted.

    Raises:
        InputError: If it belongs to another user, or is writable by everybody.
    """
    if os.environ.get(TRUST) == "1":
        return
    found, problem = folder.stat(), ""
    if found.st_uid not in (0, os.geteuid()):
        problem = f"belongs to another user (uid {found.st_uid});"
    elif found.st_mode & stat.S_IWOTH:
        problem = f"is writable by every user of this machine; run chmod o-w {folder},"
    if problem:
        remedy = f"or set {TRUST}=1 if you trust everybody who can write there"
        message = f"{folder} {problem} choose another cache_dir= (or CARAVAN_CACHE), {remedy}"
        raise InputError("foreign-cache", message)
