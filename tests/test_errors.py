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


@pytest.mark.parametrize("error", [ValueError("x"), OSError(28, "No space left on device")])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        answering(lambda: _raising(error))


def test_a_command_that_is_done_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert answering(lambda: 7) == 0
    assert capsys.readouterr().err == ""
