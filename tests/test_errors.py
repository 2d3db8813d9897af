from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from caravan.atomic import writing
from caravan.errors import INTERRUPTED, USER, InputError, answering, sentence


def _raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (InputError("k=0: give 1 or more"), USER, "k=0: give 1 or more\n"),
        (
            PermissionError(13, "Permission denied", "/x/y"),
            USER,
            "/x/y: Permission denied; give another place\n",
        ),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted\n"),
    ],
)
def test_a_command_tells_a_mistake_in_a_sentence(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answering(lambda: _raising(error)) == code
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("error", [ValueError("x"), OSError(5, "Input/output error")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        answering(lambda: _raising(error))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 159424 vs 159316"),
        RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed"),
        OSError("9572 requested and 1520 written"),  # numpy
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28]"),  # pyarrow
        Exception("No space left on device (os error 28)"),  # tokenizers
        ValueError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
)
def test_a_disk_that_takes_no_more_is_reported_with_file_and_disk(
    error: Exception, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(OSError, match=r"last\.ckpt") as raised, writing(path):
        raise error
    told = sentence(raised.value)
    assert told is not None
    assert told.startswith(f"{path}: {os.strerror(raised.value.errno or 0)} (/")
    assert ("MiB free" in told) == (raised.value.errno != errno.EROFS)


def test_an_error_that_a_library_raises_over_that_of_the_disk_names_the_file_all_the_same() -> None:
    error = ValueError("you tried to log 0.5 which is not supported")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/tmp/a/b.npy")
    assert str(sentence(error)).startswith("/tmp/a/b.npy: No space left on device (")


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_rank_that_was_killed_is_reported_by_the_others(text: str) -> None:
    assert "another process (rank) of this run has ended" in str(sentence(RuntimeError(text)))


def test_a_log_file_that_cannot_be_opened_is_named() -> None:
    error = ValueError("Unable to configure handler 'file'")
    error.__cause__ = PermissionError(13, "Permission denied", "/x/log.txt")
    assert sentence(error) == "/x/log.txt: Permission denied; give another place"


def test_a_command_that_is_done_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert answering(lambda: 7) == 0
    assert capsys.readouterr().err == ""
