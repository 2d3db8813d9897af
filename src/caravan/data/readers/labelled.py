"""Labelled collections in files: corpus, queries and qrels, as BEIR folders or plain .tsv.

A layout names its files and columns; `Folder` streams them into a collection, once for each content
of the files. MS MARCO's files are in `caravan.data.readers.msmarco`.

    python train.py data=beir data.path=/data/scifact
    python evaluate.py retriever=bm25 data=tsv data.path=/data/mine
"""

from __future__ import annotations

import functools
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caravan.data.collection import Collection
from caravan.data.qrels import Judgement, UnknownIds
from caravan.data.readers.lines import (
    PASSAGE_IDS,
    QUERY_IDS,
    RECORD,
    by_stem,
    column_name,
    columns,
    digest,
    lines,
    objects,
    one_of,
    parsed,
    record_of,
    required,
    some,
)
from caravan.data.source import Source, Stream, Streams, cache_key, cached_collection, held_out
from caravan.data.texts import ASCII_SPACE, Record, check_id, unique_records
from caravan.errors import InputError

QUERIES = [("id", "text")]
PASSAGES = [("id", "text"), ("id", "title", "text")]
"""Layouts of .tsv files."""
WORD = re.compile(f"[^{ASCII_SPACE}]+")
GRADE = re.compile(r"[+-]?[0-9]{1,9}")

Reader = Callable[[Path], Iterator[tuple[str, Record]]]
"""From a file to (place, (id, title, text)) of each record."""


def records(
    file: Path, layouts: Sequence[tuple[str, ...]] = PASSAGES
) -> Iterator[tuple[str, Record]]:
    """(place, record) of each line of a .jsonl file, or of a .tsv file in one of the layouts."""
    if file.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return some(file, parsed(objects(file, RECORD), record_of, RECORD))
    return some(file, _tsv_records(file, layouts))


def _tsv_records(file: Path, layouts: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, Record]]:
    # if the third column is empty on every line, lines of `id, text` end with a tab
    bare = all(len(found) == 3 and not found[2] for _, found in columns(file, layouts))
    for place, (name, *title, text) in columns(file, layouts):
        yield place, ((name, "", title[0]) if bare else (name, "".join(title), text))


def judgements(file: Path) -> Iterator[tuple[str, Judgement]]:
    """(place, judgement) of each line of a qrels file, plain or .gz, with or without header.

    19335 0 1017759 2                      TREC: query, iteration, passage, grade; any ASCII space
    query-id <tab> corpus-id <tab> score   BEIR

    Raises:
        InputError: "empty-file", "malformed-line", "invalid-grade", "invalid-id";
            "unknown-column", the header names the columns in another order.
    """
    return some(file, _judgements(file))


def _judgements(file: Path) -> Iterator[tuple[str, Judgement]]:
    widths: tuple[int, ...] = (3, 4)
    for at, (place, line) in enumerate(lines(file)):
        found = line.split("\t") if "\t" in line else WORD.findall(line)
        cells = [cell.strip(ASCII_SPACE) for cell in found]
        is_grade = GRADE.fullmatch(cells[-1])
        if at == 0 and not is_grade and column_name(cells[0]) in QUERY_IDS:
            if any(column_name(cell) in PASSAGE_IDS for cell in (*cells[:-2], cells[-1])):
                problem = f"{place}: reorder the columns to query, passage, grade: {cells}"
                raise InputError("unknown-column", problem)
            continue
        if len(cells) not in widths:
            expected = "query, passage, grade, or the four of TREC, on every line"
            problem = f"{place}: the number of columns is {len(cells)}: expected {expected}"
            raise InputError("malformed-line", problem)
        if not is_grade:
            raise InputError("invalid-grade", f"{place}: the grade {cells[-1]!r} is not an integer")
        for name in (cells[0], cells[-2]):
            check_id(name, place)
        widths = (len(cells),)
        yield place, (cells[0], cells[-2], int(cells[-1]))


