"""Ids, packing and stray files as other tools and machines leave them, in every reader."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.files import judged, put, records
from tests.refusals import refused

from caravan.cli.evaluate import members
from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir, Tsv
from caravan.data.readers.msmarco import MsMarcoDocument, MsMarcoPassage
from caravan.data.readers.texts import TextFiles
from caravan.data.readers.training_rows import FlagEmbedding, Tevatron
from caravan.data.runs import Run, read_run, write_run

DOC = "<DOC>\n<DOCNO>{p}</DOCNO>\n<TEXT>\nurl\ntitle\nfat\n</TEXT>\n</DOC>\n"
READERS: dict[str, tuple[Callable[[str], Any], dict[str, str]]] = {
    "tsv": (
        Tsv,
        {
            "corpus.tsv": "{p}\tfat\n",
            "queries.tsv": "{q}\tcamel\n",
            "qrels/test.tsv": "query-id\tcorpus-id\tscore\n{q}\t{p}\t1\n",
        },
    ),
    "beir": (
        Beir,
        {
            "corpus.jsonl": '{{"_id": "{p}", "text": "fat"}}\n',
            "queries.jsonl": '{{"_id": "{q}", "text": "camel"}}\n',
            "qrels/test.tsv": "{q} 0 {p} 1\n",
        },
    ),
    "msmarco_passage": (
        MsMarcoPassage,
        {
            "collection.tsv": "{p}\tfat\n",
            "queries.train.tsv": "{q}\tcamel\n",
            "qrels.train.tsv": "{q}\t0\t{p}\t1\n",
        },
    ),
    "msmarco_document": (
        MsMarcoDocument,
        {
            "msmarco-docs.trec": DOC,
            "msmarco-docdev-queries.tsv": "{q}\tcamel\n",
            "msmarco-docdev-qrels.tsv": "{q} 0 {p} 1\n",
        },
    ),
    "tevatron": (
        Tevatron,
        {
            "train.jsonl": '{{"query_id": "{q}", "query_text": "camel", '
            '"positive_document_ids": ["{p}"], "negative_document_ids": []}}\n',
            "corpus.jsonl": '{{"docid": "{p}", "text": "fat"}}\n',
        },
    ),
}
LABELLED = pytest.mark.parametrize("layout", list(READERS))


def build(
    tmp_path: Path, layout: str, query: str = "q", passage: str = "p", zipped: bool = False
) -> Collection:
    reader, files = READERS[layout]
    filled = {name: text.format(q=query, p=passage) for name, text in files.items()}
    put(tmp_path / "set", filled, zipped)
    return reader(str(tmp_path / "set")).collection(tmp_path / "cache")


@LABELLED
@pytest.mark.parametrize("space", ["\xa0", "\u3000"])
def test_ids_with_other_than_ascii_space_stay_whole(
    tmp_path: Path, layout: str, space: str, caplog: pytest.LogCaptureFixture
) -> None:
    query, passage = f"q{space}", f"{space}p{space}1"
    found = build(tmp_path, layout, query, passage)
    assert [name for name, *_ in records(found.corpus)] == [passage]
    assert judged(found, found.splits[0]) == {(query, passage): 1}
    assert len([r for r in caplog.records if "2 ids have white space" in r.message]) == 1
    rows = found.queries.rows([query]), found.corpus.rows([passage])
    path = tmp_path / "x.trec"
    write_run(path, Run.from_flat(*rows, scores=[2.0]), found.queries, found.corpus)
    assert read_run(path, found.queries, found.corpus).passage_rows.tolist() == [0]
    # as trec_eval reads it: bytes.split divides where C's isspace does
    assert [len(line.split()) for line in path.read_bytes().splitlines()] == [6]


@LABELLED
@pytest.mark.parametrize("side", ["query", "passage"])
@pytest.mark.parametrize("character", ["\x85", "\u2028", "\x1c", "\x00"])
def test_ids_with_line_breaks_or_control_characters_are_refused(
    tmp_path: Path, layout: str, side: str, character: str
) -> None:
    escaped = READERS[layout][0] in (Beir, Tevatron) and character < " "  # JSON has it no other way
    name = json.dumps(f"x{character}y")[1:-1] if escaped else f"x{character}y"
    with refused("invalid-id"):
        build(tmp_path, layout, **{side: name})


@LABELLED
def test_gzip_is_recognized_by_its_bytes(tmp_path: Path, layout: str) -> None:
    plain = build(tmp_path / "plain", layout)
    assert build(tmp_path / "zipped", layout, zipped=True).digest == plain.digest
    for kind, packed in (("unnamed", True), ("misnamed", False)):
        for name, text in READERS[layout][1].items():
            data = text.format(q="q", p="p").encode()
            path = tmp_path / kind / "set" / (name if packed else f"{name}.gz")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(data) if packed else data)
        reader = READERS[layout][0](str(tmp_path / kind / "set"))
        assert reader.collection(tmp_path / kind / "cache").digest == plain.digest


def test_another_archive_is_named(tmp_path: Path) -> None:
    put(tmp_path / "set", dict(READERS["tsv"][1]))
    (tmp_path / "set" / "corpus.tsv").write_bytes(b"PK\x03\x04\xff\xfe")
    with refused("unsupported-archive", "corpus.tsv"):
        Tsv(str(tmp_path / "set")).collection(tmp_path / "cache")


@LABELLED
def test_hidden_files_and_readmes_are_no_data(tmp_path: Path, layout: str) -> None:
    build(tmp_path, layout)
    folder = tmp_path / "set"
    for below in (folder, folder / "qrels"):
        below.mkdir(exist_ok=True)
        for name in ("._test.tsv", "._queries.dev.tsv", "._train.jsonl", ".DS_Store"):
            (below / name).write_bytes(b"\0\5\x16\7\xb0")
        (below / "README.txt").write_text("about\n")
        (below / "readme.tsv").write_text("about\n")
    found = READERS[layout][0](str(folder)).collection(tmp_path / "cache")
    again = [path for path in (tmp_path / "cache" / "collections").iterdir() if path.is_dir()]
    assert again == [found.folder]


def test_hidden_files_are_neither_texts_nor_rows_nor_collections(tmp_path: Path) -> None:
    put(tmp_path / "texts", {"a.jsonl": '{"text": "camel"}\n', "._a.jsonl": "\0\5"})
    assert len(TextFiles(str(tmp_path / "texts")).collection(tmp_path / "cache").corpus) == 1
    row = '{"query": "camel", "pos": ["fat"], "neg": ["salt"]}\n'
    put(tmp_path / "rows", {"a.jsonl": row, "._a.jsonl": "\0\5"})
    assert len(FlagEmbedding(str(tmp_path / "rows")).collection(tmp_path / "cache").corpus) == 2
    put(tmp_path, {"suite/one/corpus.jsonl": "", "suite/._one/corpus.jsonl": ""})
    put(tmp_path, {"suite/forum/a/corpus.jsonl": "", "suite/forum/._a/corpus.jsonl": ""})
    names = [member.name for member in members(tmp_path / "suite", ["*"])]
    assert names == ["forum/a", "one"]


@pytest.mark.parametrize("layout", ["beir", "tevatron", "flagembedding", "texts"])
@pytest.mark.parametrize("depth", [2_000, 200_000])
def test_deep_json_is_an_error_with_file_and_line(tmp_path: Path, layout: str, depth: int) -> None:
    deep = f'{{"text": {"[" * depth}{"]" * depth}}}\n'
    if layout == "flagembedding":
        row = '{"query": "camel", "pos": ["fat"]}\n'
        reader: Any = FlagEmbedding(str(put(tmp_path, {"rows.jsonl": row + deep}) / "rows.jsonl"))
    elif layout == "texts":
        reader = TextFiles(str(put(tmp_path, {"a.jsonl": '{"text": "fat"}\n' + deep}) / "a.jsonl"))
    else:
        kind, files = READERS[layout]
        filled = {name: text.format(q="q", p="p") for name, text in files.items()}
        filled["corpus.jsonl"] += deep
        reader = kind(str(put(tmp_path / "set", filled)))
    with refused("malformed-line"):
        reader.collection(tmp_path / "cache")


def test_a_deep_manifest_is_a_broken_collection(tmp_path: Path) -> None:
    found = build(tmp_path, "tsv")
    (found.folder / "collection.json").write_text("[" * 200_000)
    with refused("damaged-collection"):
        Collection.open(found.folder)
