"""Labelled collections in files: corpus, queries and qrels, as BEIR folders or plain .tsv.

A layout finds the files and names the columns; `LabelledFiles` streams them into the memory-mapped
form, once for each content of the files. MS MARCO's files are in `caravan.data.readers.msmarco`.

    python train.py data=beir data.path=/data/scifact
    python evaluate.py retriever=bm25 data=tsv data.path=/data/mine
"""

from __future__ import annotations

import itertools
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from caravan.data.collection import Collection, write_collection
from caravan.data.qrels import Judgement
from caravan.data.readers.lines import (
    PASSAGE_IDS,
    QUERY_IDS,
    by_stem,
    column_name,
    columns,
    digests,
    lines,
    malformed,
    objects,
    one_of,
    record_of,
)
from caravan.data.source import Source, cache_key, cached_collection
from caravan.data.texts import ASCII_SPACE, Record, check_id, unique_records
from caravan.errors import InputError

QUERY_COLUMNS = [("id", "text")]
PASSAGE_COLUMNS = [("id", "text"), ("id", "title", "text")]
WORD = re.compile(f"[^{ASCII_SPACE}]+")
GRADE = re.compile(r"[+-]?[0-9]{1,9}")

Reader = Callable[[Path], Iterator[tuple[int, Record]]]
"""From a file to (line number, (id, title, text))."""


class HeldOut(NamedTuple):
    """A share of the queries of one split, by a hash of their ids, that makes up another split."""

    share: float
    train: str = "train"
    dev: str = "dev"

    def check(self, splits: Iterable[str]) -> None:
        """Raise "invalid-setting" unless the share is in [0, 1) and the split can be made."""
        splits = set(splits)
        if not 0 <= self.share < 1:
            raise InputError("invalid-setting", f"data.held_out={self.share} is not in [0, 1)")
        if self.share and (self.dev in splits or self.train not in splits):
            there = ", ".join(sorted(splits))
            raise InputError(
                "invalid-setting",
                f"data.held_out makes {self.dev} from {self.train}, but there are {there}: set 0",
            )

    def split_of(self, query: str) -> str:
        """The split of a training query; the same in every run."""
        digest = xxhash.xxh3_64_intdigest(query.encode("utf-8", "replace"))
        return self.dev if digest / 2**64 < self.share else self.train


NOT_HELD_OUT = HeldOut(0.0)


