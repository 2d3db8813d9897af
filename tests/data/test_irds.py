"""Collections by their ids, with datasets that are registered for the test: no network."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.files import judged, put, records

from caravan.data.irds import IrDatasets
from caravan.errors import InputError

FILES = {
    "docs.tsv": "a\tCamels store fat.\nb\tSalt is a mineral.\nc\tDunes move.\n",
    "train.tsv": "1\twhat is in a hump\n2\twhat moves\n",
    "test.tsv": "3\twhat is salt\n1\twhat is in a hump\n",
    "train.qrels": "1 0 a 1\n2 0 c 1\n",
    "test.qrels": "3 0 b 3\n3 0 a 0\n",
}
NUMBERS = itertools.count()


@pytest.fixture
def tiny(irds: Any, tmp_path: Path) -> str:
    """The id of a dataset with the splits train and test, and one called odd/name."""
    folder, name = put(tmp_path / "files", FILES), f"caravan-tiny-{next(NUMBERS)}"

    def made(split: str | None) -> Any:
        parts = {"docs_tsv": str(folder / "docs.tsv")}
        if split:
            parts |= {"queries_tsv": str(folder / f"{split}.tsv")}
            parts |= {"qrels_trec": str(folder / f"{split}.qrels")}
        return irds.create_dataset(**parts)

    for below, split in {"": None, "/train": "train", "/test": "test", "/odd/name": "test"}.items():
        irds.registry.register(f"{name}{below}", made(split))
    return name


def test_an_id_is_read_as_ir_datasets_reads_it(tiny: str, irds: Any, tmp_path: Path) -> None:
    found = IrDatasets(tiny).collection(tmp_path)
    assert records(found.corpus) == [(d.doc_id, "", d.text) for d in irds.load(tiny).docs_iter()]
    assert found.splits == ("train", "test")
    for split in found.splits:
        theirs = irds.load(f"{tiny}/{split}")
        assert judged(found, split) == {
            (one.query_id, one.doc_id): one.relevance for one in theirs.qrels_iter()
        }
    assert [name for name, _, _ in records(found.queries)] == ["1", "2", "3"]
    assert found.facts["repeated_queries"] == 1
    assert found.name == tiny
    again = IrDatasets(tiny).collection(tmp_path)
    assert again.folder == found.folder


def test_splits_may_be_chosen_and_named(tiny: str, tmp_path: Path) -> None:
    found = IrDatasets(tiny, splits={"odd": "odd/name"}, name="x").collection(tmp_path)
    assert (found.name, found.splits) == ("x", ("odd",))
    assert judged(found, "odd") == {("3", "b"): 3, ("3", "a"): 0}


def test_titles_and_official_grades_are_taken_over(irds: Any, tmp_path: Path) -> None:
    from caravan.data.irds import _official_from_2, _passages

    class Doc:
        doc_id, title, text = "1", "Camels", "Store fat."

    class Other:
        doc_id = "2"

        def default_text(self) -> str:
            return "all of it"

    class Corpus:
        def docs_iter(self) -> Any:
            return iter([Doc(), Other()])

    from collections import Counter

    assert list(_passages(Corpus(), Counter())) == [
        ("1", "Camels", "Store fat."),
        ("2", "", "all of it"),
    ]
    official = {
        name: _official_from_2(irds.load(name))
        for name in ("msmarco-passage/trec-dl-2019/judged", "msmarco-document/trec-dl-2019")
    }
    assert list(official.values()) == [True, False]


def test_what_is_not_known_or_not_installed_is_told(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"ir_datasets knows no no/such: its ids are at https"):
        IrDatasets("no/such").collection(tmp_path)
    with pytest.raises(InputError, match=r"no beir/scfact: did you mean beir/scifact\?"):
        IrDatasets("beir/scfact").collection(tmp_path)
    with pytest.raises(InputError, match=rf"ir_datasets knows no {tiny}/no: "):
        IrDatasets(tiny, splits={"dev": "no"}).collection(tmp_path)
    (tmp_path / "files" / "docs.tsv").unlink()
    with pytest.raises(InputError, match=rf"ir_datasets cannot give {tiny}: .*: see its page"):
        IrDatasets(tiny).collection(tmp_path)
    assert not [path for path in (tmp_path / "collections").iterdir() if path.is_dir()]
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(
        InputError, match="a package that is not installed: pip install ir_datasets"
    ):
        IrDatasets(tiny).collection(tmp_path)
