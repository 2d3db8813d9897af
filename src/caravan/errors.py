"""`InputError`, how commands report it, and exceptions that end a run early.

A user's mistake (a file, a setting, a folder) is an `InputError`: one sentence with what is wrong,
where (file and line), and the remedy. Entry files and commands print it and exit with code 2. Every
other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import copyreg
import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FAILED, USER, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit codes: a job failed, a mistake of the user, Ctrl-C, SIGTERM."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a failed write: the disk is full, over a quota or a size limit, or read-only."""
LONGEST = 400
"""Characters of a library's message that are quoted: some contain the whole value of a file."""
_CUT_SHORT = re.compile(
    r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed|^\d+ requested and \d+ written"
)
"""How torch and numpy report a write that was cut short, without an errno."""
_WORKER_LOST = re.compile(
    r"DataLoader worker \(pid.*?\d\) ((exited unexpectedly|.*killed by)[^.]*)"
)
_PEER_LOST = re.compile(
    r"gloo/transport/|Connection (closed|reset) by peer|ncclRemoteError|remote process exited"
)
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and newline, and those that change the direction of writing."""


class InputError(ValueError):
    """A mistake in the user's input, reported in one sentence with its place and its remedy.

    Args:
        code: a stable slug that names the kind of mistake, such as "unknown-split". Tests and
            programs match the code; the prose may change.
        message: what is wrong, where (key, or file and line), and what to do.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)

    @property
    def code(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses have constructors of other arguments; worker processes send their exceptions.
        return copyreg.__newobj__, (type(self), *self.args)  # type: ignore[attr-defined]


class OccupiedError(InputError):
    """A run_dir holds another training or evaluation; nothing in it was changed."""


def is_termination(error: BaseException) -> bool:
    """Whether a DataLoader worker was terminated, as by a scheduler that ends the whole run."""
    signal = "is killed by signal: Terminated"
    return isinstance(error, RuntimeError) and any(signal in text for text in _messages(error))


def disk_error(error: BaseException) -> int | None:
    """The errno of a write that the disk refused, whichever library reports it; else None.

    torch, numpy, pyarrow, safetensors and tokenizers raise their own exceptions, with the errno
    in their text or in the exception that they were handling.
    """
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in DISK:
            return one.errno
    for one in _chain(error):
        text = str(one)
        for number in DISK:
            if re.search(rf"\b(os error|errno) {number}\b", text) or os.strerror(number) in text:
                return number
        if isinstance(one, OSError | RuntimeError) and _CUT_SHORT.search(text):
            return errno.ENOSPC
    return None


def sentence(error: BaseException) -> str | None:
    """The message of an exception for the user; None if it is a bug.

    The user can also mend files that the system refuses to read or write, a lack of memory, and a
    process that the system has killed.
    """
    cause: BaseException | None = error
    while cause is not None:  # Hydra and data loaders wrap exceptions
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}: more files than the system allows; raise the limit (ulimit -n)"
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return f"out of memory ({error}); free some, or lower num_workers and token_budget"
    number = disk_error(error)
    if number is not None:
        names = (one.filename for one in _chain(error) if isinstance(one, OSError))
        return _disk_sentence(number, next(filter(None, names), None))
    if str(error).startswith("Unable to configure handler"):  # logging's, around the file's error
        error = error.__cause__ or error
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; choose another path"
    if isinstance(error, RuntimeError):
        return next(filter(None, map(_process_sentence, _messages(error))), None)
    return None


def _messages(error: RuntimeError) -> list[str]:
    """An exception's messages, the more precise first: a worker's signal is in its cause."""
    cause = error.__cause__
    return [str(cause), str(error)] if isinstance(cause, RuntimeError) else [str(error)]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from or was raised while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _process_sentence(message: str) -> str | None:
    """The sentence for a message of torch about a worker or rank that has died."""
    if _PEER_LOST.search(message):
        return (
            "another process of this run has ended or cannot be reached; see its output, else the"
            " system has killed it, most likely for lack of memory: start all processes again (a"
            " training continues with resume=true)"
        )
    if (worker := _WORKER_LOST.match(message)) is None:
        return None
    return (
        f"a DataLoader worker {worker[1]}; unless the lines above say why, most likely for lack of"
        " memory (free some, or lower num_workers), or in a bus error because a file of the"
        " collection, such as corpus.arrow, was truncated (delete its folder in cache_dir); start"
        " the same command again"
    )


def _disk_sentence(number: int, name: str | bytes | None) -> str:
    """The file that was written, its disk (mount point), the free space there, and the remedy."""
    problem = os.strerror(number)
    if name is None:
        return f"{problem}; make room on the disk that is written to, and repeat the command"
    file = os.fsdecode(name)
    path = Path(file).absolute()
    disk = next(above for above in (path, *path.parents) if os.path.ismount(above))
    if number == errno.EROFS:
        return f"{file}: {problem} ({disk}); choose another path"
    free = shutil.disk_usage(disk).free / 2**20
    return (
        f"{file}: {problem} ({disk} has {free:,.1f} MiB free; a quota or a limit of file sizes may"
        " be lower); make room there, or choose another path"
    )


def printable(text: str) -> str:
    r"""Remove the characters that control a terminal or change the direction of writing.

    Titles, texts, ids and queries are other people's data. Half of a surrogate pair, as in names of
    files that are not UTF-8, becomes a question mark, since no stream could write it.

    >>> printable("\x1b[2Jsalt and \u202egold")
    '[2Jsalt and gold'
    """
    return CONTROLS.sub("", text).encode("utf-8", "replace").decode("utf-8")


class PrintableFormatter(logging.Formatter):
    """Formats log records as `printable` text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def reading(place: str | Path, problem: str, code: str = "unreadable") -> Iterator[None]:
    """Turn any exception of a library into an InputError while a foreign file is read.

    Parsers raise whatever their code runs into where a value has another type than expected: a bare
    Exception (tokenizers), TypeError, AttributeError, RecursionError, a panic of Rust. The original
    exception stays the cause, and is logged at level DEBUG.

    Args:
        place: the file, folder or Hub id that is read.
        problem: what failed, such as "no model could be loaded".

    Raises:
        InputError: with place, problem, and the type and first line of the exception.
    """
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        log.debug("%s: %s", place, problem, exc_info=error)
        reason = f"{type(error).__name__}: {first_line(error)}"[:LONGEST]
        raise InputError(code, f"{place}: {problem} ({reason})") from error


def first_line(error: BaseException) -> str:
    """The first line of a library's message, to be quoted within a sentence."""
    return (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")


def answering(work: Callable[[], object]) -> int:
    """Run a command's work; returns its exit code, after a mistake is printed on standard error."""
    try:
        work()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = sentence(error)
        if message is None:
            raise
        sys.stderr.write(f"{printable(message)}\n")
        return USER
    return 0