@dataclass(frozen=True)
class LabelledFiles:
    """The files of a collection and how they are read.

    A query that is in several files is one query; its text must be the same.
    """

    layout: tuple[Any, ...]  # its name, and the options that affect what is read
    corpus: Path
    passages: Reader
    queries: Sequence[Path]
    query_reader: Reader
    qrels: Mapping[str, Path]  # by split
    relevant_from: Mapping[str, int] = field(default_factory=dict)  # by split, where it is not 1
    held_out: HeldOut = NOT_HELD_OUT

    @property
    def splits(self) -> list[str]:
        return [*self.qrels, *([self.held_out.dev] if self.held_out.share else [])]

    def collection(self, cache_dir: str | Path, name: str, unknown_ids: str) -> Collection:
        """Open the collection, or build it under `cache_dir` first."""
        self.held_out.check(self.qrels)
        contents = digests([self.corpus, *self.queries, *self.qrels.values()], cache_dir)
        settings = list(self.qrels), unknown_ids, dict(self.relevant_from)
        held_out = self.held_out if self.held_out.share else ()
        key = cache_key(self.layout, contents, *settings, *held_out)

        def build(folder: Path) -> Collection:
            self._refuse_empty()
            facts: Counter[str] = Counter(empty_passages=0, repeated_queries=0)

            def corpus() -> Iterator[Record]:
                for _, record in self.passages(self.corpus):
                    facts["empty_passages"] += not (record[1] or record[2]).strip()
                    yield record

            return write_collection(
                folder,
                name,
                corpus(),
                (record for _, record in self._queries(facts)),
                {split: (one for _, one in self._judged(split)) for split in self.splits},
                facts=facts,
                where=self._place,
                unknown_ids=unknown_ids,
                relevant_from=self.relevant_from,
            )

        return cached_collection(cache_dir, name, key, build)

    def _refuse_empty(self) -> None:
        """Name a file without a query or a judgement before the corpus is read."""
        for split in self.splits:
            if next(self._judged(split), None) is None:
                remedy = "add some, or remove the file (held out: change data.held_out)"
                problem = f"{self._file_of(split)} has no judgement of the split {split}"
                raise InputError("empty-split", f"{problem}: {remedy}")
        for file in self.queries if self.qrels else ():
            if next(self.query_reader(file), None) is None:
                judged = next(iter(self.qrels.values()))
                raise InputError("empty-file", f"{file} has no query, but {judged} judges some")

    def _file_of(self, split: str) -> Path:
        return self.qrels[self.held_out.train if split not in self.qrels else split]

    def _judged(self, split: str) -> Iterator[tuple[str, Judgement]]:
        """(place, judgement) of a split; a share of the training queries may be another split."""
        file, held_out = self._file_of(split), self.held_out
        for number, one in judgements(file):
            shared = held_out.share and split in (held_out.train, held_out.dev)
            if not shared or held_out.split_of(one[0]) == split:
                yield f"{file}:{number}", one

    def _queries(self, facts: Counter[str]) -> Iterator[tuple[str, Record]]:
        """(place, query), each query once."""
        placed = (
            (f"{file}:{number}", record)
            for file in self.queries
            for number, record in self.query_reader(file)
        )
        if len(self.queries) == 1:  # then a repeated id is a mistake
            return placed
        return unique_records(placed, "queries", facts)

    def _place(self, part: str, n: int) -> str:
        if part == "corpus":
            found = next(itertools.islice(self.passages(self.corpus), n, None), None)
            return str(self.corpus) if found is None else f"{self.corpus}:{found[0]}"
        placed: Iterator[tuple[str, Any]] = (
            self._queries(Counter())
            if part == "queries"
            else self._judged(part.removeprefix("qrels/"))
        )
        return next(itertools.islice(placed, n, None), (str(self.queries[0]), None))[0]


@dataclass
class Folder(Source):
    """A folder that holds a collection in some layout.

    Args:
        path: the folder.
        name: what reports call the collection; the name of the folder by default.
        train_split, dev_split, split: qrels to train on, to validate on, and to score.
        unknown_ids: "refuse" judgements of unknown queries or passages, or "count" them: training
            leaves them out, metrics count them as not found.
    """

    path: str
    name: str | None = None
    train_split: str = "train"
    dev_split: str = "dev"
    split: str = "test"
    unknown_ids: str = "refuse"

    def collection(self, cache_dir: str | Path) -> Collection:
        folder = Path(self.path)
        if not folder.is_dir():
            raise InputError("folder-not-found", f"there is no folder {folder}: set data.path")
        files = self.files(folder)
        return files.collection(cache_dir, self.name or folder.resolve().name, self.unknown_ids)

    @abstractmethod
    def files(self, folder: Path) -> LabelledFiles:
        """The files of the folder, and how they are read."""


@dataclass
class Beir(Folder):
    """corpus.jsonl, queries.jsonl and qrels/<split>.tsv (BEIR, Thakur et al. 2021, 2104.08663).

    Args:
        held_out: share of the training queries, by a hash of their ids, that makes up the dev split
            of a folder without one.
    """

    held_out: float = 0.0

    def files(self, folder: Path) -> LabelledFiles:
        corpus, queries = (required(folder, f"{part}.jsonl") for part in ("corpus", "queries"))
        qrels = by_stem(folder / "qrels", (".tsv", ".txt", ".qrels"))
        held_out = HeldOut(self.held_out, self.train_split, self.dev_split)
        return LabelledFiles(
            ("beir",), corpus, self._records, [queries], self._records, qrels, {}, held_out
        )

    @staticmethod
    def _records(file: Path) -> Iterator[tuple[int, Record]]:
        return json_records(file, ("_id",), ("text",))


