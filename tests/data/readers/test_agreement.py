"""One collection in every layout: each reader gives the ids and counts that plain Python reads.

Of the tests' tiny collection, and (slow) of every BEIR folder under $CARAVAN_COLLECTIONS.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.files import judged, records

from caravan.data.collection import Collection
from caravan.data.readers.ir_datasets import IrDatasets
from caravan.data.readers.labelled import Beir, Tsv
from caravan.data.readers.msmarco import MsMarcoDocument, MsMarcoPassage
from caravan.data.readers.training_rows import FlagEmbedding, Tevatron

REAL = sorted(Path(os.environ.get("CARAVAN_COLLECTIONS", "/nonexistent")).glob("*/corpus.jsonl"))


class Plain(NamedTuple):
    """A BEIR folder as json and csv read it."""

    corpus: list[tuple[str, str, str]]
    queries: list[tuple[str, str, str]]
    qrels: dict[str, dict[tuple[str, str], int]]


def plain(folder: Path) -> Plain:
    def rows(name: str) -> Iterator[dict[str, Any]]:
        with open(folder / name, encoding="utf-8", newline="\n") as file:
            yield from (json.loads(line) for line in file)

    qrels = {}
    for file in sorted((folder / "qrels").glob("*.tsv")):
        with open(file, encoding="utf-8") as opened:
            listed = list(csv.reader(opened, delimiter="\t"))[1:]
        qrels[file.stem] = {(query, passage): int(grade) for query, passage, grade in listed}
    return Plain(
        [(row["_id"], row.get("title") or "", row["text"]) for row in rows("corpus.jsonl")],
        [(row["_id"], "", row["text"]) for row in rows("queries.jsonl")],
        qrels,
    )


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def flat(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(name, on_one_line(title), on_one_line(text)) for name, title, text in rows]


def write(path: Path, lines: Iterator[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def is_read(found: Collection, corpus: Any, queries: Any, qrels: Any) -> None:
    assert records(found.corpus) == corpus
    assert records(found.queries) == queries
    assert {split: judged(found, split) for split in found.splits} == qrels


@pytest.mark.parametrize(
    "folder", [None, *(pytest.param(file.parent, marks=pytest.mark.slow) for file in REAL)], ids=str
)
def test_every_reader_gives_what_plain_python_reads(
    folder: Path | None, beir: Path, tmp_path: Path, irds: Any
) -> None:
    read = plain(folder or beir)
    count = "refuse" if folder is None else "count"
    found = Beir(str(folder or beir), unknown_ids=count).collection(tmp_path)
    known = {name for name, _, _ in read.corpus}
    asked = {name for name, _, _ in read.queries}
    qrels = {
        split: {
            pair: grade for pair, grade in all_.items() if pair[0] in asked and pair[1] in known
        }
        for split, all_ in read.qrels.items()
    }
    is_read(found, read.corpus, read.queries, qrels)
    corpus, queries = flat(read.corpus), flat(read.queries)

    tsv = tmp_path / "tsv"
    write(tsv / "corpus.tsv", ("\t".join(row) + "\n" for row in corpus))
    write(tsv / "queries.tsv", (f"{name}\t{text}\n" for name, _, text in queries))
    for split, all_ in qrels.items():
        write(tsv / f"qrels.{split}.tsv", (f"{q}\t{p}\t{g}\n" for (q, p), g in all_.items()))
    is_read(Tsv(str(tsv)).collection(tmp_path), corpus, queries, qrels)

    of = next(iter(qrels.values()))
    layouts: list[tuple[Any, str, str, str]] = [
        (MsMarcoPassage, "collection.tsv", "queries.train.tsv", "qrels.train.tsv"),
        (
            *(MsMarcoDocument, "msmarco-docs.tsv"),
            *("msmarco-doctrain-queries.tsv", "msmarco-doctrain-qrels.tsv"),
        ),
    ]
    for layout, of_corpus, of_queries, of_qrels in layouts:
        marco, url = tmp_path / of_corpus, [""] if layout is MsMarcoDocument else []
        write(marco / of_corpus, ("\t".join((row[0], *url, *row[1:])) + "\n" for row in corpus))
        write(marco / of_queries, (f"{name}\t{text}\n" for name, _, text in queries))
        write(marco / of_qrels, (f"{q} 0 {p} {g}\n" for (q, p), g in of.items()))
        is_read(layout(str(marco)).collection(tmp_path), corpus, queries, {"train": of})

    positives: dict[str, list[str]] = {}
    for (query, passage), grade in of.items():
        if grade > 0:
            positives.setdefault(query, []).append(passage)
    texts = {name: (title, text) for name, title, text in read.corpus}
    rows_of = [(name, text, positives[name]) for name, _, text in read.queries if name in positives]
    wanted = {"train": {(name, passage): 1 for name, _, there in rows_of for passage in there}}
    by_id = (
        {"query_id": n, "query_text": t, "positive_document_ids": own, "negative_document_ids": []}
        for n, t, own in rows_of
    )
    write(tmp_path / "rows.jsonl", (json.dumps(row) + "\n" for row in by_id))
    write(
        tmp_path / "corpus.jsonl",
        (json.dumps({"docid": n, "title": t, "text": x}) + "\n" for n, t, x in read.corpus),
    )
    tevatron = Tevatron(str(tmp_path / "rows.jsonl"), corpus=str(tmp_path / "corpus.jsonl"))
    asked_rows = [(name, "", text) for name, text, _ in rows_of]
    is_read(tevatron.collection(tmp_path), read.corpus, asked_rows, wanted)

    inline = (
        {
            "query_id": name,
            "query": text,
            "positive_passages": [
                {"docid": p, "title": texts[p][0], "text": texts[p][1]} for p in own
            ],
            "negative_passages": [],
        }
        for name, text, own in rows_of
    )
    write(tmp_path / "inline.jsonl", (json.dumps(row) + "\n" for row in inline))
    used = list(dict.fromkeys(passage for _, _, own in rows_of for passage in own))
    is_read(
        Tevatron(str(tmp_path / "inline.jsonl")).collection(tmp_path),
        [(name, *texts[name]) for name in used],
        asked_rows,
        wanted,
    )

    flag = ({"query": t, "pos": [texts[p][1] for p in own], "neg": []} for _, t, own in rows_of)
    write(tmp_path / "flag.jsonl", (json.dumps(row) + "\n" for row in flag))
    ours = FlagEmbedding(str(tmp_path / "flag.jsonl")).collection(tmp_path)
    pairs = {(text, texts[passage][1]) for _, text, own in rows_of for passage in own}
    passages_of = {name: text for name, _, text in records(ours.corpus)}
    queries_of = {name: text for name, _, text in records(ours.queries)}
    assert {(queries_of[q], passages_of[p]) for q, p in judged(ours, "train")} == pairs
    assert len(ours.qrels("train")) == len(pairs)
    assert len(passages_of) == len({passage for _, passage in pairs}) == len(ours.corpus)

    write(tmp_path / "docs.tsv", (f"{n}\t{t} {x}\n" for n, t, x in corpus))
    write(tmp_path / "qrels", (f"{q} 0 {p} {g}\n" for (q, p), g in of.items()))
    name = f"agree-{tmp_path.parent.name}-{tmp_path.name}"
    irds.registry.register(
        f"{name}/train",
        irds.create_dataset(
            docs_tsv=str(tmp_path / "docs.tsv"),
            queries_tsv=str(tsv / "queries.tsv"),
            qrels_trec=str(tmp_path / "qrels"),
        ),
    )
    irds.registry.register(name, irds.create_dataset(docs_tsv=str(tmp_path / "docs.tsv")))
    known_there = [(n, "", f"{t} {x}") for n, t, x in corpus]
    is_read(IrDatasets(name).collection(tmp_path), known_there, queries, {"train": of})