@dataclass(frozen=True)
class LabelledFiles:
    """The files of a collection and how they are read.

    A query that is in several files is one query; its text must be the same.
    """

    layout: tuple[Any, ...]  # its name, and the options that affect what is read
    corpus: Path
    queries: Sequence[Path]
    qrels: Mapping[str, Path]  # by split
    passages: Reader = records
    relevant_from: Mapping[str, int] = field(default_factory=dict)  # by split, where it is not 1

    def read_queries(self) -> Iterator[tuple[str, Record]]:
        """(place, query), each query once."""
        found = (
            (place, (name, "", text))  # a title is not read
            for file in self.queries
            for place, (name, _, text) in records(file, QUERIES)
        )
        # in one file, a repeated id is a mistake
        return found if len(self.queries) == 1 else unique_records(found, "queries")


@dataclass
class Folder(Source):
    """A folder that holds a collection in some layout.

    Args:
        path: the folder.
        name: what reports call the collection; the name of the folder by default.
        train_split, dev_split, split: qrels to train on, to validate on, and to score.
        unknown_ids: "refuse" judgements of unknown queries or passages, or "count" them: training
            leaves them out, metrics count them as not found.
        held_out: share of the training queries, by a hash of their ids, that makes up the dev split
            of a folder without one.
    """

    path: str
    name: str | None = None
    train_split: str = "train"
    dev_split: str = "dev"
    split: str = "test"
    unknown_ids: UnknownIds = "refuse"
    held_out: float = 0.0

    def collection(self, cache_dir: str | Path) -> Collection:
        folder, share = Path(self.path), self.held_out
        if not folder.is_dir():
            raise InputError("folder-not-found", f"there is no folder {folder}: set data.path")
        files = self.files(folder)
        qrels: dict[str, Stream[Judgement]] = {
            split: functools.partial(judgements, file) for split, file in files.qrels.items()
        }
        qrels = held_out(qrels, share, self.train_split, self.dev_split)
        passages = functools.partial(files.passages, files.corpus)
        streams = Streams(str(files.corpus), passages, files.read_queries, qrels)
        settings = {"unknown_ids": self.unknown_ids, "relevant_from": dict(files.relevant_from)}
        name = self.name or folder.resolve().name

        def build(to: Path) -> Collection:
            # mistakes in the smaller files are reported before the corpus is read
            next(files.read_queries(), None)
            for split, read in qrels.items():
                if next(iter(read()), None) is None:
                    problem = f"{folder}: data.held_out={share} leaves {split} no query"
                    raise InputError("empty-split", f"{problem}: change it")
            return streams.write(to, name, **settings)

        read = [files.corpus, *files.queries, *files.qrels.values()]
        key = cache_key(
            *(files.layout, [digest(file, cache_dir) for file in read], list(files.qrels)),
            *(settings, (share, self.train_split, self.dev_split) if share else ()),
        )
        return cached_collection(cache_dir, name, key, build, resumes=True)

    @abstractmethod
    def files(self, folder: Path) -> LabelledFiles:
        """The files of the folder, and how they are read."""


@dataclass
class Beir(Folder):
    """corpus.jsonl, queries.jsonl and qrels/<split>.tsv (BEIR, Thakur et al. 2021, 2104.08663)."""

    def files(self, folder: Path) -> LabelledFiles:
        corpus, queries = (required(folder, f"{part}.jsonl") for part in ("corpus", "queries"))
        qrels = by_stem(folder, "qrels/*.tsv", "qrels/*.txt", "qrels/*.qrels")
        return LabelledFiles(("beir",), corpus, [queries], qrels)


@dataclass
class Tsv(Folder):
    """Files of tab-separated columns, with or without a header.

    corpus.tsv           id <tab> text, or id <tab> title <tab> text
    queries.tsv          id <tab> text; or queries.<split>.tsv for each split
    qrels.<split>.tsv    query <tab> passage <tab> grade, or TREC's; or qrels/<split>.tsv
    """

    def files(self, folder: Path) -> LabelledFiles:
        corpus = required(folder, "corpus.tsv")
        queries = list(by_stem(folder, "queries.*.tsv").values())
        if not queries or one_of(folder, ["queries.tsv"]):
            queries = [required(folder, "queries.tsv"), *queries]
        if (whole := one_of(folder, ["qrels.tsv"])) is not None:
            raise InputError("unnamed-split", f"{whole}: rename it, such as to qrels.test.tsv")
        qrels = by_stem(folder, "qrels.*.tsv", "qrels/*.tsv")
        return LabelledFiles(("tsv",), corpus, queries, qrels)
