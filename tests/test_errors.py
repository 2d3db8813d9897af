from __future__ import annotations

import logging
from pathlib import Path
from pydoc import locate

import pytest
import yaml

from caravan.errors import CONTROLS, INTERRUPTED, USER, InputError, answering, printable

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b[31msalt\x1b[0m", "salt"),  # clears the screen, colours
        ("salt\x1b]0;a title\x07 and \x1b]8;;http://x\x1b\\gold\x1b]8;;\x1b\\", "salt and gold"),
        ("\x1b]0;without an end", "0;without an end"),
        ("\x9b2Jsalt\x9d0;t\x9c", "salt"),  # the same in eight bits
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
    answering(lambda: _raising(InputError(hurt)))
    assert capsys.readouterr().err == "query 'salt' is unknown\n"
    for name in ("job_logging", "hydra_logging"):
        config = yaml.safe_load((ROOT / f"conf/hydra/{name}/compact.yaml").read_text())
        for formatter in config["formatters"].values():
            made = locate(formatter["class"])(formatter["format"])  # type: ignore[operator]
            record = logging.LogRecord("caravan", logging.INFO, "", 1, "%s", (hurt,), None)
            assert made.format(record).endswith("query 'salt' is unknown")
