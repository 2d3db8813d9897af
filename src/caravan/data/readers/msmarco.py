"""MS MARCO as it is published, passages and documents, with the topics of TREC DL 2019 and 2020.

A folder holds the official files under their names, each plain or .gz; a split exists when its
qrels do: train, dev (for passages the 6,980 queries that papers report), dl19, dl20. Judgements of
TREC DL are graded, and of its passages only grade 2 and more counts as relevant in metrics without
grades, as the tracks define it (arXiv 2003.07820, 2102.07662).

    python evaluate.py retriever=bm25 data=msmarco_passage data.path=/data/msmarco data.split=dl19
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from caravan.data.readers.labelled import Folder, LabelledFiles
from caravan.data.readers.lines import columns, one_of, required, some
from caravan.data.texts import Record


class Split(NamedTuple):
    """File names of a split: those of Microsoft and NIST, then Anserini's."""

    queries: tuple[str, ...]
    qrels: tuple[str, ...]
    relevant_from: int = 1


TOPICS_2019 = "msmarco-test2019-queries.tsv"
TOPICS_2020 = ("msmarco-test2020-queries.tsv", "topics.dl20.txt")
PASSAGE_SPLITS = {
    "train": Split(("queries.train.tsv",), ("qrels.train.tsv",)),
    "dev": Split(
        # queries.dev.tsv includes the 6,980
        ("queries.dev.small.tsv", "topics.msmarco-passage.dev-subset.txt", "queries.dev.tsv"),
        ("qrels.dev.small.tsv", "qrels.msmarco-passage.dev-subset.txt"),
    ),
    "dev_all": Split(("queries.dev.tsv",), ("qrels.dev.tsv",)),
    "dl19": Split(
        (TOPICS_2019, "topics.dl19-passage.txt"),
        ("2019qrels-pass.txt", "qrels.dl19-passage.txt"),
        relevant_from=2,
    ),
    "dl20": Split(TOPICS_2020, ("2020qrels-pass.txt", "qrels.dl20-passage.txt"), relevant_from=2),
}
DOCUMENT_SPLITS = {
    "train": Split(("msmarco-doctrain-queries.tsv",), ("msmarco-doctrain-qrels.tsv",)),
    "dev": Split(
        ("msmarco-docdev-queries.tsv", "topics.msmarco-doc.dev.txt"),
        ("msmarco-docdev-qrels.tsv", "qrels.msmarco-doc.dev.txt"),
    ),
    "dl19": Split(
        (TOPICS_2019, "topics.dl19-doc.txt"), ("2019qrels-docs.txt", "qrels.dl19-doc.txt")
    ),
    "dl20": Split(TOPICS_2020, ("2020qrels-docs.txt", "qrels.dl20-doc.txt")),
}
PASSAGES = ("collection.tsv", "corpus.tsv", "collection.jsonl", "corpus.jsonl")
DOCUMENT_COLUMNS = [("id", "url", "title", "text")]


@dataclass
class MsMarcoPassage(Folder):
    """MS MARCO's passages, with titles (as RocketQA and Tevatron add them) or without.

    Splits are train, dev, dev_all (every judged dev query), dl19 and dl20.

    Args:
        corpus: the file of passages in the folder, if there are several: .tsv of id and text or of
            id, title and text, or .jsonl with the keys docid (or _id, id), title and text.
    """

    split: str = "dev"
    corpus: str | None = None

    def files(self, folder: Path) -> LabelledFiles:
        corpus = folder / self.corpus if self.corpus else required(folder, *PASSAGES)
        queries, qrels = _splits(folder, PASSAGE_SPLITS)
        grades = {split: PASSAGE_SPLITS[split].relevant_from for split in qrels}
        graded = {split: grade for split, grade in grades.items() if grade != 1}
        return LabelledFiles(("msmarco_passage",), corpus, queries, qrels, relevant_from=graded)


@dataclass
class MsMarcoDocument(Folder):
    """MS MARCO's documents, msmarco-docs.tsv.

    Splits are train, dev, dl19 and dl20.

    Args:
        urls: put the address before the title, as in RepLLaMA's training.
    """

    split: str = "dev"
    urls: bool = True

    def files(self, folder: Path) -> LabelledFiles:
        corpus = required(folder, "msmarco-docs.tsv")
        queries, qrels = _splits(folder, DOCUMENT_SPLITS)
        layout = ("msmarco_document", self.urls)
        return LabelledFiles(layout, corpus, queries, qrels, self._documents)

    def _documents(self, file: Path) -> Iterator[tuple[str, Record]]:
        for place, (name, url, title, body) in some(file, columns(file, DOCUMENT_COLUMNS)):
            yield place, (name, f"{url} {title}".strip() if self.urls else title, body)


def _splits(folder: Path, splits: Mapping[str, Split]) -> tuple[list[Path], dict[str, Path]]:
    """The files of queries, and the qrels by split, of the splits whose qrels exist."""
    queries: dict[Path, None] = {}
    qrels: dict[str, Path] = {}
    for split, names in splits.items():
        judged = one_of(folder, names.qrels)
        if judged is not None:
            there = [name for name in names.queries if one_of(folder, [name])]
            queries[required(folder, *(there[:1] or names.queries))] = None
            qrels[split] = judged
    return list(queries), qrels
