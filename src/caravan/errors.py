"""`InputError`, how commands report it, and exceptions that end a run early.

Whatever a user can get wrong (a file, a setting, a folder) is raised as `InputError` with one
sentence: what is wrong, where (file and line), and the remedy. The entry files and commands print
it and exit with code 2; every other exception is a defect of Caravan and keeps its traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

FAILED, USER, INTERRUPTED, TERMINATED = 1, 2, 130, 143
"""Exit codes: a job failed, a mistake of the user's, Ctrl-C, SIGTERM."""


class InputError(ValueError):
    """A mistake in what the user gave, reported in one sentence with its place and its remedy.

    Args:
        code: a stable slug that names the kind of mistake, such as "unknown-split". Tests and
            programs match the code; the prose may change.
        message: what is wrong, where (key, or file and line), and what to do.
    """

    def __init__(self, code: str, message: str | None = None) -> None:
        if message is None:  # until every module gives a code
            code, message = "invalid-input", code
        super().__init__(code, message)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


class OccupiedError(InputError):
    """A run_dir holds another training or evaluation; nothing in it was changed."""


LONGEST = 400
"""Characters of a library's message that are quoted: some contain the whole value of a file."""
WORKER_TERMINATED = "is killed by signal: Terminated"
"""A loader's message about a terminated worker: schedulers terminate all processes."""


def is_termination(error: BaseException) -> bool:
    """Whether an exception says that the run is being ended, by whoever terminated its workers."""
    return isinstance(error, RuntimeError) and any(
        message.rstrip(" .").endswith(WORKER_TERMINATED) for message in _messages(error)
    )


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a write that the disk did not take: full, over a quota or a size limit, read-only."""
_CUT_SHORT = re.compile(
    r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed|^\d+ requested and \d+ written"
)
"""How torch and numpy report a write that was cut short, without an errno."""


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
    """The message of an exception for the user; None if it is a defect.

    A file that the system does not let one read or write is the user's to look after, and so is
    memory, or a process that the system has killed.
    """
    caused: BaseException | None = error
    while caused is not None:  # Hydra and data loaders wrap what they meet
        if isinstance(caused, InputError):
            return str(caused)
        caused = caused.__cause__
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}: more files than the system allows; raise the limit (ulimit -n)"
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return f"out of memory ({error}); free some, or lower num_workers and token_budget"
    number = disk_error(error)
    if number is not None:
        named = (one.filename for one in _chain(error) if isinstance(one, OSError))
        return _of_disk(number, next(filter(None, named), None))
    if str(error).startswith("Unable to configure handler"):  # logging's, around the file's error
        error = error.__cause__ or error
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; give another place"
    if isinstance(error, RuntimeError):
        return next(filter(None, map(_of_another_process, _messages(error))), None)
    return None


def _messages(error: RuntimeError) -> list[str]:
    """The messages of an exception, the more precise first.

    A loader that waits for a worker reports that it "exited unexpectedly"; the signal is in the
    cause of that exception.
    """
    cause = error.__cause__
    return [str(cause), str(error)] if isinstance(cause, RuntimeError) else [str(error)]


_WORKER = "DataLoader worker (pid"
_PEER_LOST = re.compile(
    r"gloo/transport/|Connection (closed|reset) by peer|ncclRemoteError|remote process exited"
)
"""In messages of gloo and NCCL."""


def _of_another_process(message: str) -> str | None:
    """The sentence for a message of torch about a worker or rank that has died."""
    if message.startswith(_WORKER):
        if "Bus error" in message:
            return (
                "a DataLoader worker died while it read a file (bus error): a file of the"
                " collection, such as corpus.arrow, was truncated or is on a disk that fails;"
                " delete the collection's folder in cache_dir, and start the same command again"
            )
        if "killed by signal: Killed" in message:
            return (
                "a DataLoader worker was killed, most likely by the system for lack of memory; free"
                " memory or lower num_workers, and start the same command again"
            )
        if "exited unexpectedly" in message or "killed by signal" in message:
            reason = re.sub(r".*?\d\) ", "", message).split(".")[0]
            return (
                f"a DataLoader worker {reason}; the lines above may say why, else memory may have"
                " run out: lower num_workers, and start the same command again"
            )
    if _PEER_LOST.search(message):
        return (
            "another process of this run has ended or cannot be reached; its own output says why,"
            " else the system has killed it, most likely for lack of memory: start all processes"
            " again (a training continues with resume=true)"
        )
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
        raise InputError("unreadable", f"{place}: {problem} ({reason(error)})") from error


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
    """Do the work of a command; returns its exit code, with a mistake printed on standard error."""
    try:
        work()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except Exception as error:
        told = sentence(error)
        if told is None:
            raise
        sys.stderr.write(f"{printable(told)}\n")
        return USER
    return 0
