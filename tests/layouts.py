"""Small files in each of the layouts of data that Caravan reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tests.tiny import WORDS

from caravan.data.readers.labelled import Beir, Tsv
from caravan.data.readers.msmarco import MsMarcoDocument, MsMarcoPassage
from caravan.data.readers.training_rows import TrainingRows

PASSAGES = [
    (f"{i}", f"Title {i}" if i % 3 else "", " ".join([*WORDS[i:10], *WORDS[:2], "café\u2028new"]))
    for i in range(10)
]
QUERIES = [(f"{100 + i}", f"{WORDS[i]} {WORDS[i + 1]}") for i in range(5)]
JUDGED = [("100", "0", 1), ("101", "1", 2), ("101", "7", 0), ("102", "2", 1), ("104", "9", -1)]
SOURCES: dict[str, Callable[[str], Any]] = {
    "beir": Beir,
    "tsv with headers": Tsv,
    "tsv without titles": Tsv,
    "msmarco passages": MsMarcoPassage,
    "msmarco documents": MsMarcoDocument,
    "tevatron": TrainingRows,
    "tevatron beside a corpus": TrainingRows,
    "flagembedding": TrainingRows,
}


def lines(rows: Iterable[Sequence[Any]], between: str = "\t") -> str:
    return "".join(between.join(map(str, row)) + "\n" for row in rows)


def files_of(
    layout: str,
    passages: Sequence[tuple[str, str, str]] = PASSAGES,
    queries: Sequence[tuple[str, str]] = QUERIES,
    judged: Sequence[tuple[str, str, int]] = JUDGED,
) -> dict[str, str]:
    """The files of a folder in a layout, by name, each of them with some of the records.

    Args:
        layout: one of `SOURCES`, whose class reads the folder.
        passages: (id, title, text) of each; a row of training has the passage at the place of its
            query as its positive, and the next two as negatives.
    """
    untitled = [(name, text) for name, _, text in passages]
    trec = [(query, 0, passage, grade) for query, passage, grade in judged]
    named = [{"docid": i, "title": t, "text": x, "score": len(x) / 7} for i, t, x in passages]

    def training(passage: Sequence[Any], positive: str, negative: str, query: str) -> list[Any]:
        sides = [(passage[at : at + 1], passage[at + 1 : at + 3]) for at in range(len(queries))]
        return [
            {"query_id": name, query: text, positive: own, negative: others}
            for (name, text), (own, others) in zip(queries, sides, strict=True)
        ]

    joined = training([text for _, text in untitled], "pos", "neg", "query")
    for row in joined:
        del row["query_id"]
        scores: list[float | None] = [0.25, None]
        row |= {"pos_scores": [0.5], "neg_scores": scores[: len(row["neg"])], "prompt": "x"}
    return {
        "beir": {
            "corpus.jsonl": _jsonl({"_id": i, "title": t, "text": x} for i, t, x in passages),
            "queries.jsonl": _jsonl(
                {"_id": i, "text": x, "metadata": {"a": [1]}} for i, x in queries
            ),
            "qrels/test.tsv": "query-id\tcorpus-id\tscore\n" + lines(judged),
            "qrels/train.tsv": "query-id\tcorpus-id\tscore\n" + lines(judged[:2]),
        },
        "tsv with headers": {
            "corpus.tsv": "id\ttitle\ttext\n" + lines(passages),
            "queries.tsv": "id\ttext\n" + lines(queries),
            "qrels.test.tsv": lines(trec),
        },
        "tsv without titles": {
            "corpus.tsv": lines(untitled),
            "queries.tsv": lines(queries),
            "qrels.test.tsv": lines(judged),
        },
        "msmarco passages": {
            "collection.tsv": lines(untitled),
            "queries.dev.small.tsv": lines(queries[:3]),
            "qrels.dev.small.tsv": lines(trec[:3]),
            "msmarco-test2019-queries.tsv": lines(queries[-3:]),
            "2019qrels-pass.txt": lines(trec[-2:], " "),
        },
        "msmarco documents": {
            "msmarco-docs.tsv": lines((i, f"http://{i}", t, x) for i, t, x in passages),
            "msmarco-docdev-queries.tsv": lines(queries),
            "msmarco-docdev-qrels.tsv": lines(trec, " "),
        },
        "tevatron": {
            "train.jsonl": _jsonl(
                training(named, "positive_passages", "negative_passages", "query")
            )
        },
        "tevatron beside a corpus": {
            "train.jsonl": _jsonl(
                training(
                    [passage["docid"] for passage in named],
                    "positive_document_ids",
                    "negative_document_ids",
                    "query_text",
                )
            ),
            "corpus.jsonl": _jsonl({"docid": i, "title": t, "text": x} for i, t, x in passages),
        },
        "flagembedding": {"train.jsonl": _jsonl(joined)},
    }[layout]


def _jsonl(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
