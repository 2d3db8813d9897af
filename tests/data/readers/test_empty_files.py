"""A file that holds nothing is named, with what belongs into it, and no other file is blamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.files import put
from tests.refusals import refused

from caravan.data.readers.labelled import Beir, Tsv
from caravan.data.readers.msmarco import MsMarcoDocument, MsMarcoPassage
from caravan.data.readers.training_rows import FlagEmbedding, Tevatron
from caravan.errors import InputError

ROW = '{"query_id": "1", "query_text": "camel", "positive_document_ids": ["a"]}\n'
TEXTS = '{"query": "camel", "pos": ["fat"], "neg": ["salt"]}\n'
READERS: dict[str, tuple[Callable[[str], Any], dict[str, str]]] = {
    "tsv": (
        Tsv,
        {
            "corpus.tsv": "a\tfat\n",
            "queries.tsv": "1\tcamel\n",
            "queries.dev.tsv": "2\tsalt\n",
            "qrels.dev.tsv": "2\ta\t1\n",
            "qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\ta\t1\n",
        },
    ),
    "beir": (
        Beir,
        {
            "corpus.jsonl": '{"_id": "a", "text": "fat"}\n',
            "queries.jsonl": '{"_id": "1", "text": "camel"}\n',
            "qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\ta\t1\n",
        },
    ),
    "msmarco_passage": (
        MsMarcoPassage,
        {
            "collection.tsv": "a\tfat\n",
            "queries.train.tsv": "1\tcamel\n",
            "qrels.train.tsv": "1\t0\ta\t1\n",
            "msmarco-test2019-queries.tsv": "2\tsalt\n",
            "2019qrels-pass.txt": "2 Q0 a 3\n",
        },
    ),
    "msmarco_document": (
        MsMarcoDocument,
        {
            "msmarco-docs.trec": "<DOC>\n<DOCNO>a</DOCNO>\n<TEXT>\nx\n</TEXT>\n</DOC>\n",
            "msmarco-docdev-queries.tsv": "1\tcamel\n",
            "msmarco-docdev-qrels.tsv": "1 0 a 1\n",
        },
    ),
    "tevatron": (
        Tevatron,
        {
            "train.jsonl": ROW,
            "dev.jsonl": ROW.replace('"1"', '"2"'),
            "corpus.jsonl": '{"docid": "a", "text": "fat"}\n',
        },
    ),
    "flagembedding": (FlagEmbedding, {"rows.jsonl": TEXTS}),
    "flagembedding_dev": (
        lambda path: FlagEmbedding(f"{path}/train.jsonl", dev=f"{path}/dev.jsonl"),
        {"train.jsonl": TEXTS, "dev.jsonl": TEXTS},
    ),
}
FILES = [(reader, name) for reader, (_, files) in READERS.items() for name in files]


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["no byte", "blank"])
@pytest.mark.parametrize(("reader", "name"), FILES)
def test_an_empty_file_is_named_and_no_other_is_blamed(
    reader: str, name: str, content: str, tmp_path: Path
) -> None:
    make, files = READERS[reader]
    folder = put(tmp_path / "set", files)
    assert len(make(str(folder)).collection(tmp_path / "cache").corpus) > 0
    put(folder, {name: content})
    with pytest.raises(InputError) as caught:
        make(str(folder)).collection(tmp_path / "cache")
    assert caught.value.code in ("empty-file", "empty-split", "empty-corpus")
    assert str(folder / name) in str(caught.value)


def test_a_header_alone_is_no_judgement(tmp_path: Path) -> None:
    files = READERS["beir"][1] | {"qrels/test.tsv": "query-id\tcorpus-id\tscore\n"}
    with refused("empty-split", "test.tsv"):
        Beir(str(put(tmp_path / "set", files))).collection(tmp_path / "cache")


def test_without_judgements_there_may_be_no_query_either(tmp_path: Path) -> None:
    files = {"corpus.tsv": "a\tfat\n", "queries.tsv": ""}
    found = Tsv(str(put(tmp_path / "set", files))).collection(tmp_path / "cache")
    assert (len(found.corpus), len(found.queries), found.splits) == (1, 0, ())


def test_one_of_several_files_of_rows_may_be_empty(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", {"a.jsonl": "", "b.jsonl": TEXTS})
    assert len(FlagEmbedding(str(folder)).collection(tmp_path / "cache").corpus) == 2
    put(folder, {"b.jsonl": ""})
    with refused("empty-file", "a.jsonl"):
        FlagEmbedding(str(folder)).collection(tmp_path / "cache")