@dataclass
class Tsv(Folder):
    """Files of tab-separated columns, with or without a header.

    corpus.tsv           id <tab> text, or id <tab> title <tab> text
    queries.tsv          id <tab> text; or queries.<split>.tsv for each split
    qrels.<split>.tsv    query <tab> passage <tab> grade, or TREC's; or qrels/<split>.tsv

    Args:
        held_out: share of the training queries, by a hash of their ids, that makes up the dev split
            of a folder without one.
    """

    held_out: float = 0.0

    def files(self, folder: Path) -> LabelledFiles:
        corpus = required(folder, "corpus.tsv")
        queries = list(by_stem(folder, [".tsv"], "queries.").values())
        if not queries or one_of(folder, ["queries.tsv"]):
            queries = [required(folder, "queries.tsv"), *queries]
        if (whole := one_of(folder, ["qrels.tsv"])) is not None:
            raise InputError("unnamed-split", f"{whole}: rename it, such as to qrels.test.tsv")
        beside, below = by_stem(folder, [".tsv"], "qrels."), by_stem(folder / "qrels", [".tsv"])
        if both := sorted(beside.keys() & below.keys()):
            first, second = beside[both[0]], below[both[0]]
            raise InputError("ambiguous-files", f"{first} and {second} exist: keep one of them")
        held_out = HeldOut(self.held_out, self.train_split, self.dev_split)
        return LabelledFiles(
            ("tsv",), corpus, tsv_passages, queries, tsv_queries, beside | below, {}, held_out
        )


def required(folder: Path, name: str) -> Path:
    """The file of a folder, plain or .gz; raises "file-not-found"."""
    file = one_of(folder, [name])
    if file is None:
        raise InputError("file-not-found", f"{folder}/{name} (or .gz) is missing: put it there")
    return file


def json_records(file: Path, *keys: Sequence[str]) -> Iterator[tuple[int, Record]]:
    """(line number, record) of each line of a .jsonl; `keys` as of `record_of`."""
    for number, fields in objects(file, "every line is one JSON object"):
        yield number, record_of(f"{file}:{number}", fields, *keys)


def tsv_passages(file: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record) of a .tsv of `id, text` or `id, title, text`.

    If the third column is empty on every line, lines of `id, text` end with a tab.
    """
    rows = columns(file, PASSAGE_COLUMNS)
    trailing_tab = all(len(found) == 3 and not found[2] for _, found in rows)
    for number, found in columns(file, PASSAGE_COLUMNS):
        if len(found) == 2 or trailing_tab:
            yield number, (found[0], "", found[1])
        else:
            yield number, (found[0], found[1], found[2])


def tsv_queries(file: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record) of a .tsv of `id, text`."""
    for number, (name, text) in columns(file, QUERY_COLUMNS):
        yield number, (name, "", text)


def judgements(file: Path) -> Iterator[tuple[int, Judgement]]:
    """(line number, judgement) of each line of a qrels file, plain or .gz, with or without header.

    19335 0 1017759 2                      TREC: query, iteration, passage, grade; any ASCII space
    query-id <tab> corpus-id <tab> score   BEIR

    Raises:
        InputError: "malformed-line", "invalid-grade", "invalid-id"; "unknown-column", the header
            names the columns in another order.
    """
    width = 0
    for number, line in lines(file):
        text = line.strip("\r\n")
        cells = text.split("\t") if "\t" in text else WORD.findall(text)
        cells = [cell.strip(ASCII_SPACE) for cell in cells]
        is_grade = GRADE.fullmatch(cells[-1])
        if not width and not is_grade and column_name(cells[0]) in QUERY_IDS:
            passages = [at for at, cell in enumerate(cells) if column_name(cell) in PASSAGE_IDS]
            if passages and len(cells) - 2 not in passages:
                raise InputError(
                    "unknown-column",
                    f"{file}:{number}: reorder the columns to query, passage, grade: {cells}",
                )
            continue
        if len(cells) not in (3, 4) or width not in (0, len(cells)):
            expected = f"{width} as above" if width else "3 (query, passage, grade) or 4 (TREC)"
            raise malformed(f"{file}:{number}", f"{len(cells)} columns", f"expected {expected}")
        width = len(cells)
        if not is_grade:
            raise InputError(
                "invalid-grade", f"{file}:{number}: the grade {cells[-1]!r} is not an integer"
            )
        for name in (cells[0], cells[-2]):
            check_id(name, f"{file}:{number}")
        yield number, (cells[0], cells[-2], int(cells[-1]))
