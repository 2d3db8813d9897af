"""Atomic writes, locks and the cache folder, across kills, full disks and other users."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.refusals import refused

from caravan import files
from caravan.data.collection import Collection, write_collection
from caravan.data.source import cached_collection
from caravan.files import (
    TRUST,
    cache_folder,
    claimed,
    replacing,
    replacing_folder,
    scratch_folder,
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_whole_and_kept_when_a_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.json"
    with replacing(path) as scratch:
        scratch.write_text("half")
        assert not path.exists()
        scratch.write_text("whole")
    with suppress(KeyboardInterrupt), replacing(path) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "whole"
    assert _names(path.parent) == ["metrics.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
from caravan.files import replacing, scratch_folder
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


def test_what_another_user_has_left_in_a_sticky_folder_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".x.0123abcd.part").touch()
    unlink = Path.unlink

    def refused(self: Path, missing_ok: bool = False) -> None:
        if self.name == ".x.0123abcd.part":
            raise PermissionError(1, "Operation not permitted", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    with replacing(tmp_path / "x") as scratch:
        scratch.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


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


def test_a_scratch_that_another_process_took_for_an_orphan_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = files._opened

    def removed_first(scratch: Path) -> int:
        monkeypatch.setattr(files, "_opened", opened)
        scratch.unlink()
        return opened(scratch)

    monkeypatch.setattr(files, "_opened", removed_first)
    with replacing(tmp_path / "x") as scratch:
        scratch.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    (tmp_path / ".model.0123abcd.part").mkdir()
    (tmp_path / ".model.0123abcd.part" / "left by a kill").touch()
    with suppress(KeyboardInterrupt), replacing_folder(folder) as scratch:
        assert _names(scratch) == []
        raise KeyboardInterrupt
    if exchanges:  # there is no moment without the folder
        monkeypatch.setattr("os.replace", lambda *_: pytest.fail("two renames"))
    else:
        monkeypatch.setattr("caravan.files._exchange", lambda *_: False)
    with replacing_folder(folder) as scratch:
        (scratch / "new").touch()
        assert _names(folder) == ["old"]
    assert _names(folder) == ["new"]
    assert _names(tmp_path) == ["model"]


HOLDER = """
import os, sys, time
from pathlib import Path
from caravan.files import claimed
with claimed(Path(sys.argv[1])):
    if os.fork() == 0:  # such as a loader's worker, which outlives a killed parent for a while
        print(flush=True)  # by now it has closed what it has of the lock
    time.sleep(60)
"""


def test_a_run_dir_is_held_until_its_process_dies_and_then_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with (
            refused("run-dir-in-use", f"process {holder.pid} on", str(tmp_path)),
            claimed(tmp_path),
        ):
            pass
        holder.send_signal(signal.SIGKILL)  # its child lives on
        holder.wait()
        with claimed(tmp_path):
            pass
        os.killpg(holder.pid, signal.SIGKILL)


def test_unfinished_files_of_a_killed_run_are_deleted_when_the_next_starts(tmp_path: Path) -> None:
    for name in ("checkpoints/.last.ckpt.part", "runs/.validation.trec.77.part"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    for name in (".model.0123abcd.part", ".model.backup"):  # the last is the user's
        (tmp_path / name).mkdir()
    (tmp_path / "runs" / "validation.trec").touch()
    with claimed(tmp_path):
        pass
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {".lock", ".model.backup", "checkpoints", "runs", "runs/validation.trec"}


def test_a_disk_that_is_full_while_a_folder_is_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left") as raised,
        scratch_folder(tmp_path / "index"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "index")


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuses)
    with claimed(tmp_path):
        assert "this file system has no locks" in caplog.text
    assert files.LOCK in _names(tmp_path)


def _give_to(monkeypatch: pytest.MonkeyPatch, path: Path, uid: int) -> None:
    """Let a folder seem to belong to another user; only root could give it away."""
    stat = Path.stat

    def changed(self: Path, **given: Any) -> os.stat_result:
        found = stat(self, **given)
        if self != path:
            return found
        return os.stat_result([*found[:4], uid, *found[5:]])

    monkeypatch.setattr(Path, "stat", changed)


@pytest.mark.parametrize("part", [".", "collections", "collections/tiny-key"])
def test_a_cache_that_others_may_have_filled_is_refused(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def opened() -> Collection:
        return cached_collection(cache, "tiny", "key", build)

    def build(folder: Path) -> Collection:
        return write_collection(folder, "tiny", [("p", "", "salt")], [], {})

    assert opened().name == "tiny"
    place = cache / part
    mode = place.stat().st_mode
    place.chmod(mode | 0o002)
    with refused("foreign-cache", f"chmod o-w {place}", "CARAVAN_CACHE"):
        opened()
    place.chmod(mode)
    with monkeypatch.context() as patch:
        _give_to(patch, place, os.geteuid() + 12345)
        with refused("foreign-cache", "another user", "CARAVAN_CACHE"):
            opened()
        patch.setenv(TRUST, "1")
        assert opened().name == "tiny"
    with monkeypatch.context() as patch:
        _give_to(patch, place, 0)
        assert opened().name == "tiny"


def test_the_cache_is_never_made_writable_by_everybody(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = cache_folder(tmp_path / "cache", "tokenizers")
    finally:
        os.umask(before)
    for made in (folder, folder.parent):
        assert not made.stat().st_mode & 0o002
