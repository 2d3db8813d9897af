"""Loops that a person waits for say so, and short ones keep quiet."""

import itertools
import logging

import pytest

from caravan import progress
from caravan.progress import track


def test_a_short_loop_shows_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert list(track(range(5), "counting")) == [0, 1, 2, 3, 4]
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


def test_away_from_a_terminal_a_long_loop_logs_its_start_and_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    monkeypatch.setattr(progress.time, "monotonic", itertools.count().__next__)
    with caplog.at_level(logging.INFO):
        assert len(list(track(range(5), "counting", total=5, unit="steps"))) == 5
    assert caplog.messages[0] == "counting: running"
    assert caplog.messages[1].startswith("counting: 5 steps in ")
    assert capfd.readouterr() == ("", "")


def test_items_may_count_for_several_units(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    monkeypatch.setattr(progress.time, "monotonic", itertools.count().__next__)
    with caplog.at_level(logging.INFO):
        assert list(track([[1, 2], [3]], "blocks", unit="passages", size=len)) == [[1, 2], [3]]
    assert caplog.messages[1].startswith("blocks: 3 passages in ")
