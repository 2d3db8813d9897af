"""Damaged data files: each is refused in a sentence, or read as plain Python reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.files import judged, put, records
from tests.fuzz import naive
from tests.fuzz.mutations import amounts, sampled, text_mutants
from tests.fuzz.mutations import put as put_mutant

from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir, Tsv
from caravan.data.readers.msmarco import MsMarcoDocument, MsMarcoPassage
from caravan.data.readers.training_rows import TrainingRows

TREC_COLUMNS = ("qid", "Q0", "pid", "rank", "score", "tag")

WORDS = ["camel", "caravan", "desert", "dune", "water", "oasis", "salt", "trade", "route", "night"]
PASSAGES = [
    (f"{i}", f"Title {i}" if i % 3 else "", " ".join(WORDS[i:] + WORDS[:2] + ["café"]))
    for i in range(10)
]
QUERIES = [(f"{100 + i}", f"{WORDS[i]} {WORDS[i + 1]}") for i in range(5)]
JUDGED = [("100", "0", 1), ("101", "1", 2), ("101", "7", 0), ("102", "2", 1), ("104", "9", -1)]


class Layout(NamedTuple):
    """Files of a layout, and how Caravan and plain Python read them in a folder."""

    files: dict[str, str]
    source: Callable[[Path], Any]
    plain: Callable[[Path], naive.Read]
    zipped: bool = False


def _jsonl(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _lines(rows: Any, between: str = "\t") -> str:
    return "".join(between.join(map(str, row)) + "\n" for row in rows)


def _splits(folder: Path, pattern: str, prefix: str = "") -> dict[str, Any]:
    """The judgements of each qrels file that is there."""
    return {
        file.name.removeprefix(prefix).partition(".")[0]: naive.qrels(file)
        for file in sorted(folder.glob(pattern))
    }


def _beir(folder: Path) -> naive.Read:
    corpus, queries = (
        naive.jsonl(folder / f"{part}.jsonl", "_id") for part in ("corpus", "queries")
    )
    return naive.collection(corpus, [(i, "", t) for i, _, t in queries], _splits(folder, "qrels/*"))


def _tsv(folder: Path) -> naive.Read:
    queries = naive.tsv(folder / "queries.tsv")
    naive.need(not any(title for _, title, _ in queries), "three columns")
    splits = _splits(folder, "qrels.*", "qrels.")
    return naive.collection(naive.tsv(folder / "corpus.tsv"), queries, splits)


def _marco(reader: Callable[[Path], list[naive.Record]], names: dict[str, tuple[str, str]]) -> Any:
    def read(folder: Path) -> naive.Read:
        corpus = next(
            iter(sorted(folder.glob("*collection*")) + sorted(folder.glob("*docs.*"))), None
        )
        naive.need(corpus, "no corpus")
        splits, queries = {}, list[naive.Record]()
        for split, (asked, own) in names.items():
            if (folder / own).exists():
                splits[split] = naive.qrels(folder / own)
                queries += naive.tsv(folder / asked)
        queries = list(dict.fromkeys(queries))  # one that is in several files is one query
        assert corpus is not None
        return naive.collection(reader(corpus), queries, splits)

    return read


def _rows(passage: Callable[[Any], Any], positive: str, negative: str, query: str) -> list[Any]:
    listed = []
    for at, (name, text) in enumerate(QUERIES):
        own, others = PASSAGES[at], PASSAGES[at + 1 : at + 3]
        sides = {positive: [passage(own)], negative: list(map(passage, others))}
        listed.append({"query_id": name, query: text, **sides})
    return listed


_BEIR_FILES = {
    "corpus.jsonl": _jsonl({"_id": i, "title": t, "text": x} for i, t, x in PASSAGES),
    "queries.jsonl": _jsonl({"_id": i, "text": x, "metadata": {"a": [1]}} for i, x in QUERIES),
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\n" + _lines(JUDGED),
    "qrels/train.tsv": "query-id\tcorpus-id\tscore\n" + _lines(JUDGED[:2]),
}
_PASSAGE_SPLITS = {
    "dev": ("queries.dev.small.tsv", "qrels.dev.small.tsv"),
    "dl19": ("msmarco-test2019-queries.tsv", "2019qrels-pass.txt"),
}
_DOCUMENT_SPLITS = {"dev": ("msmarco-docdev-queries.tsv", "msmarco-docdev-qrels.tsv")}
_OF_DOCUMENTS = {
    "msmarco-docdev-queries.tsv": _lines(QUERIES),
    "msmarco-docdev-qrels.tsv": _lines(((q, 0, p, g) for q, p, g in JUDGED), " "),
}
LAYOUTS = {
    "beir": Layout(_BEIR_FILES, lambda to: Beir(str(to)), _beir),
    "beir, gzipped": Layout(_BEIR_FILES, lambda to: Beir(str(to)), _beir, zipped=True),
    "tsv with headers": Layout(
        {
            "corpus.tsv": "id\ttitle\ttext\n" + _lines(PASSAGES),
            "queries.tsv": "id\ttext\n" + _lines(QUERIES),
            "qrels.test.tsv": _lines((q, 0, p, g) for q, p, g in JUDGED),
        },
        lambda to: Tsv(str(to)),
        _tsv,
    ),
    "tsv without titles": Layout(
        {
            "corpus.tsv": _lines((name, text) for name, _, text in PASSAGES),
            "queries.tsv": _lines(QUERIES),
            "qrels.test.tsv": _lines(JUDGED),
        },
        lambda to: Tsv(str(to)),
        _tsv,
    ),
    "msmarco passages": Layout(
        {
            "collection.tsv": _lines((name, text) for name, _, text in PASSAGES),
            "queries.dev.small.tsv": _lines(QUERIES[:3]),
            "qrels.dev.small.tsv": _lines((q, 0, p, g) for q, p, g in JUDGED[:3]),
            "msmarco-test2019-queries.tsv": _lines(QUERIES[2:]),
            "2019qrels-pass.txt": _lines(((q, "Q0", p, g) for q, p, g in JUDGED[3:]), " "),
        },
        lambda to: MsMarcoPassage(str(to)),
        _marco(naive.tsv, _PASSAGE_SPLITS),
    ),
    "msmarco documents": Layout(
        {
            "msmarco-docs.tsv": _lines((i, f"http://{i}", t, x) for i, t, x in PASSAGES),
            **_OF_DOCUMENTS,
        },
        lambda to: MsMarcoDocument(str(to)),
        _marco(naive.documents_tsv, _DOCUMENT_SPLITS),
    ),
    "tevatron": Layout(
        {
            "rows.jsonl": _jsonl(
                _rows(
                    lambda p: {"docid": p[0], "title": p[1], "text": p[2], "score": int(p[0]) / 7},
                    *("positive_passages", "negative_passages", "query"),
                )
            )
        },
        lambda to: TrainingRows(str(to / "rows.jsonl")),
        lambda to: naive.tevatron(to / "rows.jsonl"),
    ),
    "tevatron beside a corpus": Layout(
        {
            "rows.jsonl": _jsonl(
                _rows(
                    lambda p: p[0],
                    *("positive_document_ids", "negative_document_ids", "query_text"),
                )
            ),
            "corpus.jsonl": _jsonl({"docid": i, "title": t, "text": x} for i, t, x in PASSAGES),
        },
        lambda to: TrainingRows(str(to / "rows.jsonl"), corpus=str(to / "corpus.jsonl")),
        lambda to: naive.tevatron(to / "rows.jsonl", to / "corpus.jsonl"),
    ),
    "flagembedding": Layout(
        {
            "rows.jsonl": _jsonl(
                {
                    **{key: row[key] for key in row if key != "query_id"},
                    "pos_scores": [0.5],
                    "neg_scores": [0.25, None],
                    "prompt": "x",
                }
                for row in _rows(lambda p: p[2], "pos", "neg", "query")
            )
        },
        lambda to: TrainingRows(str(to / "rows.jsonl")),
        lambda to: naive.flagembedding(to / "rows.jsonl"),
    ),
}


def _read(source: Any, cache: Path) -> naive.Read:
    found: Collection = source.collection(cache)
    runs = {}
    for name in found.runs:
        ids = ({i for i, _, _ in records(part)} for part in (found.queries, found.corpus))
        runs[name] = naive.run(found.run_path(f"data:{name}"), TREC_COLUMNS, *ids)
    splits = {split: judged(found, split) for split in found.splits}
    return naive.Read(records(found.corpus), records(found.queries), splits, runs)


def _tried(layout: Layout, folder: Path, number: int) -> None:
    put(folder / "data", layout.files, layout.zipped)
    there = folder / "data"

    def compared(name: str) -> bool:
        return naive.agrees(
            name, lambda: layout.plain(there), lambda: _read(layout.source(there), folder / "cache")
        )

    assert compared("the undamaged files")
    for file in layout.files:
        path = there / (f"{file}.gz" if layout.zipped else file)
        data = path.read_bytes()
        for mutant in sampled(text_mutants(file, data, seed=0), number, seed=1):
            put_mutant(path, mutant)
            read = compared(f"{file}: {mutant.name}")
            assert read or mutant.name not in naive.HARMLESS or layout.zipped, (
                f"{file}: {mutant.name}"
            )
        path.write_bytes(data)


@amounts(2, 80)  # of about 130 of each file
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_collections_are_refused_or_read_whole(
    layout: str, number: int, tmp_path: Path
) -> None:
    _tried(LAYOUTS[layout], tmp_path, number)
