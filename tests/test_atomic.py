from __future__ import annotations

from pathlib import Path

import pytest

from caravan.atomic import replacing


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "figures.json"
    with replacing(path) as scratch:
        scratch.write_text("half")
        assert not path.exists()
        scratch.write_text("whole")
    assert path.read_text() == "whole"
    assert _names(path.parent) == ["figures.json"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_write_that_fails_leaves_the_old_file_and_no_scratch(tmp_path: Path, alone: bool) -> None:
    path = tmp_path / "run.trec"
    path.write_text("old")

    def cut_short() -> None:
        with replacing(path, alone) as scratch:
            scratch.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["run.trec"]


def test_what_a_kill_left_is_written_over_by_the_only_writer(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    (tmp_path / ".last.ckpt.part").write_text("left by a kill")
    with replacing(path, alone=True) as scratch:
        scratch.write_text("new")
    assert _names(tmp_path) == ["last.ckpt"]
