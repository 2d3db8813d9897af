"""The one exception that speaks to the user, how commands answer it, and what ends a run early.

Whatever a user can get wrong (a file, a setting, a folder) is raised as `InputError` with one
sentence: what is wrong, where (file and line), and the remedy. The entry files and commands print
it and exit with code 2; every other exception is a defect of Caravan and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

FAILED, USER, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit codes: a job failed, a mistake of the user's, Ctrl-C, SIGTERM."""


class InputError(ValueError):
    """A mistake in what the user gave, told in one sentence with its place and its remedy."""


WORKER_TERMINATED = "is killed by signal: Terminated"
"""What a loader says of a worker that was terminated first: schedulers terminate all processes."""


def is_termination(error: BaseException) -> bool:
    """Whether an exception says that the run is being ended, by whoever terminated its workers."""
    return isinstance(error, RuntimeError) and str(error).rstrip(" .").endswith(WORKER_TERMINATED)


def sentence(error: BaseException) -> str | None:
    """What an exception tells the user; None where it is a defect.

    A file that the system does not let one read or write is the user's to look after.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; give another place"
    return None


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
    except (InputError, OSError) as error:
        told = sentence(error)
        if told is None:
            raise
        sys.stderr.write(f"{told}\n")
        return USER
    return 0
