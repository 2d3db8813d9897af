from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from caravan.atomic import replacing, scratch_folder


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


KILLED = """
import os, signal, sys
from pathlib import Path
from caravan.atomic import replacing, scratch_folder
with replacing(Path(sys.argv[1])) as scratch, scratch_folder(Path(sys.argv[2])) as folder:
    scratch.write_text("half"), (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_removes_what_a_kill_left_and_nothing_else(tmp_path: Path) -> None:
    path, folder = tmp_path / "run.trec", tmp_path / "index"
    subprocess.run([sys.executable, "-c", KILLED, str(path), str(folder)], check=False)
    assert len(_names(tmp_path)) == 2
    others = [".run.trec.swp", ".run.trec.0123abcd.part.mine", ".run.trec.0123abcd.part"]
    for name in others[:2]:
        (tmp_path / name).write_text("of an editor")
    (tmp_path / others[2]).symlink_to(others[0])
    with replacing(path) as scratch, scratch_folder(folder) as draft:
        scratch.write_text("whole")
        draft.rename(folder)
    assert _names(tmp_path) == sorted([*others, "index", "run.trec"])


def test_writers_at_work_leave_each_others_scratch_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    with replacing(path) as first, scratch_folder(tmp_path / "index") as one:
        first.write_text("first")
        with replacing(path) as second, scratch_folder(tmp_path / "index") as other:
            assert first != second
            assert one != other
            second.write_text("second")
        assert path.read_text() == "second"
        assert one.is_dir()
    assert path.read_text() == "first"
    assert _names(tmp_path) == ["metrics.json"]


def test_what_a_kill_left_is_written_over_by_the_only_writer(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    (tmp_path / ".last.ckpt.part").write_text("left by a kill")
    with replacing(path, alone=True) as scratch:
        scratch.write_text("new")
    assert _names(tmp_path) == ["last.ckpt"]
