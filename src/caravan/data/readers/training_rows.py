"""Training rows, a query with its own positives and negatives each: to a collection and its runs.

The rows are jsonl, csv or parquet files, or a Hugging Face dataset, with the columns of
`caravan.data.readers.rows`. The positives become judgements, the rest becomes runs, which are used
like any other run:

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

from caravan.data.collection import Collection
from caravan.data.qrels import Judgement, Scored, UnknownIds
from caravan.data.readers.lines import by_stem, contents, record_of
from caravan.data.readers.rows import Columns, row_of
from caravan.data.readers.tables import SAVED, TABLES, rows
from caravan.data.source import Source, Stream, Streams, cache_key, cached_collection, held_out
from caravan.data.texts import Record, check_id, unique_records
from caravan.errors import InputError
from caravan.progress import track

NEGATIVES, TEACHER = "negatives", "teacher"
TRAIN, DEV = "train", "dev"
JSON = (".jsonl", ".json")
SUFFIXES = (*JSON, *TABLES)
REMEDY = (
    'every line is one object with a query and its passages, such as "query", "pos" and "neg"'
    " (docs/data-formats.md has all columns)"
)


class Part(NamedTuple):
    """The rows of a split, or the passages of a corpus."""

    paths: list[str]  # files, folders, or a dataset
    subset: str = TRAIN  # split of the dataset


@dataclass
class TrainingRows(Source):
    """Training rows of Tevatron, FlagEmbedding, sentence-transformers or NeMo, or your own columns.

    Args:
        path: a file of rows, which is the split train; a folder of train.jsonl, dev.jsonl and
            corpus.jsonl (or .csv, .tsv, .parquet); a folder of other .jsonl files, which are all
            read; or a Hugging Face dataset, by hub id or folder.
        dev: the same for the rows to validate on; None takes those of `path`.
        corpus: file or dataset of all passages; None searches only those of the rows.
        columns: the names of the columns, if they are not those of
            `caravan.data.readers.rows.NAMES`: {query: question, negative: [hard_1, hard_2]}.
        subsets: the name of each split in the dataset or folder: {train: train, dev: validation};
            None takes the files of a folder by their names, of a dataset the split train.
        config, revision: of a dataset of the hub.
        held_out, name, train_split, dev_split, split, unknown_ids: as for
            `caravan.data.readers.labelled.Folder`.
    """

    path: str
    dev: str | None = None
    corpus: str | None = None
    columns: Mapping[str, str | list[str] | None] | None = None
    subsets: Mapping[str, str] | None = None
    config: str | None = None
    revision: str | None = None
    held_out: float = 0.0
    name: str | None = None
    train_split: str = TRAIN
    dev_split: str = DEV
    split: str = DEV
    unknown_ids: UnknownIds = "refuse"

    def collection(self, cache_dir: str | Path) -> Collection:
        columns = Columns(self.columns)
        splits, corpus = self._parts()
        held_out(dict.fromkeys(splits, tuple), self.held_out)  # checks the setting
        # a folder is found again by its content, a hub id by its name
        read = [
            [split, part.subset, [contents(path, cache_dir) or path for path in part.paths]]
            for split, part in {**splits, **({"": corpus} if corpus else {})}.items()
        ]
        named = [dict(self.columns)] if self.columns else []
        settings = (self.config, self.revision, self.held_out, self.unknown_ids, *named)
        key = cache_key("rows", read, *settings)
        name = self.name or Path(self.path).resolve().name.removesuffix(".gz")

        def build(folder: Path) -> Collection:
            scratch = folder.with_name(f".{folder.name}.rows")
            shutil.rmtree(scratch, ignore_errors=True)  # left by a killed build
            scratch.mkdir(parents=True)
            try:
                build = _Build(splits, corpus, columns, self.config, self.revision)
                streams = build.streams(scratch / "rows.jsonl", self.held_out)
                return streams.write(folder, name, unknown_ids=self.unknown_ids)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

        return cached_collection(cache_dir, name, key, build)

    def _parts(self) -> tuple[dict[str, Part], Part | None]:
        """The rows of each split, and the corpus."""
        path, named = Path(self.path), dict(self.subsets or {})
        files = {TRAIN: path} if path.is_file() else _files(path, SUFFIXES)
        beside = files.pop("corpus", None)
        if TRAIN in files:
            for split, name in named.items():
                if name not in files:
                    raise InputError(
                        "unknown-split",
                        f"data.subsets.{split} is {name}, but {path} has no rows of that name, only"
                        f" {', '.join(files)}: give the folder that holds {name}.jsonl (or .gz)",
                    )
            named = named or {name: name for name in files}
            splits = {split: Part([str(files[name])], split) for split, name in named.items()}
        elif named:
            splits = {split: Part([self.path], name) for split, name in named.items()}
        else:
            splits = {TRAIN: Part(_loose(self.path))}
        if self.dev is not None:
            splits[DEV] = Part(_loose(self.dev))
        corpus = self.corpus or (beside and str(beside))
        return splits, Part([corpus]) if corpus else None


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files of rows of a folder, by stem; none of a saved dataset."""
    if any((folder / name).is_file() for name in SAVED):
        return {}
    found = by_stem(folder, suffixes)
    return {stem: file for stem, file in found.items() if not stem.startswith("dataset_info")}


def _loose(path: str) -> list[str]:
    """The jsonl files of a folder; a file or a dataset unchanged."""
    found = _files(Path(path), JSON)
    found.pop("corpus", None)
    return list(map(str, found.values())) or [path]


@dataclass
class _Build:
    """Reads rows into a collection."""

    splits: Mapping[str, Part]
    corpus: Part | None  # the passages, if the rows have only ids
    columns: Columns
    config: str | None
    revision: str | None

    def streams(self, spool: Path, share: float) -> Streams:
        """The corpus, whose stream also writes the spool; the rest is read from the spool.

        Args:
            share: of the training queries, to hold out.
        """

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
        shared = held_out(qrels, share)
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
                    row = row_of(place, fields, self.columns, self.corpus is not None)
                    passages = [*row.positives, *row.negatives]
                    for name in (row.id, *(one.id for one in passages)):
                        check_id(name, place)
                    sides = ([one[:2] for one in side] for side in (row.positives, row.negatives))
                    query = (row.id, row.query, row.instruction)
                    file.write(f"{json.dumps([place, split, *query, *sides])}\n")
                    for one in passages:
                        if one.text is not None and self.corpus is None:
                            yield place, (one.id, one.title, one.text)
