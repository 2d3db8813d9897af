from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from caravan import manifests
from caravan.data.collection import Collection
from caravan.errors import InputError
from caravan.retrieval import store
from caravan.retrieval.bm25 import BM25, FILES
from caravan.retrieval.store import place


def test_what_lies_beside_a_new_product_is_told_as_it_takes_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old, new = {"model": "a"}, {"model": "b"}
    first = place(tmp_path, None, "passages", old)
    assert not caplog.records
    first.mkdir()
    manifests.write(first, old)
    assert place(tmp_path, None, "passages", old) == first
    assert not caplog.records
    assert place(tmp_path, None, "passages", new) != first
    assert f"{first.name} from other models" in caplog.text


def _opened(collection: Collection, folder: Path) -> dict[str, bytes]:
    store.open_bm25(BM25(), collection, folder, store.bm25_inputs(collection, {}))
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "empty", "missing"])
def test_a_damaged_index_is_built_again(
    name: str,
    damage: str,
    collection: Collection,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "bm25.0"
    right = _opened(collection, folder)
    path = folder / name
    path.unlink()
    if damage != "missing":
        content = right[name]
        path.write_bytes(content[:-9] + b"1" + content[-8:] if damage == "flip" else b"")
    assert _opened(collection, folder) == right
    assert f"{path} is damaged" in caplog.text


def test_two_processes_that_build_one_index_use_the_same(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, build = tmp_path / "bm25.0", BM25.build

    def overtaken(own: BM25, *given: Any) -> None:
        monkeypatch.setattr(BM25, "build", build)
        _opened(collection, folder)
        build(own, *given)
        assert _opened(collection, folder)

    monkeypatch.setattr(BM25, "build", overtaken)
    _opened(collection, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bm25.0", "bm25.0.manifest.json"]


def test_an_index_leaves_files_of_others_alone(collection: Collection, tmp_path: Path) -> None:
    folder = tmp_path / "bm25.0"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    _opened(collection, folder)
    assert (folder / "thesis.tex").read_text() == "precious"
    link = tmp_path / "bm25.1"
    link.symlink_to(folder)
    manifests.write(link, store.bm25_inputs(collection, {}))
    assert place(tmp_path, None, "bm25", store.bm25_inputs(collection, {})) == folder
    with pytest.raises(InputError, match=r"bm25\.1 is a symbolic link"):
        _opened(collection, link)


def test_a_name_may_hold_what_a_pattern_would_read(tmp_path: Path) -> None:
    first = place(tmp_path, None, "queries.te[s]t*", {"split": 1})
    first.mkdir()
    manifests.write(first, {"split": 1})
    moved = tmp_path / "queries.te[s]t*"
    first.rename(moved)
    manifests.path_of(first).rename(manifests.path_of(moved))
    assert place(tmp_path, None, "queries.te[s]t*", {"split": 1}) == moved
