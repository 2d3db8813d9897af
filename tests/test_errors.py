from __future__ import annotations

import pytest

from caravan.errors import INTERRUPTED, USER, InputError, answering


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


GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:5"
)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (OSError(24, "Too many open files", "/x"), "ulimit -n"),
        (MemoryError("Unable to allocate 8 GiB"), "out of memory (Unable to allocate 8 GiB)"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "lack of memory"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "worker exited une"),
        (
            RuntimeError("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details"),
            "worker exited unexpectedly with exit code 1;",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "),
            "is killed by signal: Segmentation fault;",
        ),
        (RuntimeError(GLOO), "another process of this run has ended"),
    ],
)
def test_a_process_or_memory_that_is_gone_is_reported_in_one_sentence(
    error: Exception, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answering(lambda: _raising(error)) == USER
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(28, "No space left on device"), RuntimeError("x")]
)
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        answering(lambda: _raising(error))


def test_a_command_that_is_done_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert answering(lambda: 7) == 0
    assert capsys.readouterr().err == ""
