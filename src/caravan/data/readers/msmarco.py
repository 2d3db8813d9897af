"""MS MARCO as it is published, passages and documents, with the topics of TREC DL 2019 and 2020.

A folder holds the official files under their names, each plain or .gz; a split is there when its
qrels are: train, dev (for passages the 6,980 queries that papers report), dl19, dl20. Judgements
of TREC DL are graded, and of its passages only grade 2 and more counts as relevant in measures
that know no grades, as the tracks define it (arXiv 2003.07820, 2102.07662).
The top1000 and top100 files that go with it are runs: give them where a run is wanted.

    python evaluate.py retriever=bm25 data=msmarco_passage data.path=/data/msmarco data.split=dl19
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from caravan.data.ids import ASCII_SPACE
from caravan.data.readers import tsv
from caravan.data.readers.jsonl import records
from caravan.data.readers.labelled import Folder, Labelled, Reader
from caravan.data.readers.lines import columns, lines, one_of, text_of
from caravan.data.texts import Record
from caravan.errors import InputError
from caravan.files import listed


class Split(NamedTuple):
    """The names that the files of a split have: those of Microsoft and NIST, then Anserini's."""

    queries: tuple[str, ...]
    qrels: tuple[str, ...]
    relevant_from: int = 1


TOPICS_2019 = ("msmarco-test2019-queries.tsv",)
TOPICS_2020 = ("msmarco-test2020-queries.tsv", "topics.dl20.txt")
PASSAGE_SPLITS = {
    "train": Split(("queries.train.tsv",), ("qrels.train.tsv",)),
    "dev": Split(
        ("queries.dev.small.tsv", "topics.msmarco-passage.dev-subset.txt"),
        ("qrels.dev.small.tsv", "qrels.msmarco-passage.dev-subset.txt"),
    ),
    "dev_all": Split(("queries.dev.tsv",), ("qrels.dev.tsv",)),
    "dl19": Split(
        (*TOPICS_2019, "topics.dl19-passage.txt"),
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
        (*TOPICS_2019, "topics.dl19-doc.txt"), ("2019qrels-docs.txt", "qrels.dl19-doc.txt")
    ),
    "dl20": Split(TOPICS_2020, ("2020qrels-docs.txt", "qrels.dl20-doc.txt")),
}
PASSAGES = ("collection.tsv", "corpus.tsv", "collection.jsonl", "corpus.jsonl")
DOCUMENTS = ("msmarco-docs.tsv", "msmarco-docs.trec")
DOCUMENT_COLUMNS = ("id", "url", "title", "text")


@dataclass
class MsMarcoPassage(Folder):
    """MS MARCO's passages, with titles (as RocketQA and Tevatron add them) or without.

    Splits are train, dev, dev_all (every judged dev query), dl19 and dl20.

    Args:
        corpus: the file of passages in the folder, where there are several: .tsv of id and text or
            of id, title and text, or .jsonl with the keys docid (or _id, id), title and text.
    """

    split: str = "dev"
    corpus: str | None = None

    def files(self, folder: Path) -> Labelled:
        corpus = _corpus(folder, self.corpus, PASSAGES)
        of_json = corpus.name.removesuffix(".gz").endswith((".jsonl", ".json"))
        read = records if of_json else tsv.passages
        return _labelled(("msmarco_passage", of_json), folder, corpus, read, PASSAGE_SPLITS)


@dataclass
class MsMarcoDocument(Folder):
    """MS MARCO's documents: msmarco-docs.tsv, or .trec, where bodies have their lines.

    Splits are train, dev, dl19 and dl20.

    Args:
        corpus: the file of documents in the folder, where there are both.
        urls: put the address before the title, as RepLLaMA was trained.
    """

    split: str = "dev"
    corpus: str | None = None
    urls: bool = True

    def files(self, folder: Path) -> Labelled:
        corpus = _corpus(folder, self.corpus, DOCUMENTS)
        of_trec = corpus.name.removesuffix(".gz").endswith(".trec")
        layout = ("msmarco_document", of_trec, self.urls)
        read = self._trec if of_trec else self._tsv
        return _labelled(layout, folder, corpus, read, DOCUMENT_SPLITS)

    def _tsv(self, file: Path) -> Iterator[tuple[int, Record]]:
        for number, (name, url, title, body) in columns(
            file, [DOCUMENT_COLUMNS], "4 (id, address, title, body)"
        ):
            yield number, (name, self._title(url, title), body)

    def _trec(self, file: Path) -> Iterator[tuple[int, Record]]:
        for number, (name, text) in trec_documents(file):
            url, title, body = (*text.lstrip("\n").split("\n", 2), "", "")[:3]
            yield number, (name, self._title(url, title), body)

    def _title(self, url: str, title: str) -> str:
        return f"{url} {title}".strip() if self.urls else title


