"""MS MARCO's official files, passages and documents, beside what ir_datasets reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.files import judged, put, records
from tests.refusals import refused

from caravan.data.collection import Collection
from caravan.data.readers.msmarco import MsMarcoDocument, MsMarcoPassage

PASSAGES = {
    "collection.tsv": "0\tThe presence of communication amid scientific minds.\n"
    "1\tThe Manhattan Project and its atomic bomb helped.\n7\tA “camel” stores fat in its hump.\n",
    "queries.train.tsv": "121352\tdefine extreme\n634306\twhat does chattel mean\n",
    "queries.dev.small.tsv": "1048585\twhat is paula deen's brother\n",
    "queries.dev.tsv": "1048585\twhat is paula deen's brother\n2\t Androgen receptor define\n",
    "msmarco-test2019-queries.tsv": "1108939\twhat slows down the flow of blood\n"
    "1112389\twhat is the county for grand rapids, mn\n",
    "msmarco-test2020-queries.tsv": "1030303\twho is aziz hashim\n",
    "qrels.train.tsv": "121352\t0\t7\t1\n634306\t0\t0\t1\n",
    "qrels.dev.small.tsv": "1048585\t0\t7\t1\n",
    "qrels.dev.tsv": "1048585\t0\t7\t1\n2\t0\t1\t1\n",
    "2019qrels-pass.txt": "1108939 Q0 7 3\n1108939 Q0 1 1\n1108939 Q0 0 0\n",
    "2020qrels-pass.txt": "1030303 0 1 2\n",
}
DOCUMENTS = {
    "msmarco-docs.tsv": "D1\thttps://a.org/camel\tCamels\tStore fat. In humps.\n"
    "D2\thttp://b.org\t\tNo title here.\nD30\thttps://c.org/x?y=1\tEmpty\t\n",
    "msmarco-doctrain-queries.tsv": "3\tAnother name for the hump\n",
    "msmarco-docdev-queries.tsv": "2\tAndrogen receptor define\n",
    "msmarco-doctrain-qrels.tsv": "3 0 D1 1\n",
    "msmarco-docdev-qrels.tsv": "2 0 D30 1\n",
    "msmarco-test2019-queries.tsv": "1108939\twhat slows down the flow of blood\n",
    "2019qrels-docs.txt": "1108939 Q0 D2 1\n1108939 Q0 D1 0\n",
}


def passages(folder: Path, **settings: Any) -> Collection:
    return MsMarcoPassage(str(folder), **settings).collection(folder.parent / "cache")


def documents(folder: Path, **settings: Any) -> Collection:
    return MsMarcoDocument(str(folder), **settings).collection(folder.parent / "cache")


def without(files: dict[str, str], *names: str, **more: str) -> dict[str, str]:
    return {name: text for name, text in files.items() if name not in names} | more


def test_passages_are_read_as_ir_datasets_reads_them(tmp_path: Path, irds: Any) -> None:
    plain = put(tmp_path / "msmarco", PASSAGES)
    found = passages(plain)
    assert found.splits == ("train", "dev", "dev_all", "dl19", "dl20")
    theirs = irds.create_dataset(docs_tsv=str(plain / "collection.tsv"))
    assert records(found.corpus) == [(d.doc_id, "", d.text) for d in theirs.docs_iter()]
    names = {
        "train": ("queries.train.tsv", "qrels.train.tsv"),
        "dev": ("queries.dev.small.tsv", "qrels.dev.small.tsv"),
        "dev_all": ("queries.dev.tsv", "qrels.dev.tsv"),
        "dl19": ("msmarco-test2019-queries.tsv", "2019qrels-pass.txt"),
        "dl20": ("msmarco-test2020-queries.tsv", "2020qrels-pass.txt"),
    }
    asked = {}
    for split, (queries, qrels) in names.items():
        theirs = irds.create_dataset(
            queries_tsv=str(plain / queries), qrels_trec=str(plain / qrels)
        )
        asked |= {query.query_id: query.text for query in theirs.queries_iter()}
        assert judged(found, split) == {
            (one.query_id, one.doc_id): one.relevance for one in theirs.qrels_iter()
        }
    assert {name: text for name, _, text in records(found.queries)} == asked
    assert len(found.queries) == len(asked) == 7
    assert found.relevant_from == {"dl19": 2, "dl20": 2}


def test_titles_come_with_a_third_column_or_with_jsonl(tmp_path: Path) -> None:
    rows = [("0", "Communication", "The presence."), ("1", "", "The bomb."), ("7", "C", "A camel.")]
    tsv = "".join("\t".join(row) + "\n" for row in rows)
    folder = put(tmp_path / "titled", without(PASSAGES, "collection.tsv", **{"corpus.tsv": tsv}))
    assert records(passages(folder).corpus) == rows
    jsonl = "".join(
        f'{{"docid": "{name}", "title": "{title}", "text": "{text}"}}\n'
        for name, title, text in rows
    )
    put(folder, {"corpus.jsonl": jsonl}, zipped=True)
    with refused("ambiguous-files", "corpus.tsv"):
        passages(folder)
    found = passages(folder, corpus="corpus.jsonl.gz")
    assert records(found.corpus) == rows
    assert found.digest == passages(folder, corpus="corpus.tsv").digest


def test_anserini_names_are_known_and_dev_is_the_small_one(tmp_path: Path) -> None:
    files = without(PASSAGES, "queries.dev.small.tsv", "2019qrels-pass.txt")
    files["qrels.dl19-passage.txt"] = PASSAGES["2019qrels-pass.txt"]
    found = passages(put(tmp_path / "m", files))
    assert judged(found, "dev") == {("1048585", "7"): 1}  # its query is in queries.dev.tsv
    assert judged(found, "dl19")["1108939", "1"] == 1
    assert MsMarcoPassage("m").split == "dev"


def test_documents_have_their_address_before_the_title(tmp_path: Path) -> None:
    folder = put(tmp_path / "docs", DOCUMENTS)
    found = documents(folder)
    assert records(found.corpus) == [
        ("D1", "https://a.org/camel Camels", "Store fat. In humps."),
        ("D2", "http://b.org", "No title here."),
        ("D30", "https://c.org/x?y=1 Empty", ""),
    ]
    titles = [title for _, title, _ in records(documents(folder, urls=False).corpus)]
    assert titles == ["Camels", "", "Empty"]
    assert found.splits == ("train", "dev", "dl19")
    assert judged(found, "dl19") == {("1108939", "D2"): 1, ("1108939", "D1"): 0}
    assert found.relevant_from == {}  # of documents, grade 1 is relevant


@pytest.mark.parametrize("name", ["collection.tsv", "queries.train.tsv"])
def test_a_file_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    with refused("file-not-found", name):
        passages(put(tmp_path / "m", without(PASSAGES, name)))
    with refused("unreadable-file", "x.tsv"):
        passages(put(tmp_path / "m", PASSAGES), corpus="x.tsv")
