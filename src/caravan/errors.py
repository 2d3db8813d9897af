"""The one exception that speaks to the user, how commands answer it, and what ends a run early.

Whatever a user can get wrong (a file, a setting, a folder) is raised as `InputError` with one
sentence: what is wrong, where (file and line), and the remedy. The entry files and commands print
it and exit with code 2; every other exception is a defect of Caravan and keeps its traceback.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

FAILED, USER, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit codes: a job failed, a mistake of the user's, Ctrl-C, SIGTERM."""


class InputError(ValueError):
    """A mistake in what the user gave, told in one sentence with its place and its remedy."""


LONGEST = 400
"""Characters of a library's message that are quoted: some contain the whole value of a file."""
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


@contextmanager
def reading(place: str | Path, problem: str) -> Iterator[None]:
    """Read what Caravan did not write: any exception of a library becomes an InputError.

    Parsers raise whatever their code runs into where a value has another type than expected: a bare
    Exception (tokenizers), TypeError, AttributeError, RecursionError, a panic of Rust. The original
    exception stays the cause, and is logged at level DEBUG.

    Args:
        place: the file, folder or hub id that is read.
        problem: what failed, such as "no model could be loaded".

    Raises:
        InputError: with place, problem and the first line of the exception's message.
    """
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        log.debug("%s: %s", place, problem, exc_info=error)
        raise InputError(f"{place}: {problem} ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """The first line of an exception's message, with its type where the message needs it."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = first_line(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if text.endswith(":") and len(lines) > 1:  # huggingface_hub's validation of configs
        text = f"{text} {lines[1]}"
    speaks = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    if not speaks and type(error) is not Exception:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


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
