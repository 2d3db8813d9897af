"""Progress: a log gets a line now and then, short loops show nothing."""

from __future__ import annotations

import logging

import pytest

from caravan import progress
from caravan.progress import track


def test_a_short_loop_shows_nothing_and_a_long_one_logs_lines_without_a_terminal(
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    assert list(track(range(5), "counting")) == [0, 1, 2, 3, 4]
    assert caplog.messages == []
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    blocks = [range(1000), range(500)]
    assert list(track(blocks, "encode", 1500, "texts", size=len)) == blocks
    lines = caplog.messages
    assert any(line.startswith("encode: 1,000 of 1,500 texts, ") for line in lines)
    assert lines[-1].startswith("encode: 1,500 texts in ")
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_a_bar_is_drawn(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(track(range(5), "counting", 5))
    assert "counting" in capfd.readouterr().err
