"""Loops that a person waits for say so, and short ones keep quiet."""

import itertools
import logging

import pytest

from caravan import progress
from caravan.progress import progress as shown
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


def test_a_log_shows_how_far_a_long_job_is_at_growing_intervals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = itertools.count(0, 5)
    monkeypatch.setattr(progress.time, "monotonic", clock.__next__)
    with caplog.at_level(logging.INFO), shown("encode", 8_000, "texts") as done:
        for _ in range(40):
            done(200)
    assert caplog.messages[:4] == [
        "encode: running",
        "encode: 400 of 8,000 texts, 40/s",
        "encode: 800 of 8,000 texts, 40/s",
        "encode: 1,600 of 8,000 texts, 40/s",
    ]
    assert len(caplog.messages) < 10
    assert caplog.messages[-1] == "encode: 8000 texts in 205.0 s"


def test_a_job_within_one_that_is_shown_stays_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    monkeypatch.setattr(progress.time, "monotonic", itertools.count().__next__)
    with caplog.at_level(logging.INFO), shown("runs") as done:
        done(1)
        assert len(list(track(range(5), "queries"))) == 5
    assert [message.partition(":")[0] for message in caplog.messages] == ["runs", "runs"]
    assert len(list(track(range(5), "queries"))) == 5
