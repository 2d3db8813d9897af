"""Training rows, a query with its own positives and negatives each: to a collection and its runs.

    {"query_id": "q", "query": "...", "positive_passages": [{"docid": "p", "title": "...",
     "text": "...", "score": 0.9}], "negative_passages": [...]}   Tevatron, texts inline
    {"query_id": "q", "query_text": "...", "positive_document_ids": ["p"],
     "negative_document_ids": ["n"]}                              Tevatron, beside a corpus
    {"query": "...", "pos": ["..."], "neg": ["..."], "pos_scores": [0.9], "neg_scores": [0.1]}
                                                                  FlagEmbedding

Each as jsonl files or as a Hugging Face dataset. A text without an id has its hash as id, so that
equal texts are one. The positives become judgements, and the rest of a row becomes runs beside the
collection, which are used like any other run:

    data:negatives    the negatives in the order of the row    sampler.runs=[data:negatives]
    data:teacher      the scores of positives and negatives    sampler.teacher=data:teacher

Rows are read once. While their passages stream into the corpus (each once, however many rows have
it), the rest waits in a scratch folder on disk.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from caravan.data.collection import OWN, Collection, write_collection
from caravan.data.qrels import Judgement, Scored
from caravan.data.readers import lines
from caravan.data.readers.labelled import NOT_HELD_OUT, HeldOut
from caravan.data.readers.lines import SAVED, by_stem, id_of, malformed, record_of
from caravan.data.source import Source, cache_key, cached_collection
from caravan.data.texts import Record, check_id, unique_records
from caravan.errors import InputError
from caravan.files import listed
from caravan.progress import track

LARGEST = float(np.finfo(np.float32).max)  # a run holds scores in float32
NEGATIVES, TEACHER = "negatives", "teacher"
TRAIN, DEV = "train", "dev"
SUFFIXES = (".jsonl", ".json")

TEVATRON = (
    'every line is one object with "query_id", "query", "positive_passages" and'
    ' "negative_passages", or with "query_id", "query_text", "positive_document_ids" and'
    ' "negative_document_ids"'
)
FLAGEMBEDDING = (
    'every line is one object such as {"query": "...", "pos": ["..."], "neg": ["..."]}, with'
    ' "pos_scores" and "neg_scores" or without'
)
PASSAGE = 'every line is one object such as {"docid": "7", "title": "...", "text": "..."}'

log = logging.getLogger(__name__)


class Passage(NamedTuple):
    """A passage of a row; its text is None if it is in a separate corpus."""

    id: str
    title: str
    text: str | None
    score: float | None  # a teacher's


class Row(NamedTuple):
    """One row of training data."""

    place: str  # such as train.jsonl:12
    id: str
    query: str
    positives: list[Passage]
    negatives: list[Passage]  # the hardest first, if the row has an order


Rows = Callable[[], Iterable[Row]]


@dataclass
class Tevatron(Source):
    """Training rows of Tevatron, https://github.com/texttron/tevatron.

    Args:
        path: a file of rows, which is the split train; a folder of files named after their splits
            (train.jsonl, dev.jsonl, and corpus.jsonl); or a Hugging Face dataset, by hub id or
            folder.
        corpus: file or dataset of all passages; None searches only those of the rows.
        subsets: the name of each split in the dataset or folder: {train: train, dev: validation};
            None takes the files of a folder by their names, of a dataset the split train.
        config, revision: of a dataset of the hub, and of its corpus.
        held_out: the share of the training queries that become the split dev.
        name: what reports call the collection; the last part of the path by default.
        train_split, dev_split, split: to train on, to validate on, and to score.
        unknown_ids: "refuse" ids that the corpus lacks, or "count" them: training leaves them out,
            metrics count them as not found.
    """

    path: str
    corpus: str | None = None
    subsets: Mapping[str, str] | None = None
    config: str | None = None
    revision: str | None = None
    held_out: float = 0.0
    name: str | None = None
    train_split: str = TRAIN
    dev_split: str = DEV
    split: str = DEV
    unknown_ids: str = "refuse"

    def collection(self, cache_dir: str | Path) -> Collection:
        sources, corpus = self._sources()
        HeldOut(self.held_out).check(sources)
        parts = [*sources.items(), *([("", (corpus, ""))] if corpus else [])]
        read = []
        for split, (path, subset) in parts:
            contents = lines.contents(path, cache_dir)
            # a folder is found again by its content, a hub id by its name
            read.append([split, "" if contents else path, subset, contents])
        settings = self.config, self.revision, self.held_out, self.unknown_ids
        rows = TrainingRows(
            self.name or _name(self.path),
            {
                split: functools.partial(self._rows, path, subset, corpus is not None)
                for split, (path, subset) in sources.items()
            },
            None if corpus is None else functools.partial(self._passages, corpus),
            HeldOut(self.held_out),
            self.unknown_ids,
        )
        return cached_collection(
            cache_dir, rows.name, cache_key("tevatron", read, *settings), rows.build
        )

    def _sources(self) -> tuple[dict[str, tuple[str, str]], str | None]:
        """Path and subset of each split, and the corpus."""
        path, subsets = Path(self.path), dict(self.subsets or {})
        if path.is_file():
            if set(subsets or {TRAIN}) != {TRAIN}:
                raise InputError(
                    "unknown-split",
                    f"data.subsets has {', '.join(subsets)}, but {path} is one file of rows: give"
                    " the folder that holds a file for each, or data.held_out",
                )
            return {TRAIN: (self.path, TRAIN)}, self.corpus
        files = by_stem(path, SUFFIXES)
        if TRAIN not in files:  # a dataset
            subsets = subsets or {TRAIN: TRAIN}
            return {split: (self.path, name) for split, name in subsets.items()}, self.corpus
        corpus = files.pop("corpus", None)
        named = subsets or {name: name for name in files}
        for split, name in named.items():
            if name not in files:
                raise InputError(
                    "unknown-split",
                    f"data.subsets.{split} is {name}, but {path} has no {name}.jsonl (or .gz): its"
                    f" files of rows are {', '.join(files)}",
                )
        sources = {split: (str(files[name]), split) for split, name in named.items()}
        return sources, self.corpus or (None if corpus is None else str(corpus))

    def _rows(self, path: str, subset: str, has_corpus: bool) -> Iterator[Row]:
        found = lines.rows([path], self.config, subset, self.revision, TEVATRON)
        return (tevatron_row(place, fields, has_corpus) for place, fields in found)

    def _passages(self, corpus: str) -> Iterator[tuple[str, Record]]:
        found = lines.rows([corpus], self.config, TRAIN, None, PASSAGE)
        return ((place, record_of(place, fields)) for place, fields in found)


def tevatron_row(place: str, fields: dict[str, Any], has_corpus: bool) -> Row:
    """A row of either layout of Tevatron."""

    def string(value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise malformed(place, f"{what} is not a string", TEVATRON)
        return value

    def passage(one: Any) -> Passage:
        if not inline:
            return Passage(string(id_of(one), "a document id"), "", None, None)
        if not isinstance(one, dict):
            raise malformed(place, "a passage is not an object", TEVATRON)
        title, text = one.get("title"), string(one.get("text"), "the text of a passage")
        title = "" if title is None else string(title, "the title of a passage")
        id_ = id_of(one.get("docid", id_of_text(f"{title}\n{text}" if title else text)))
        return Passage(string(id_, "a docid"), title, text, _score(place, one.get("score")))

    inline = "positive_passages" in fields
    of = "{}_passages" if inline else "{}_document_ids"
    sides = []
    for side in ("positive", "negative"):
        found = fields.get(of.format(side))
        if found is None and side == "negative":
            found = []
        if not isinstance(found, list):
            raise malformed(place, f"{of.format(side)} is not a list", TEVATRON)
        sides.append(found)
    if not inline and not has_corpus and any(sides):
        raise InputError(
            "missing-corpus",
            f"{place}: the row names its passages by id, and there is no corpus: give the file or"
            " dataset that has them as data.corpus",
        )
    query = string(fields.get("query", fields.get("query_text")), "query")
    name = string(id_of(fields.get("query_id", id_of_text(query))), "query_id")
    return Row(place, name, query, *([passage(one) for one in side] for side in sides))


@dataclass
class FlagEmbedding(Source):
    """Training rows of FlagEmbedding, https://github.com/FlagOpen/FlagEmbedding.

    "prompt" and "type" of a row are ignored: the encoding sets how a query is prompted.

    Args:
        path: a file of rows, or a folder whose files are all read; or a Hugging Face dataset of
            such rows, by hub id or folder.
        dev: file, folder or dataset of the rows to validate on.
        held_out: the share of the training queries that become the split dev if `dev` is None.
        config, subset, revision: of a dataset: its configuration, split and version.
        name: what reports call the collection; the last part of the path by default.
        train_split, dev_split, split: to train on, to validate on, and to score.
    """

    path: str
    dev: str | None = None
    held_out: float = 0.0
    config: str | None = None
    subset: str = "train"
    revision: str | None = None
    name: str | None = None
    train_split: str = TRAIN
    dev_split: str = DEV
    split: str = DEV

    def collection(self, cache_dir: str | Path) -> Collection:
        paths = {TRAIN: self.path} | ({} if self.dev is None else {DEV: self.dev})
        HeldOut(self.held_out).check(paths)
        files = {split: _files(path) for split, path in paths.items()}
        read = [
            [split, [lines.contents(path, cache_dir) or path for path in found]]
            for split, found in files.items()
        ]
        dataset = self.config, self.subset, self.revision
        key = cache_key("flagembedding", read, dataset, self.held_out)
        rows = TrainingRows(
            self.name or _name(self.path),
            {split: functools.partial(self._rows, found) for split, found in files.items()},
            held_out=HeldOut(self.held_out),
        )
        return cached_collection(cache_dir, rows.name, key, rows.build)

    def _rows(self, paths: list[str]) -> Iterator[Row]:
        found = lines.rows(paths, self.config, self.subset, self.revision, FLAGEMBEDDING)
        return (flagembedding_row(place, fields) for place, fields in found)


def flagembedding_row(place: str, fields: dict[str, Any]) -> Row:
    """A row of FlagEmbedding."""
    query = fields.get("query")
    if not isinstance(query, str):
        raise malformed(place, "no query", FLAGEMBEDDING)
    sides = []
    for side in ("pos", "neg"):
        texts, scores = fields.get(side), fields.get(f"{side}_scores")
        if side == "neg" and texts is None:
            texts = []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise malformed(place, f"{side} is not a list of strings", FLAGEMBEDDING)
        if scores is None:
            scores = [None] * len(texts)
        if not isinstance(scores, list) or len(scores) != len(texts):
            problem = f"{side}_scores is not a list of {len(texts)} numbers, one for each of {side}"
            raise malformed(place, problem, FLAGEMBEDDING)
        pairs = zip(texts, scores, strict=True)
        sides.append([Passage(id_of_text(t), "", t, _score(place, score)) for t, score in pairs])
    return Row(place, id_of_text(query), query, *sides)


def _files(path: str) -> list[str]:
    """The files of a folder; a file or a dataset unchanged."""
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).is_file() for name in SAVED):
        return [path]
    found = [file for file in listed(folder) if file.name.removesuffix(".gz").endswith(SUFFIXES)]
    if not found and not any(folder.glob("**/*.parquet")):
        raise InputError(
            "file-not-found", f"{path} holds no .jsonl or .json (nor .gz): give training rows"
        )
    return list(map(str, found)) or [path]  # a dataset of parquet


def _name(path: str) -> str:
    return Path(path).resolve().name.removesuffix(".gz")


def id_of_text(text: str) -> str:
    """The id of a text without one: a hash, so that equal texts are one."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _score(place: str, value: Any) -> float | None:
    """A teacher's score; None if there is none."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= LARGEST:
        raise InputError(
            "invalid-score", f"{place}: the score {value!r} is not a finite number in float32"
        )
    return float(value)


@dataclass
class TrainingRows:
    """Builds a collection of rows.

    Args:
        name: of the collection.
        rows: of each split; read once.
        corpus: (place, passage) of each, if the rows have only ids.
        held_out: the share of the training queries that become the split dev.
        unknown_ids: "refuse" passages that the corpus lacks, or "count" them.
    """

    name: str
    rows: Mapping[str, Rows]
    corpus: Callable[[], Iterator[tuple[str, Record]]] | None = None
    held_out: HeldOut = NOT_HELD_OUT
    unknown_ids: str = "refuse"

    def build(self, folder: Path) -> Collection:
        """Write the collection."""
        scratch = folder.with_name(f".{folder.name}.rows")
        shutil.rmtree(scratch, ignore_errors=True)  # left by a killed build
        scratch.mkdir(parents=True)
        try:
            return self._build(folder, scratch / "rows.jsonl")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _build(self, folder: Path, spool: Path) -> Collection:
        facts: Counter[str] = Counter(
            rows=0, repeated_queries=0, without_positive=0, empty_passages=0
        )
        splits = [*self.rows, *([DEV] if self.held_out.share else [])]
        queries, where = functools.partial(self._queries, spool), self._place

        def corpus() -> Iterator[Record]:
            found = unique_records(self._spooled(spool, facts), "passages", facts)
            if self.corpus is not None:
                for _ in found:
                    pass  # rows beside a corpus have no passages; this reads them
                found = self.corpus()
            for _, record in found:
                facts["empty_passages"] += not (record[1] or record[2]).strip()
                yield record

        found = write_collection(
            folder,
            self.name,
            corpus(),
            (record for _, record in queries(facts)),
            {split: (one for _, one in self._positives(spool, split)) for split in splits},
            facts=facts,
            where=functools.partial(where, spool),
            unknown_ids=self.unknown_ids,
            runs={
                run: (one for _, one in self._scored(spool, run)) for run in (NEGATIVES, TEACHER)
            },
        )
        for run in found.runs:
            setting = "sampler.runs=[{}]" if run == NEGATIVES else "sampler.teacher={}"
            log.info("%s: %s of the rows, for %s", self.name, run, setting.format(OWN + run))
        return found

    def _spooled(self, spool: Path, facts: Counter[str]) -> Iterator[tuple[str, Record]]:
        """Write all rows to the spool; yield (place, passage) of the texts in them."""
        with open(spool, "w", encoding="utf-8") as file:
            for split, read in self.rows.items():
                rows = read()
                if self.corpus is not None:  # else the progress of the passages is shown
                    rows = track(rows, f"rows of {split}", unit="rows")
                for row in rows:
                    facts["rows"] += 1
                    facts["without_positive"] += not row.positives
                    passages = [*row.positives, *row.negatives]
                    for name in (row.id, *(one.id for one in passages)):
                        check_id(name, row.place)
                    train = split == TRAIN and self.held_out.share
                    own = self.held_out.split_of(row.id) if train else split
                    sides = [[one.id for one in side] for side in (row.positives, row.negatives)]
                    scores = [one.score for one in passages]
                    file.write(json.dumps([row.place, own, row.id, row.query, *sides, scores]))
                    file.write("\n")
                    for one in passages:
                        if one.text is not None and self.corpus is None:
                            yield row.place, (one.id, one.title, one.text)

    def _read(self, spool: Path) -> Iterator[Any]:
        with open(spool, encoding="utf-8") as file:
            yield from map(json.loads, file)

    def _queries(self, spool: Path, facts: Counter[str]) -> Iterator[tuple[str, Record]]:
        placed = ((place, (name, "", query)) for place, _, name, query, *_ in self._read(spool))
        return unique_records(placed, "queries", facts)

    def _positives(self, spool: Path, split: str) -> Iterator[tuple[str, Judgement]]:
        for place, own, query, _, positives, *_ in self._read(spool):
            if own == split:
                for passage in positives:
                    yield place, (query, passage, 1)

    def _scored(self, spool: Path, run: str) -> Iterator[tuple[str, Scored]]:
        for place, _, query, _, positives, negatives, scores in self._read(spool):
            if run == NEGATIVES:
                for rank, passage in enumerate(negatives, 1):
                    yield place, (query, passage, 1 / rank)
            else:
                for passage, score in zip([*positives, *negatives], scores, strict=True):
                    if score is not None:
                        yield place, (query, passage, score)

    def _place(self, spool: Path, part: str, n: int) -> str:
        kind, _, name = part.partition("/")
        placed: Iterator[tuple[str, Any]]
        if kind == "corpus":
            placed = iter(()) if self.corpus is None else self.corpus()
        elif kind == "queries":
            placed = self._queries(spool, Counter())
        else:
            placed = self._positives(spool, name) if kind == "qrels" else self._scored(spool, name)
        return next(itertools.islice(placed, n, None), ("the rows", None))[0]
