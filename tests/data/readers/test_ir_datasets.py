"""Collections by their ids, with datasets that are registered for the test: no network."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.files import judged, put, records
from tests.refusals import refused

from caravan.data.readers.ir_datasets import IrDatasets

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
    assert found.name == tiny
    assert IrDatasets(tiny).collection(tmp_path).folder == found.folder
    found = IrDatasets(tiny, splits={"odd": "odd/name"}, name="x").collection(tmp_path)
    assert (found.name, found.splits) == ("x", ("odd",))
    assert judged(found, "odd") == {("3", "b"): 3, ("3", "a"): 0}


def test_titles_and_official_grades_are_taken_over(irds: Any, tmp_path: Path) -> None:
    from caravan.data.readers.ir_datasets import _official_from_2, _text_of

    class Doc:
        doc_id, title, text = "1", "Camels", "Store fat."

    class Other:
        doc_id = "2"

        def default_text(self) -> str:
            return "all of it"

    assert _text_of(Doc()) == ("Camels", "Store fat.")
    assert _text_of(Other()) == ("", "all of it")
    assert _official_from_2(irds.load("msmarco-passage/trec-dl-2019/judged"))
    assert not _official_from_2(irds.load("msmarco-document/trec-dl-2019"))


def test_unknown_ids_and_a_missing_package_are_reported(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (IrDatasets("no/such"), IrDatasets(tiny, splits={"dev": "no"})):
        with refused("unknown-dataset"):
            source.collection(tmp_path)
    (tmp_path / "files" / "docs.tsv").unlink()
    with refused("dataset-not-loaded", "docs.tsv"):
        IrDatasets(tiny).collection(tmp_path)
    assert not [path for path in (tmp_path / "collections").iterdir() if path.is_dir()]
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with refused("not-installed"):
        IrDatasets(tiny).collection(tmp_path)


def registered(irds: Any, docs: list[Any], qrels: list[Any]) -> str:
    """The id of a dataset of these documents and judgements, of the query q1."""
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import BaseDocs, BaseQrels, BaseQueries, GenericQuery

    class Docs(BaseDocs):
        def docs_iter(self) -> Any:
            return iter(docs)

    class Queries(BaseQueries):
        def queries_iter(self) -> Any:
            return iter([GenericQuery("q1", "salt")])

    class Judged(BaseQrels):
        def qrels_iter(self) -> Any:
            return iter(qrels)

    name = f"caravan-tiny-{next(NUMBERS)}"
    irds.registry.register(name, Dataset(Docs(), Queries(), Judged()))
    return name


def test_judgements_by_subtopic_give_the_highest_grade(
    irds: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ir_datasets.formats import GenericDoc, TrecSubQrel

    docs = [GenericDoc("d1", "salt"), GenericDoc("d2", "camels")]
    grades = [("d1", 1), ("d2", -2), ("d1", 2), ("d1", 0), ("d2", -1)]
    qrels = [TrecSubQrel("q1", doc, grade, str(n)) for n, (doc, grade) in enumerate(grades)]
    found = IrDatasets(registered(irds, docs, qrels)).collection(tmp_path)
    assert judged(found, "test") == {("q1", "d1"): 2, ("q1", "d2"): -1}
    assert "by subtopic" in caplog.text


def test_a_grade_between_integers_is_refused(irds: Any, tmp_path: Path) -> None:
    from ir_datasets.formats import GenericDoc, GenericQrel

    docs, qrels = [GenericDoc("d1", "salt")], [GenericQrel("q1", "d1", 1.0)]
    found = IrDatasets(registered(irds, docs, qrels)).collection(tmp_path)
    assert judged(found, "test") == {("q1", "d1"): 1}
    for grade in (0.5, float("nan"), "1"):
        name = registered(irds, docs, [*qrels, GenericQrel("q1", "d1", grade)])
        with refused("invalid-grade", "data.splits"):
            IrDatasets(name).collection(tmp_path)


def test_documents_without_a_body_keep_what_they_have(irds: Any, tmp_path: Path) -> None:
    from ir_datasets.formats import GenericDoc, GenericQrel, TitleUrlTextDoc, WarcDoc

    docs = [
        GenericDoc("d1", None),
        TitleUrlTextDoc("d2", "Camels", "url", None),
        WarcDoc("d3", "url", "date", b"", b"<html>Salt</html>", "text/html"),  # bytes
    ]
    name = registered(irds, docs, [GenericQrel("q1", "d2", 1)])
    read = records(IrDatasets(name).collection(tmp_path).corpus)
    assert read[:2] == [("d1", "", ""), ("d2", "Camels", "")]
    assert "Salt" in read[2][2]

    class Image:
        doc_id, _fields = "d4", ("doc_id", "png")

    with refused("missing-text", "data.id"):
        IrDatasets(registered(irds, [Image()], [])).collection(tmp_path)
