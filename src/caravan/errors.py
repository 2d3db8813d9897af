"""The one exception that speaks to the user, how commands answer it, and what ends a run early.

Whatever a user can get wrong (a file, a setting, a folder) is raised as `InputError` with one
sentence: what is wrong, where (file and line), and the remedy. The entry files and commands print
it and exit with code 2; every other exception is a defect of Caravan and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator

FAILED, USER, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit codes: a job failed, a mistake of the user's, Ctrl-C, SIGTERM."""


class InputError(ValueError):
    """A mistake in what the user gave, told in one sentence with its place and its remedy."""


WORKER_TERMINATED = "is killed by signal: Terminated"
"""What a loader says of a worker that was terminated first: schedulers terminate all processes."""


def is_termination(error: BaseException) -> bool:
    """Whether an exception says that the run is being ended, by whoever terminated its workers."""
    return isinstance(error, RuntimeError) and str(error).rstrip(" .").endswith(WORKER_TERMINATED)


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a write that the disk did not take: full, over a quota or a size limit, read-only."""
_CUT_SHORT = re.compile(
    r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed|^\d+ requested and \d+ written"
)
"""How torch and numpy report a write that was cut short, without an errno."""

_LOST_RANK = re.compile(r"gloo/transport/|ncclRemoteError|remote process exited")
"""How gloo and NCCL report that a process at the other end is gone."""


def disk_error(error: BaseException) -> int | None:
    """The errno of a write that the disk did not take, whatever library reports it; else None.

    torch, numpy, pyarrow, safetensors and tokenizers raise exceptions of their own, with the errno
    in their text or in the exception that they were handling.
    """
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, OSError) and one.errno in DISK:
            return one.errno
    for one in chain:
        for number in DISK:
            told = str(one)
            if re.search(rf"\b(os error|errno) {number}\b", told) or os.strerror(number) in told:
                return number
        if isinstance(one, OSError | RuntimeError) and _CUT_SHORT.search(str(one)):
            return errno.ENOSPC
    return None


def sentence(error: BaseException) -> str | None:
    """What an exception reports to the user; None where it is a defect.

    A file that the system does not let one read or write is the user's to look after.
    """
    caused: BaseException | None = error
    while caused is not None:  # Hydra and data loaders wrap what they meet
        if isinstance(caused, InputError):
            return str(caused)
        caused = caused.__cause__
    number = disk_error(error)
    if number is not None:
        named = (one.filename for one in _chain(error) if isinstance(one, OSError))
        return _of_disk(number, next(filter(None, named), None))
    if isinstance(error, RuntimeError) and _LOST_RANK.search(str(error)):
        return (
            "another process (rank) of this run has ended or cannot be reached; its own output says"
            " why (without any, the system has killed it, as it does when memory runs out); the"
            " same command with resume=true continues the run"
        )
    if str(error).startswith("Unable to configure handler"):  # logging's, around the file's error
        error = error.__cause__ or error
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; give another place"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from or was raised while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_disk(number: int, name: str | bytes | None) -> str:
    """The file that was written, its disk (mount point), what is free there, and the remedy."""
    reason = os.strerror(number)
    if name is None:
        return f"{reason}; make room on the disk that is written to, and repeat the command"
    path = os.path.abspath(os.fsdecode(name))
    while not os.path.exists(path):
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    if number == errno.EROFS:
        return f"{os.fsdecode(name)}: {reason} ({path}); give another place"
    return (
        f"{os.fsdecode(name)}: {reason} ({path} has {free / 2**20:,.1f} MiB free; a quota or a"
        " limit of file sizes may be lower); make room there, or give another place"
    )


def first_line(error: BaseException) -> str:
    """The first line of a library's message, to be quoted within a sentence."""
    return (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")


def answering(work: Callable[[], object]) -> int:
    """Do the work of a command; returns its exit code, with a mistake told on standard error."""
    try:
        work()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except Exception as error:
        told = sentence(error)
        if told is None:
            raise
        sys.stderr.write(f"{told}\n")
        return USER
    return 0
