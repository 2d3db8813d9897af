"""Training rows, a query with its own positives and negatives each: to a collection and its runs.

    {"query_id": "q", "query": "...", "positive_passages": [{"docid": "p", "title": "...",
     "text": "...", "score": 0.9}], "negative_passages": [...]}   Tevatron, texts inline
    {"query_id": "q", "query_text": "...", "positive_document_ids": ["p"],
     "negative_document_ids": ["n"]}                              Tevatron, beside a corpus
    {"query": "...", "pos": ["..."], "neg": ["..."], "pos_scores": [0.9], "neg_scores": [0.1],
     "prompt": "..."}                                             FlagEmbedding

Each as jsonl files or as a Hugging Face dataset. The id of a text without one is its hash. The
positives become judgements, the rest becomes runs, which are used like any other run:

    data:negatives    the negatives in the order of the row    sampler.runs=[data:negatives]
    data:teacher      the scores of positives and negatives    sampler.teacher=data:teacher

The "prompt" of a row is the instruction of its query, for {instruction} in the templates.
Rows are read once. While their passages stream into the corpus, the rest waits in a scratch folder.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from caravan.data.collection import Collection
from caravan.data.qrels import Judgement, Scored
from caravan.data.readers.lines import (
    SAVED,
    by_stem,
    contents,
    id_of,
    malformed,
    record_of,
    rows,
    string,
    text_of,
)
from caravan.data.source import Source, Stream, Streams, cache_key, cached_collection, held_out
from caravan.data.texts import Record, check_id, unique_records
from caravan.errors import InputError
from caravan.progress import track

LARGEST = float(np.finfo(np.float32).max)  # a run holds scores in float32
NEGATIVES, TEACHER = "negatives", "teacher"
TRAIN, DEV = "train", "dev"
SUFFIXES = (".jsonl", ".json")

INLINE = ("positive_passages", "negative_passages")
BY_ID = ("positive_document_ids", "negative_document_ids")
TEXTS = ("pos", "neg")
"""Layouts: the keys of positives and negatives."""
REMEDY = (
    'every line is one object with "query_id", "query", "positive_passages" and'
    ' "negative_passages"; with "query_id", "query_text", "positive_document_ids" and'
    ' "negative_document_ids"; or with "query", "pos" and "neg"'
)


class Passage(NamedTuple):
    """A passage of a row; its text is None if it is in a separate corpus."""

    id: str
    score: float | None  # a teacher's
    title: str = ""
    text: str | None = None


class Row(NamedTuple):
    """One row of training data."""

    id: str
    query: str
    instruction: str  # the prompt of a row, or ""
    positives: list[Passage]
    negatives: list[Passage]  # the hardest first, if the row has an order


class Part(NamedTuple):
    """The rows of a split, or the passages of a corpus."""

    paths: list[str]  # files, folders, or a dataset
    subset: str = TRAIN  # split of the dataset


@dataclass
class Tevatron(Source):
    """Training rows of Tevatron, https://github.com/texttron/tevatron.

    Args:
        path: a file of rows, which is the split train; a folder of train.jsonl, dev.jsonl and
            corpus.jsonl; or a Hugging Face dataset, by hub id or folder.
        corpus: file or dataset of all passages; None searches only those of the rows.
        subsets: the name of each split in the dataset or folder: {train: train, dev: validation};
            None takes the files of a folder by their names, of a dataset the split train.
        config, revision: of a dataset of the hub.
        held_out, name, train_split, dev_split, split, unknown_ids: as for
            `caravan.data.readers.labelled.Folder`.
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
        splits, corpus = self._parts()
        found = TrainingRows(splits, corpus, self.config, self.revision, self.held_out)
        return found.collection(cache_dir, self.name or _name(self.path), self.unknown_ids)

    def _parts(self) -> tuple[dict[str, Part], Part | None]:
        """The rows of each split, and the corpus."""
        path, named = Path(self.path), dict(self.subsets or {})
        files = {TRAIN: path} if path.is_file() else by_stem(path, SUFFIXES)
        if TRAIN not in files:  # a dataset
            named = named or {TRAIN: TRAIN}
            splits = {split: Part([self.path], name) for split, name in named.items()}
            return splits, Part([self.corpus]) if self.corpus else None
        beside = files.pop("corpus", None)
        corpus = self.corpus or (beside and str(beside))
        for split, name in named.items():
            if name not in files:
                raise InputError(
                    "unknown-split",
                    f"data.subsets.{split} is {name}, but {path} has no rows of that name, only"
                    f" {', '.join(files)}: give the folder that holds {name}.jsonl (or .gz)",
                )
        named = named or {name: name for name in files}
        splits = {split: Part([str(files[name])], split) for split, name in named.items()}
        return splits, Part([corpus]) if corpus else None


