"""Several collections in one evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.cli.conftest import Lines
from tests.cli.small_conf import CONF
from tests.tiny import write_beir

from caravan.cli.evaluate import Member, each, members


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("b", "a", "forums/y", "forums/x"):
        write_beir(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    return tmp_path


def test_a_name_is_a_folder_and_a_pattern_all_that_hold_collections(home: Path) -> None:
    assert [m.name for m in members(home, ["b", "a"])] == ["b", "a"]
    assert [m.name for m in members(home, ["*"])] == ["a", "b", "forums/x", "forums/y"]
    assert [m.name for m in members(home, ["a", "*", "a"])] == ["a", "b", "forums/x", "forums/y"]
    assert members(home, ["z*"]) == []
    assert [m.name for m in members(home, ["z"])] == ["z"]  # reported when it is opened


def test_a_folder_of_collections_counts_as_one(home: Path) -> None:
    assert [m.group for m in members(home, ["*"])] == ["a", "b", "forums", "forums"]
    assert [m.group for m in members(home, ["forums/x"])] == ["forums/x"]
    assert [m.group for m in members(home, ["forums"])] == ["forums", "forums"]


def test_an_entry_may_name_a_split(home: Path) -> None:
    assert members(home, ["a:dev", "b"]) == [
        Member("a", "dev", "a", "a"),
        Member("b", None, "b", "b"),
    ]
    both = members(home, ["a", "a:dev"])
    assert [(m.split, m.folder) for m in both] == [(None, "a"), ("dev", "a.dev")]


def test_each_collection_has_its_own_config(home: Path) -> None:
    cfg = OmegaConf.create(
        {
            "collections": ["a:dev", "forums"],
            "run_dir": "runs/x",
            "store": "${run_dir}/store",
            "data": {"path": str(home), "name": None, "split": "test"},
            "retriever": "runs/${data.name}/runs/bm25.${data.split}.trec",
        }
    )
    found = {one.run_dir: one for one in each(cfg).values()}
    assert list(found) == ["runs/x/a", "runs/x/forums/x", "runs/x/forums/y"]
    a = found["runs/x/a"]
    assert (a.store, a.data.path) == ("runs/x/store/a", str(home / "a"))
    assert a.retriever == "runs/a/runs/bm25.dev.trec"
    assert found["runs/x/forums/x"].retriever == "runs/forums/x/runs/bm25.test.trec"
    assert cfg.data.path == str(home)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("data=beir data.path={home} collections=[]", "collections (command line)"),
        ("collections=[a]", "choose data=beir"),
        ("data=beir data.path={home} collections=[a,bb]", "did you mean {home}/b?"),
        ("data=beir data.path={home} collections=[z*]", "collections[0] (command line)"),
        ("data=beir data.path={home}/a collections=[../b]", "../b is not in {home}/a"),
        ("data=beir data.path={home} collections=[{home}/b]", "/b is not in {home}"),
        ("data=beir data.path={home} collections=a", "collections (command line)"),
    ],
)
def test_collections_that_are_not_there_are_reported_before_anything_starts(
    lines: Lines, given: str, wanted: str, home: Path
) -> None:
    overrides = ["retriever=bm25", *given.format(home=home).split()]
    (line,) = lines(*overrides, root="evaluate", conf=CONF)
    assert wanted.format(home=home) in line
