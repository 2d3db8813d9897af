from __future__ import annotations

import errno
import logging
import os
import pickle
from pathlib import Path
from pydoc import locate

import pytest
import yaml

from caravan.errors import (
    CONTROLS,
    INTERRUPTED,
    USER,
    InputError,
    OccupiedError,
    answering,
    printable,
    sentence,
)
from caravan.files import writing
from caravan.models.remote_code import RemoteCodeError

ROOT = Path(__file__).parents[1]
WORKER = "DataLoader worker (pid 7) "
GLOO = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:5"


def _raising(error: BaseException) -> None:
    raise error


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (InputError("too-few", "k=0: give 1 or more"), "k=0: give 1 or more"),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (OSError(24, "Too many open files", "/x"), "ulimit -n"),
        (MemoryError("Unable to allocate 8 GiB"), "out of memory (Unable to allocate 8 GiB)"),
        (RuntimeError(f"{WORKER}is killed by signal: Killed. "), "lack of memory"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "worker exited une"),
        (RuntimeError(f"{WORKER}is killed by signal: Segmentation fault. "), "Segmentation fault;"),
        (RuntimeError(f"{WORKER}is killed by signal: Bus error. "), "bus error"),
        (RuntimeError(GLOO), "another process of this run has ended"),
        (RuntimeError("NCCL error: remote process exited"), "another process of this run"),
        (
            _caused(ValueError("you tried to log 0.5"), OSError(errno.ENOSPC, "No space", "/a/b")),
            "/a/b: No space left on device (/",
        ),
        (
            _caused(
                ValueError("Unable to configure handler 'file'"), PermissionError(13, "No", "/x/l")
            ),
            "/x/l: No",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place(
    error: Exception, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answering(lambda: _raising(error)) == USER
    (line,) = capsys.readouterr().err.splitlines()
    assert shown in line


def test_other_ends_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert answering(lambda: 7) == 0
    assert capsys.readouterr().err == ""
    assert answering(lambda: _raising(KeyboardInterrupt())) == INTERRUPTED
    for bug in (ValueError("x"), OSError(5, "Input/output error"), RuntimeError("x")):
        with pytest.raises(type(bug)):
            answering(lambda bug=bug: _raising(bug))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 159424 vs 159316"),
        RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed"),
        OSError("9572 requested and 1520 written"),  # numpy
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28]"),  # pyarrow
        Exception("No space left on device (os error 28)"),  # tokenizers
        ValueError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
)
def test_a_failed_write_is_reported_with_file_and_disk(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(OSError, match=r"last\.ckpt") as raised, writing(path):
        raise error
    text = str(sentence(raised.value))
    assert text.startswith(f"{path}: {os.strerror(raised.value.errno or 0)} (/")
    assert ("MiB free" in text) == (raised.value.errno != errno.EROFS)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jsalt\x1b]0;title\x07\x9b31m", "[2Jsalt]0;title31m"),
        ("sa\rl\x08t\x00\x7f\tand\ngold", "salt\tand\ngold"),
        ("salt \u202edlog\u202c \u2067and\u2069", "salt dlog and"),  # overrides the direction
        ("\u0645\u0644\u062d Gr\u00fc\u00df \u5869", "\u0645\u0644\u062d Gr\u00fc\u00df \u5869"),
        ("a\udcff.trec", "a?.trec"),  # a file's name that is not UTF-8
    ],
)
def test_a_text_of_others_does_not_control_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert not CONTROLS.search(printable(text))


def test_messages_and_log_lines_do_not_control_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hurt = "query '\x1b[2Jsalt\u202e' is unknown"
    answering(lambda: _raising(InputError("unknown-query", hurt)))
    assert capsys.readouterr().err == "query '[2Jsalt' is unknown\n"
    for name in ("job_logging", "hydra_logging"):
        config = yaml.safe_load((ROOT / f"conf/hydra/{name}/compact.yaml").read_text())
        for formatter in config["formatters"].values():
            made = locate(formatter["class"])(formatter["format"])  # type: ignore[operator]
            record = logging.LogRecord("caravan", logging.INFO, "", 1, "%s", (hurt,), None)
            assert made.format(record).endswith("query '[2Jsalt' is unknown")


@pytest.mark.parametrize(
    "error", [InputError("a-code", "a message"), RemoteCodeError("x"), OccupiedError("a-code", "x")]
)
def test_an_input_error_reaches_another_process_with_its_code(error: InputError) -> None:
    received = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(received), received.code, str(received)) == (type(error), error.code, str(error))
