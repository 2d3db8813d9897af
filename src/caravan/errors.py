"""The one exception that speaks to the user, how commands answer it, and what ends a run early.

Whatever a user can get wrong (a file, a setting, a folder) is raised as `InputError` with one
sentence: what is wrong, where (file and line), and the remedy. The entry files and commands print
it and exit with code 2; every other exception is a defect of Caravan and keeps its traceback.
"""

from __future__ import annotations

import logging
import re
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


SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, clear
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # OSC, DCS, ...
    r"|\x1b[ -/]*[0-~]"
)
"""Escape sequences of terminals (ECMA-48), whole."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and newline, and those that change the direction of writing."""


def printable(text: str) -> str:
    r"""A text without what would control a terminal: escape sequences, bidi overrides.

    Titles, texts, ids and queries are data of others. Half of a surrogate pair, as in names of
    files that are not UTF-8, becomes a question mark, since no stream could write it.

    >>> printable("\x1b[2Jsalt \x1b]0;title\x07and \u202egold")
    'salt and gold'
    """
    text = CONTROLS.sub("", SEQUENCES.sub("", text))
    return text.encode("utf-8", "replace").decode("utf-8")


class PrintableFormatter(logging.Formatter):
    """Formats log records without what would control the terminal that shows them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


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
        sys.stderr.write(f"{printable(told)}\n")
        return USER
    return 0
