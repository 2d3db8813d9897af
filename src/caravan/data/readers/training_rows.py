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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.data.collection import Collection
from caravan.data.qrels import Judgement, Scored, UnknownIds
from caravan.data.readers.lines import RECORD, by_stem, contents, parsed, record_of
from caravan.data.readers.rows import REMEDY, Columns, row_of
from caravan.data.readers.tables import SAVED, TABLES, Rows
from caravan.data.source import Source, Stream, Streams, cache_key, cached_collection, held_out
from caravan.data.texts import Record, check_id, unique_records
from caravan.errors import InputError
from caravan.files import replacing
from caravan.progress import track

NEGATIVES, TEACHER = "negatives", "teacher"
TRAIN, DEV = "train", "dev"
JSON = (".jsonl", ".json")
LINE = (
    'every line is one object with a query and its passages, such as "query", "pos" and "neg"'
    " (docs/data-formats.md has all columns)"
)


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
            spool = _Spool(folder / "rows.jsonl", splits, corpus, columns)
            streams = spool.streams(self.held_out)
            found = streams.write(folder, name, unknown_ids=self.unknown_ids)
            spool.file.unlink()
            return found

        return cached_collection(cache_dir, name, key, build, resumes=True)

    def _parts(self) -> tuple[dict[str, Rows], Rows | None]:
        """The rows of each split, and the corpus."""
        path, named = Path(self.path), dict(self.subsets or {})
        files = {TRAIN: path} if path.is_file() else _files(path, *JSON, *TABLES)
        beside = files.pop("corpus", None)
        found: dict[str, tuple[list[str], str]] = {}  # paths and subset
        if TRAIN in files:
            for split, name in (named or {name: name for name in files}).items():
                if name not in files:
                    raise InputError(
                        "unknown-split",
                        f"data.subsets.{split} is {name}, but {path} has no rows of that name, only"
                        f" {', '.join(files)}: give the folder that holds {name}.jsonl (or .gz)",
                    )
                found[split] = [str(files[name])], split
        elif named:
            found = {split: ([self.path], name) for split, name in named.items()}
        else:
            found = {TRAIN: (_loose(self.path), TRAIN)}
        if self.dev is not None:
            found[DEV] = _loose(self.dev), TRAIN
        splits = {split: Rows(*of, self.config, self.revision) for split, of in found.items()}
        corpus = self.corpus or (beside and str(beside))
        return splits, Rows([corpus], TRAIN, self.config) if corpus else None


def _files(folder: Path, *suffixes: str) -> dict[str, Path]:
    """The files of rows of a folder, by stem; none of a saved dataset."""
    if any((folder / name).is_file() for name in SAVED):
        return {}
    found = by_stem(folder, *(f"*{suffix}" for suffix in suffixes))
    return {stem: file for stem, file in found.items() if not stem.startswith("dataset_info")}


def _loose(path: str) -> list[str]:
    """The jsonl files of a folder; a file or a dataset unchanged."""
    found = _files(Path(path), *JSON)
    found.pop("corpus", None)
    return list(map(str, found.values())) or [path]


@dataclass
class _Spool:
    """A file of what the rows hold, without the texts of their passages."""

    file: Path
    splits: dict[str, Rows]
    corpus: Rows | None
    columns: Columns

    def streams(self, share: float) -> Streams:
        """The corpus, whose stream also writes the spool; the rest is read from the spool.

        Args:
            share: of the training queries, to hold out.
        """
        qrels: dict[str, Stream[Judgement]] = {
            split: functools.partial(self._positives, split) for split in self.splits
        }
        runs = {NEGATIVES: self._negatives, TEACHER: self._teacher}
        return Streams("the rows", self._passages, self._queries, held_out(qrels, share), runs)

    def _passages(self) -> Iterator[tuple[str, Record]]:
        """(place, passage) of the corpus, after all rows were written to the spool."""
        found = unique_records(self._written(), "passages")
        if self.corpus is None:
            yield from found
            return
        for _ in found:
            pass  # rows beside a corpus have no passages; this reads them
        yield from parsed(self.corpus.read(RECORD), record_of, RECORD)

    def _written(self) -> Iterator[tuple[str, Record]]:
        """Write all rows to the spool; yield (place, passage) of the texts in them."""
        # whole before the corpus is: a corpus that an interrupted build has finished is not read
        with replacing(self.file) as scratch, open(scratch, "w", encoding="utf-8") as file:
            for split, part in self.splits.items():
                found = part.read(LINE)
                if self.corpus is not None:  # else the progress of the passages is shown
                    found = track(found, f"rows of {split}", unit="rows")
                of_row = functools.partial(row_of, columns=self.columns)
                for place, row in parsed(found, of_row, REMEDY):
                    passages = [*row.positives, *row.negatives]
                    for name in (row.id, *(one.id for one in passages)):
                        check_id(name, place)
                    sides = ([one[:2] for one in side] for side in (row.positives, row.negatives))
                    query = (row.id, row.query, row.instruction)
                    file.write(f"{json.dumps([place, split, *query, *sides])}\n")
                    for one in passages if self.corpus is None else ():
                        if one.text is None:
                            raise InputError(
                                "missing-corpus",
                                f"{place}: the row has ids of passages, but there is no corpus: set"
                                " data.corpus to the file or dataset with these passages",
                            )
                        yield place, (one.id, one.title, one.text)

    def _read(self) -> Iterator[Any]:
        """[place, split, query id, query, instruction, positives, negatives] of each row."""
        with open(self.file, encoding="utf-8") as file:
            yield from map(json.loads, file)

    def _queries(self) -> Iterator[tuple[str, Record]]:
        found = ((place, (name, own, text)) for place, _, name, text, own, *_ in self._read())
        return unique_records(found, "queries")

    def _positives(self, split: str) -> Iterator[tuple[str, Judgement]]:
        for place, own, query, _, _, passages, _ in self._read():
            if own == split:
                yield from ((place, (query, passage, 1)) for passage, _ in passages)

    def _negatives(self) -> Iterator[tuple[str, Scored]]:
        for place, _, query, _, _, _, passages in self._read():
            for rank, (passage, _) in enumerate(passages, 1):
                yield place, (query, passage, 1 / rank)

    def _teacher(self) -> Iterator[tuple[str, Scored]]:
        for place, _, query, _, _, own, others in self._read():
            for passage, score in (*own, *others):
                if score is not None:
                    yield place, (query, passage, score)