def trec_documents(file: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line number of <DOC>, (id, what stands between <TEXT> and </TEXT>)) of each document.

    Raises:
        InputError: a document has no such tag, two ids or texts, or text beside the tags.
    """
    start = 0  # line of the <DOC>
    name, text, state = "", list[str](), "before"  # the text
    for number, raw in lines(file, blank=True):
        line = text_of(file, number, raw)
        tag = line.strip(ASCII_SPACE)
        if tag == "<DOC>":
            if start:
                raise _lacking(file, start, "</DOC>", f"before the next at line {number}")
            start, name, text, state = number, "", [], "before"
        elif not start:
            if tag:
                raise InputError(
                    f"{file}:{number}: {tag[:40]!r} stands outside of a document: one begins with "
                    "<DOC> and ends with </DOC>"
                )
        elif tag == "</DOC>":
            if not name:
                raise InputError(
                    f"{file}:{start}: the document has no <DOCNO>: give it one, or leave it out"
                )
            if state != "after":
                raise _lacking(file, start, "</TEXT>" if state == "inside" else "<TEXT>", "")
            yield start, (name, "\n".join(text))
            start = 0
        elif tag.startswith("<DOCNO>"):
            if name or state != "before":
                raise _lacking(file, start, "</DOC>", f"before the <DOCNO> at line {number}")
            if not tag.endswith("</DOCNO>"):
                raise _lacking(file, start, "</DOCNO>", f"at line {number}")
            name = tag.removeprefix("<DOCNO>").removesuffix("</DOCNO>").strip(ASCII_SPACE)
        elif tag in ("<TEXT>", "</TEXT>"):
            if state != ("before" if tag == "<TEXT>" else "inside"):
                raise InputError(
                    f"{file}:{number}: {tag} is out of place, the document at line {start} has one "
                    "<TEXT> and one </TEXT>: the file is damaged, fetch it anew"
                )
            state = "inside" if tag == "<TEXT>" else "after"
        elif state == "inside":
            text.append(line.rstrip("\r\n"))
        elif tag and not tag.startswith("<"):
            raise InputError(
                f"{file}:{number}: {tag[:40]!r} stands outside of <TEXT> and </TEXT> in the "
                f"document at line {start}: the file is damaged, fetch it anew"
            )
    if start:
        raise _lacking(file, start, "</DOC>", "before the end of the file")


def _lacking(file: Path, start: int, tag: str, where: str) -> InputError:
    return InputError(
        f"{file}:{start}: the document has no {tag}{where and f' {where}'}: the file is cut or "
        "damaged, fetch it anew"
    )


def _corpus(folder: Path, given: str | None, names: tuple[str, ...]) -> Path:
    """The file that holds the corpus."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: set data.path to the one with {names[0]}")
    if given is not None:
        file = folder / given  # or an absolute path, which takes the folder's place
        if not file.is_file():
            raise InputError(f"there is no file {file}: set data.corpus to the corpus")
        return file
    there = [folder / f"{name}{end}" for name in names for end in ("", ".gz")]
    there = [file for file in there if file.is_file()]
    if len(there) > 1:
        told = " and ".join(file.name for file in there)
        raise InputError(f"{folder} holds {told}: choose with data.corpus={there[0].name}")
    if not there:
        packed = next((file for file in listed(folder) if file.name.endswith(".tar.gz")), None)
        remedy = (
            f"unpack {packed.name} there (tar -xzf)"
            if packed
            else f"put {' or '.join(names)} there (or .gz), or name the file with data.corpus"
        )
        raise InputError(f"{folder} holds no corpus: {remedy}")
    return there[0]


def _labelled(
    layout: tuple[Any, ...],
    folder: Path,
    corpus: Path,
    passages: Reader,
    splits: Mapping[str, Split],
) -> Labelled:
    """The splits whose qrels are there, with their queries."""
    queries: list[Path] = []
    qrels: dict[str, Path] = {}
    for split, names in splits.items():
        judged = one_of(folder, names.qrels)
        if judged is None:
            continue
        file = one_of(folder, names.queries)
        if file is None and split == "dev":
            file = one_of(folder, ["queries.dev.tsv"])  # the 6,980 are among these
        if file is None:
            raise InputError(
                f"{judged} is there, but not its queries: put {' or '.join(names.queries)} (or "
                f".gz) into {folder}"
            )
        qrels[split] = judged
        if file not in queries:
            queries.append(file)
    if not queries:
        known = ", ".join(names.qrels[0] for names in splits.values())
        raise InputError(f"{folder} holds no qrels: there may be {known} (or .gz)")
    relevant = {split: splits[split].relevant_from for split in qrels}
    relevant = {split: grade for split, grade in relevant.items() if grade != 1}
    return Labelled(layout, corpus, passages, queries, tsv.asked, qrels, relevant)
