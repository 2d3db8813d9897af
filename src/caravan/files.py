"""Atomic writes of files and folders, locks, and the cache folder.

A file, or a folder as a whole, is written as `.<name>.<8 hex digits>.part` beside its path and
renamed at the end, so a kill leaves the old content or the new. `filling_folder` moves its files
one by one, so a kill can leave some of both; `manifests.ensure` detects that. The writer locks its
scratch; one without a lock is the orphan of a killed process, and the next writer of the same path
removes or continues it.

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from caravan.errors import InputError, disk_error

LOCK = ".lock"
TRUST = "CARAVAN_TRUST_CACHE"
"""Environment variable; 1 trusts a cache folder whoever owns it."""
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
    with _scratch(path, lambda scratch: scratch.touch(exist_ok=False)) as scratch:
        yield scratch
        _sync(scratch)
        os.replace(scratch, path)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, removed when the block ends unless the block renames it."""
    with _scratch(folder, _make_folder) as scratch:
        yield scratch


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends without an error.

    Where there was a folder there always is one, except for an instant on file systems that cannot
    exchange two names.
    """
    with scratch_folder(folder) as scratch:
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                _sync(path)
        if not folder.exists():
            os.replace(scratch, folder)
        elif not _exchange(scratch, folder):
            with scratch_folder(folder) as aside:
                os.replace(folder, aside / folder.name)
                os.replace(scratch, folder)


@contextmanager
def filling_folder(folder: Path, resumes: bool = False) -> Iterator[Path]:
    """An empty folder beside `folder`, whose files move into it if the block ends without an error.

    They replace files of the same names; all other files stay.

    Args:
        resumes: yield the folder that an interrupted process of this user has left, if there is
            one, and leave it to the next if the user interrupts this process.

    Raises:
        InputError: "link-in-cache", the files would move to where a link points;
            "cache-obstructed", something else has the name of the folder or of a file.
    """
    _refuse_link(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError("cache-obstructed", f"{folder} is not a folder; remove it")
    with _scratch(folder, _make_folder, resumes) as scratch:
        yield scratch
        for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
            target = folder / path.relative_to(scratch)
            _refuse_link(target.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise InputError("cache-obstructed", f"{target} is a folder; remove it")
            _sync(path)
            os.replace(path, target)


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        problem = f"{folder} is a symbolic link, and Caravan does not write through it"
        raise InputError("link-in-cache", f"{problem}; remove the link")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)


def _make_folder(scratch: Path) -> None:
    scratch.mkdir(mode=0o775)


@contextmanager
def _scratch(path: Path, make: Callable[[Path], None], resumes: bool = False) -> Iterator[Path]:
    """A scratch file or folder beside `path`, locked while the block runs.

    At the end it is removed, unless the block has renamed it, or the user has interrupted the block
    and `resumes`: then the next call yields it again.

    Args:
        make: creates it at the path that it is given.
        resumes: as for `filling_folder`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found = None
    for orphan, held in _orphans(path):
        if resumes and found is None and os.fstat(held).st_uid == os.geteuid():
            found = orphan, held
        else:
            _remove(orphan)
            os.close(held)
    scratch, held = found or _made(path, make)
    keep = False
    try:
        with writing(path):
            yield scratch
    except KeyboardInterrupt:
        keep = resumes
        raise
    finally:
        if not keep:
            _remove(scratch)
        os.close(held)


def _made(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A new scratch of `path`, and the descriptor that holds its lock."""
    while True:
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        make(scratch)
        try:
            held = _opened(scratch)
        except FileNotFoundError:  # another process took it for an orphan before it was opened
            continue
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        if scratch.exists():
            return scratch, held
        os.close(held)  # another process took it for an orphan before it was locked


def _orphans(path: Path) -> Iterator[tuple[Path, int]]:
    """The scratches of `path` without a writer, each with its locked descriptor, to be closed."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.part")
    for found in sorted(path.parent.iterdir()):
        if not name.fullmatch(found.name) or found.is_symlink():
            continue
        with suppress(OSError):  # it is gone
            held = _opened(found)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # a process holds it, or may hold it on a disk without locks
                os.close(held)
            else:
                yield found, held


def _opened(scratch: Path) -> int:
    return os.open(scratch, os.O_RDONLY if scratch.is_dir() else os.O_RDWR)


def _remove(scratch: Path) -> None:
    if scratch.is_dir():
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        with suppress(OSError):  # it is gone, or of another user
            scratch.unlink()


def _sync(path: Path) -> None:
    """Before the rename: a power cut would otherwise leave an empty file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


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
        problem = f"this file system has no locks ({error.strerror})"
        log.warning("%s: %s; do not start two processes that write the same folder", path, problem)
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
        for orphan, lock in _orphans(run_dir / "model"):
            _remove(orphan)
            os.close(lock)
        yield


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
    found, problem = folder.stat(), ""
    if found.st_uid not in (0, os.geteuid()):
        problem = f"belongs to another user (uid {found.st_uid})"
    elif found.st_mode & stat.S_IWOTH:
        problem = f"is writable by every user of this machine (chmod o-w {folder} corrects that)"
    if problem and os.environ.get(TRUST) != "1":
        raise InputError(
            "foreign-cache",
            f"{folder} {problem}; choose another cache_dir= (or CARAVAN_CACHE), or set {TRUST}=1"
            " if you trust everybody who can write there",
        )