@dataclass
class FlagEmbedding(Source):
    """Training rows of FlagEmbedding, https://github.com/FlagOpen/FlagEmbedding.

    "prompt" of a row is the instruction of its query; "type" is ignored.

    Args:
        path: a file of rows, or a folder whose files are all read; or a Hugging Face dataset of
            such rows, by hub id or folder.
        dev: the same for the rows to validate on.
        config, subset, revision: of a dataset: its configuration, split and version.
        held_out, name, train_split, dev_split, split: as for
            `caravan.data.readers.labelled.Folder`.
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
        splits = {split: Part(_files(path), self.subset) for split, path in paths.items()}
        found = TrainingRows(splits, None, self.config, self.revision, self.held_out)
        return found.collection(cache_dir, self.name or _name(self.path))


def _files(path: str) -> list[str]:
    """The files of a folder; a file or a dataset unchanged."""
    saved = any((Path(path) / name).is_file() for name in SAVED)
    found = {} if saved else by_stem(Path(path), SUFFIXES)
    return list(map(str, found.values())) or [path]


def _name(path: str) -> str:
    return Path(path).resolve().name.removesuffix(".gz")


def row_of(place: str, fields: dict[str, Any], has_corpus: bool = False) -> Row:
    """A row of any of the layouts."""
    keys = next((keys for keys in (INLINE, BY_ID, TEXTS) if keys[0] in fields), None)
    if keys is None:
        raise malformed(place, f"none of {INLINE[0]}, {BY_ID[0]} and {TEXTS[0]}", REMEDY)
    query = string(place, fields.get("query", fields.get("query_text")), "query", REMEDY)
    instruction = string(place, fields.get("prompt") or "", "prompt", REMEDY)
    name = id_of_text(f"{instruction}\n{query}" if instruction else query)
    if keys is not TEXTS:
        name = string(place, id_of(fields.get("query_id", name)), "query_id", REMEDY)
    sides = []
    for key in keys:
        values, scores = fields.get(key), fields.get(f"{key}_scores")
        if values is None and key == keys[1]:
            values = []
        if not isinstance(values, list):
            raise malformed(place, f"{key} is not a list", REMEDY)
        if scores is None:
            scores = [None] * len(values)
        if not isinstance(scores, list) or len(scores) != len(values):
            problem = f"{key}_scores is not a list of {len(values)} numbers, one for each of {key}"
            raise malformed(place, problem, REMEDY)
        pairs = zip(values, scores, strict=True)
        sides.append([_passage(place, keys, value, score) for value, score in pairs])
    if keys is BY_ID and not has_corpus and any(sides):
        raise InputError(
            "missing-corpus",
            f"{place}: the row names its passages by id, and there is no corpus: give the file or"
            " dataset that has them as data.corpus",
        )
    return Row(name, query, instruction, *sides)


def _passage(place: str, keys: tuple[str, str], value: Any, score: Any) -> Passage:
    if keys is BY_ID:
        return Passage(string(place, id_of(value), "a document id", REMEDY), None)
    if keys is TEXTS:
        text = string(place, value, "a text", REMEDY)
        return Passage(id_of_text(text), _score(place, score), "", text)
    if not isinstance(value, dict):
        raise malformed(place, "a passage is not an object", REMEDY)
    title, text = text_of(place, value, REMEDY)
    name = id_of(value.get("docid", id_of_text(f"{title}\n{text}" if title else text)))
    name = string(place, name, "a docid", REMEDY)
    return Passage(name, _score(place, value.get("score")), title, text)


def id_of_text(text: str) -> str:
    """The id of a text without one: a hash, so that equal texts are one."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _score(place: str, value: Any) -> float | None:
    """A teacher's score; None if there is none."""
    if value is None:
        return None
    if isinstance(value, bool | str | list | dict) or not abs(value) <= LARGEST:
        raise InputError(
            "invalid-score", f"{place}: the score {value!r} is not a finite number in float32"
        )
    return float(value)


