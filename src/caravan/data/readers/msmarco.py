"""MS MARCO as it is published, passages and documents, with the topics of TREC DL 2019 and 2020.

A folder holds the official files under their names, each plain or .gz; a split exists when its
qrels do: train, dev (for passages the 6,980 queries that papers report), dl19, dl20. Judgements of
TREC DL are graded, and of its passages only grade 2 and more counts as relevant in metrics without
grades, as the tracks define it (arXiv 2003.07820, 2102.07662). The top1000 and top100 files are
runs: give them where a run is expected.

    python evaluate.py retriever=bm25 data=msmarco_passage data.path=/data/msmarco data.split=dl19
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from caravan.data.readers.labelled import (
    Folder,
    LabelledFiles,
    Reader,
    json_records,
    tsv_passages,
    tsv_queries,
)
from caravan.data.readers.lines import columns, lines, one_of
from caravan.data.texts import ASCII_SPACE, Record
from caravan.errors import InputError
from caravan.files import listed


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
        ("queries.dev.small.tsv", "topics.msmarco-passage.dev-subset.txt"),
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
DOCUMENTS = ("msmarco-docs.tsv", "msmarco-docs.trec")
DOCUMENT_COLUMNS = [("id", "url", "title", "text")]
TAGS = ("<DOC>", "<DOCNO>", "<TEXT>", "</TEXT>", "</DOC>")
"""The tags of a TREC document in their order, each on a separate line."""


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
        corpus = _corpus(folder, self.corpus, PASSAGES)
        is_json = corpus.name.removesuffix(".gz").endswith((".jsonl", ".json"))
        read = json_records if is_json else tsv_passages
        return _files(("msmarco_passage", is_json), folder, corpus, read, PASSAGE_SPLITS)


@dataclass
class MsMarcoDocument(Folder):
    """MS MARCO's documents: msmarco-docs.tsv, or .trec, where bodies keep their lines.

    Splits are train, dev, dl19 and dl20.

    Args:
        corpus: the file of documents in the folder, if there are both.
        urls: put the address before the title, as in RepLLaMA's training.
    """

    split: str = "dev"
    corpus: str | None = None
    urls: bool = True

    def files(self, folder: Path) -> LabelledFiles:
        corpus = _corpus(folder, self.corpus, DOCUMENTS)
        is_trec = corpus.name.removesuffix(".gz").endswith(".trec")
        layout = ("msmarco_document", is_trec, self.urls)
        read = self._trec if is_trec else self._tsv
        return _files(layout, folder, corpus, read, DOCUMENT_SPLITS)

    def _tsv(self, file: Path) -> Iterator[tuple[int, Record]]:
        for number, (name, url, title, body) in columns(file, DOCUMENT_COLUMNS):
            yield number, (name, self._title(url, title), body)

    def _trec(self, file: Path) -> Iterator[tuple[int, Record]]:
        for number, (name, text) in trec_documents(file):
            url, title, body = (*text.lstrip("\n").split("\n", 2), "", "")[:3]
            yield number, (name, self._title(url, title), body)

    def _title(self, url: str, title: str) -> str:
        return f"{url} {title}".strip() if self.urls else title


def trec_documents(file: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line number of <DOC>, (id, the lines between <TEXT> and </TEXT>)) of each document.

    Raises:
        InputError: "damaged-file", a tag is missing or repeated, or there is text beside the tags.
    """
    start, name, text, step = 0, "", list[str](), 0
    number = 0
    for number, line in lines(file, blank=True):
        tag = line.strip(ASCII_SPACE)
        found = "<DOCNO>" if tag.startswith("<DOCNO>") else tag
        if found in TAGS:
            if found != TAGS[step] or (step == 1 and not tag.endswith("</DOCNO>")):
                raise _damaged(file, number, tag, step, start)
            if step == 0:
                start, text = number, []
            elif step == 1:
                name = tag.removeprefix("<DOCNO>").removesuffix("</DOCNO>").strip(ASCII_SPACE)
            elif step == 4:
                yield start, (name, "\n".join(text))
            step = (step + 1) % len(TAGS)
        elif step == 3:
            text.append(line.rstrip("\r\n"))
        elif tag and (step == 0 or not tag.startswith("<")):
            raise _damaged(file, number, tag, step, start)
    if step:
        raise _damaged(file, number, "the end of the file", step, start)


def _damaged(file: Path, number: int, found: str, step: int, start: int) -> InputError:
    document = f" of the document at line {start}" if step else ""
    return InputError(
        "damaged-file",
        f"{file}:{number}: {found[:40]!r} where {TAGS[step]}{document} belongs: the file is cut or"
        " damaged, fetch it again",
    )


def _corpus(folder: Path, given: str | None, names: tuple[str, ...]) -> Path:
    """The file that holds the corpus."""
    if given is not None:
        file = folder / given  # or an absolute path, which replaces the folder
        if not file.is_file():
            raise InputError("file-not-found", f"there is no file {file}: correct data.corpus")
        return file
    there = [folder / f"{name}{end}" for name in names for end in ("", ".gz")]
    there = [file for file in there if file.is_file()]
    if len(there) > 1:
        found = " and ".join(file.name for file in there)
        raise InputError("ambiguous-files", f"{folder} holds {found}: choose with data.corpus")
    if not there:
        remedy = f"put {' or '.join(names)} there (or .gz), or name the file with data.corpus"
        for file in listed(folder):
            if file.name.endswith(".tar.gz"):
                remedy = f"unpack {file.name} there (tar -xzf)"
        raise InputError("file-not-found", f"{folder} holds no corpus: {remedy}")
    return there[0]


def _files(
    layout: tuple[Any, ...],
    folder: Path,
    corpus: Path,
    passages: Reader,
    splits: Mapping[str, Split],
) -> LabelledFiles:
    """The splits whose qrels exist, with their queries."""
    queries: list[Path] = []
    qrels: dict[str, Path] = {}
    for split, names in splits.items():
        judged = one_of(folder, names.qrels)
        if judged is None:
            continue
        file = one_of(folder, names.queries)
        if file is None and split == "dev":
            file = one_of(folder, ["queries.dev.tsv"])  # includes the 6,980
        if file is None:
            wanted = f"put {' or '.join(names.queries)} (or .gz) there"
            raise InputError("file-not-found", f"{folder} holds {judged.name} alone: {wanted}")
        qrels[split] = judged
        if file not in queries:
            queries.append(file)
    if not queries:
        known = ", ".join(names.qrels[0] for names in splits.values())
        raise InputError("file-not-found", f"{folder} holds no qrels: put {known} or .gz there")
    relevant = {split: splits[split].relevant_from for split in qrels}
    relevant = {split: grade for split, grade in relevant.items() if grade != 1}
    return LabelledFiles(layout, corpus, passages, queries, tsv_queries, qrels, relevant)
