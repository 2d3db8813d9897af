"""Manifests: a product matches only the inputs it was made from, as long as nothing is damaged."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.refusals import refused

from caravan import manifests

INPUTS = {"model": "a", "bm25": {"k1": 0.9}}


def test_a_product_matches_the_inputs_it_was_made_from(tmp_path: Path) -> None:
    product = tmp_path / "run.trec"
    manifests.write(product, INPUTS, {"seconds": 1.5})
    assert not manifests.matches(product, INPUTS)  # the product itself is missing
    product.touch()
    assert manifests.matches(product, INPUTS)
    assert manifests.read(product) == {"inputs": INPUTS, "facts": {"seconds": 1.5}}
    other = {"model": "b", "bm25": {"k1": 0.9, "b": 1}}
    assert not manifests.matches(product, other)
    assert manifests.differences(product, other) == ["bm25.b: unset -> 1", "model: a -> b"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: text.replace("1.5", "2.5"),
        lambda text: text.replace('"facts"', '"fact"'),
        lambda text: json.dumps({**json.loads(text), "inputs": []}),
        lambda text: text.replace("{", "\x00"),
    ],
)
def test_a_damaged_manifest_counts_as_missing(damage: Callable[[str], str], tmp_path: Path) -> None:
    product = tmp_path / "run.trec"
    product.touch()
    manifests.write(product, INPUTS, {"seconds": 1.5})
    path = manifests.path_of(product)
    path.write_text(damage(path.read_text()))
    assert manifests.read(product) is None
    assert not manifests.matches(product, INPUTS)
    assert manifests.differences(product, INPUTS)


def test_versions_are_those_of_the_installed_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers
    import torch

    found = manifests.versions()
    assert set(found) == {"caravan", "torch", "transformers", "tokenizers"}
    # a wheel's version may lack the local part (+cu130) that torch itself reports
    assert torch.__version__.split("+")[0] == found["torch"].split("+")[0]
    assert found["tokenizers"] == tokenizers.__version__
    monkeypatch.setattr(sys.modules["caravan"], "__version__", "99.0")
    assert manifests.versions(("nowhere",)) == {"caravan": "99.0", "nowhere": "not installed"}


def test_a_file_is_read_again_only_if_its_size_or_times_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus.arrow"
    path.write_bytes(b"passages")
    record, times = manifests.content(path), path.stat()
    digest, read = manifests.content_digest, list[Path]()
    monkeypatch.setattr(manifests, "content_digest", lambda p: (read.append(p), digest(p))[1])
    assert manifests.is_as_written(path, record)
    assert not read
    path.touch()
    assert manifests.is_as_written(path, record)
    assert len(read) == 1
    path.write_bytes(b"PASSAGES")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p and rsync -t do
    assert not manifests.is_as_written(path, record)
    path.unlink()
    assert not manifests.is_as_written(path, record)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_a_damaged_json_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(text)
    with refused("damaged-file", str(path)):
        manifests.read_json(path)


def test_a_file_that_changes_while_it_is_hashed_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = tmp_path / "corpus.arrow", manifests.content_digest
    path.write_bytes(b"passages")

    def changed_meanwhile(file: Path) -> str:
        found = digest(file)
        file.write_bytes(b"other passages")
        return found

    monkeypatch.setattr(manifests, "content_digest", changed_meanwhile)
    record = manifests.content(path)
    monkeypatch.setattr(manifests, "content_digest", digest)
    assert not manifests.is_as_written(path, record)


def _build(folder: Path) -> None:
    (folder / "below").mkdir()
    for name in ("a", "below/b"):
        (folder / name).write_text(name)


def test_a_folder_is_built_once_however_many_ask(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.2)
        _build(folder)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(manifests.ensure, tmp_path / "x", INPUTS, build) for _ in range(4)]
    assert {one.result() for one in asked} == {tmp_path / "x"}
    assert len(built) == 1
    assert not built[0].exists()
    assert (tmp_path / "x/below/b").read_text() == "below/b"


def test_a_folder_that_is_there_needs_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests.ensure(tmp_path / "x", INPUTS, _build)
    monkeypatch.setattr(manifests, "locked", lambda _: pytest.fail("locked"))
    manifests.ensure(tmp_path / "x", INPUTS, _build)


@pytest.mark.parametrize("damage", ["file", "manifest", "other inputs", "another version"])
def test_a_folder_that_has_changed_is_built_again_beside_foreign_files(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = manifests.ensure(tmp_path / "x", INPUTS, _build)
    (folder / "notes.txt").touch()
    (folder / "a").write_text("changed")
    if damage == "manifest":
        manifests.path_of(folder).unlink()
    if damage == "another version":
        manifests.write(folder, INPUTS, {"files": "a digest"})
    manifests.ensure(folder, INPUTS if damage != "other inputs" else {}, _build)
    assert (folder / "a").read_text() == "a"
    assert (folder / "notes.txt").exists()
    assert len(caplog.messages) == 1
    assert manifests.changed(folder) is None


def test_a_build_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    folder = manifests.ensure(tmp_path / "x", INPUTS, _build)
    (folder / "a").write_text("changed")
    with pytest.raises(ZeroDivisionError):
        manifests.ensure(folder, INPUTS, lambda scratch: (_build(scratch), 1 / 0))
    assert (folder / "a").read_text() == "changed"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["x"]


@pytest.mark.parametrize("link", ["x", "x/below"])
def test_nothing_is_written_where_a_link_points(tmp_path: Path, link: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    with refused("link-in-cache", link):
        manifests.ensure(tmp_path / "x", INPUTS, _build)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_is_in_the_way_of_a_folder_or_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    (tmp_path / "y/a").mkdir(parents=True)
    for name, place in (("x", "x is not a folder"), ("y", "y/a is a folder")):
        with refused("cache-obstructed", place):
            manifests.ensure(tmp_path / name, INPUTS, _build)
