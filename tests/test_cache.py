from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_backbone

from caravan.cache import TRUST, cache_folder
from caravan.data.collection import Collection
from caravan.data.source import cached_collection
from caravan.errors import InputError


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
    part: str, tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    (cache_folder(cache, "collections") / "tiny-key").symlink_to(collection.folder)

    def opened() -> Collection:
        return cached_collection(cache, "tiny", "key", lambda _: pytest.fail("built"))

    assert opened().digest == collection.digest
    place = cache / part
    mode = place.stat().st_mode
    place.chmod(mode | 0o002)
    with pytest.raises(InputError, match=r"writable by every user.*chmod o-w.*CARAVAN_CACHE"):
        opened()
    place.chmod(mode)
    with monkeypatch.context() as patch:
        _give_to(patch, place, os.geteuid() + 12345)
        with pytest.raises(InputError, match=r"belongs to another user.*CARAVAN_CACHE"):
            opened()
        patch.setenv(TRUST, "1")
        assert opened().digest == collection.digest
    with monkeypatch.context() as patch:
        _give_to(patch, place, 0)
        assert opened().digest == collection.digest


def test_the_cache_is_never_made_writable_by_everybody(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = cache_folder(tmp_path / "cache", "tokenizers")
    finally:
        os.umask(before)
    for made in (folder, folder.parent):
        assert not made.stat().st_mode & 0o002


@pytest.mark.parametrize("damage", ["other merges", "empty", "cut"])
def test_a_tokenizer_that_is_not_as_it_was_written_is_trained_again(
    damage: str, tmp_path: Path, collection: Collection
) -> None:
    backbone = tiny_backbone()
    first = backbone.tokenizer(collection, tmp_path)
    path = tmp_path / "tokenizers" / f"bpe-400-{collection.digest[:16]}.json"
    written = path.read_text()
    planted = {"empty": "", "cut": written[:99], "other merges": written.replace("Ġ", "G")}
    path.write_text(planted[damage])
    again = backbone.tokenizer(collection, tmp_path)
    assert path.read_text() == written
    assert again.get_vocab() == first.get_vocab()
