from __future__ import annotations

import logging
from pathlib import Path

import pytest

from caravan import manifest
from caravan.retrieval.kept import place


def test_what_lies_beside_a_new_product_is_told_as_it_takes_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old, new = {"model": "a"}, {"model": "b"}
    first = place(tmp_path, None, "passages", old)
    assert not caplog.records
    first.mkdir()
    manifest.write(first, old)
    assert place(tmp_path, None, "passages", old) == first
    assert not caplog.records
    assert place(tmp_path, None, "passages", new) != first
    assert f"{first.name} from other models" in caplog.text


def test_a_name_may_hold_what_a_pattern_would_read(tmp_path: Path) -> None:
    first = place(tmp_path, None, "queries.te[s]t*", {"split": 1})
    first.mkdir()
    manifest.write(first, {"split": 1})
    moved = tmp_path / "queries.te[s]t*"
    first.rename(moved)
    manifest.path_of(first).rename(manifest.path_of(moved))
    assert place(tmp_path, None, "queries.te[s]t*", {"split": 1}) == moved