@dataclass
class TrainingRows:
    """Builds a collection of rows."""

    splits: Mapping[str, Part]
    corpus: Part | None  # the passages, if the rows have only ids
    config: str | None
    revision: str | None
    held_out: float

    def collection(
        self, cache_dir: str | Path, name: str, unknown_ids: str = "refuse"
    ) -> Collection:
        """Open the collection, or build it under `cache_dir` first."""
        held_out(dict.fromkeys(self.splits, tuple), self.held_out)  # checks the setting
        parts = {**self.splits, **({"": self.corpus} if self.corpus else {})}
        # a folder is found again by its content, a hub id by its name
        read = [
            [split, part.subset, [contents(path, cache_dir) or path for path in part.paths]]
            for split, part in parts.items()
        ]
        key = cache_key("rows", read, self.config, self.revision, self.held_out, unknown_ids)

        def build(folder: Path) -> Collection:
            scratch = folder.with_name(f".{folder.name}.rows")
            shutil.rmtree(scratch, ignore_errors=True)  # left by a killed build
            scratch.mkdir(parents=True)
            try:
                streams = self._streams(scratch / "rows.jsonl")
                return streams.write(folder, name, unknown_ids=unknown_ids)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

        return cached_collection(cache_dir, name, key, build)

    def _streams(self, spool: Path) -> Streams:
        """The corpus, whose stream also writes the spool; the rest is read from the spool."""

        def read() -> Iterator[Any]:
            with open(spool, encoding="utf-8") as file:
                yield from map(json.loads, file)

        def queries() -> Iterator[tuple[str, Record]]:
            found = ((place, (name, own, text)) for place, _, name, text, own, *_ in read())
            return unique_records(found, "queries")

        def positives(split: str) -> Iterator[tuple[str, Judgement]]:
            for place, own, query, _, _, passages, _ in read():
                if own == split:
                    yield from ((place, (query, passage, 1)) for passage, _ in passages)

        def negatives() -> Iterator[tuple[str, Scored]]:
            for place, _, query, _, _, _, passages in read():
                for rank, (passage, _) in enumerate(passages, 1):
                    yield place, (query, passage, 1 / rank)

        def teacher() -> Iterator[tuple[str, Scored]]:
            for place, _, query, _, _, own, others in read():
                for passage, score in (*own, *others):
                    if score is not None:
                        yield place, (query, passage, score)

        qrels: dict[str, Stream[Judgement]] = {
            split: functools.partial(positives, split) for split in self.splits
        }
        corpus, runs = functools.partial(self._passages, spool), {NEGATIVES: negatives}
        shared = held_out(qrels, self.held_out)
        return Streams("the rows", corpus, queries, shared, runs | {TEACHER: teacher})

    def _passages(self, spool: Path) -> Iterator[tuple[str, Record]]:
        """(place, passage) of the corpus, after all rows were written to the spool."""
        found = unique_records(self._spooled(spool), "passages")
        if self.corpus is None:
            yield from found
            return
        for _ in found:
            pass  # rows beside a corpus have no passages; this reads them
        remedy = 'every line is one object such as {"docid": "7", "title": "...", "text": "..."}'
        for place, fields in rows(self.corpus.paths, self.config, TRAIN, None, remedy):
            yield place, record_of(place, fields)

    def _spooled(self, spool: Path) -> Iterator[tuple[str, Record]]:
        """Write all rows to the spool; yield (place, passage) of the texts in them."""
        with open(spool, "w", encoding="utf-8") as file:
            for split, part in self.splits.items():
                found = rows(part.paths, self.config, part.subset, self.revision, REMEDY)
                if self.corpus is not None:  # else the progress of the passages is shown
                    found = track(found, f"rows of {split}", unit="rows")
                for place, fields in found:
                    row = row_of(place, fields, self.corpus is not None)
                    passages = [*row.positives, *row.negatives]
                    for name in (row.id, *(one.id for one in passages)):
                        check_id(name, place)
                    sides = ([one[:2] for one in side] for side in (row.positives, row.negatives))
                    query = (row.id, row.query, row.instruction)
                    file.write(f"{json.dumps([place, split, *query, *sides])}\n")
                    for one in passages:
                        if one.text is not None and self.corpus is None:
                            yield place, (one.id, one.title, one.text)
