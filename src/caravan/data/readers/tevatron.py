"""Tevatron's training rows: both layouts, as jsonl files or as Hugging Face datasets.

    {"query_id": "q", "query": "...", "positive_passages": [{"docid": "p", "title": "...",
     "text": "..."}], "negative_passages": [...]}                 texts inline
    {"query_id": "q", "query_text": "...", "positive_document_ids": ["p"],
     "negative_document_ids": ["n"]}                              beside a corpus

Negatives become the run `data:negatives`, and where passages carry a "score", as for Tevatron's
distillation, these become `data:teacher`.

    python train.py data=tevatron data.path=train.jsonl 'sampler.runs=[data:negatives]'
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caravan.data.cached import cache_key, cached_collection
from caravan.data.collection import Collection
from caravan.data.readers import hub
from caravan.data.readers.held_out import check_held_out
from caravan.data.readers.jsonl import id_of, record_of
from caravan.data.readers.lines import by_stem
from caravan.data.readers.training_rows import (
    TRAIN,
    Passage,
    Row,
    TrainingRows,
    id_of_text,
    score_of,
    some,
)
from caravan.data.texts import Record
from caravan.errors import InputError

SUFFIXES = (".jsonl", ".json")
REMEDY = (
    'every line is one object with "query_id", "query", "positive_passages" and '
    '"negative_passages", or with "query_id", "query_text", "positive_document_ids" and '
    '"negative_document_ids"'
)
OF_CORPUS = 'every line is one object such as {"docid": "7", "title": "...", "text": "..."}'


class Tevatron:
    """Training rows of Tevatron, https://github.com/texttron/tevatron.

    Args:
        path: a file of rows, which is the split train; a folder of files that are called after
            their splits (train.jsonl, dev.jsonl, and corpus.jsonl); or a Hugging Face dataset, by
            hub id or folder.
        corpus: file or dataset of all passages; None searches those of the rows alone.
        subsets: what a dataset or folder calls each split: {train: train, dev: validation}; None
            takes the files of a folder by their names, of a dataset the split train.
        config, revision: of a dataset of the hub; the configuration is that of its corpus too.
        held_out: the share of the training queries that become the split dev.
        name: what reports call the collection; the path's name by default.
        train_split, dev_split, split: to train on, to validate on, and to score.
        unknown_ids: "refuse" ids that the corpus lacks, or "count" them: training leaves them out,
            measures count them as not found.
    """

    def __init__(
        self,
        path: str,
        corpus: str | None = None,
        subsets: Mapping[str, str] | None = None,
        config: str | None = None,
        revision: str | None = None,
        held_out: float = 0.0,
        name: str | None = None,
        train_split: str = "train",
        dev_split: str = "dev",
        split: str = "dev",
        unknown_ids: str = "refuse",
    ) -> None:
        self.path, self.corpus = path, corpus
        self.subsets = dict(subsets or {})
        self.config, self.revision = config, revision
        self.held_out = held_out
        self.name = name or Path(path).resolve().name.removesuffix(".gz")
        self.train_split, self.dev_split, self.split = train_split, dev_split, split
        self.unknown_ids = unknown_ids

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: a file is missing or wrong; says which, at which line, and what to do.
        """
        sources, corpus = self._sources()
        check_held_out(self.held_out, sources)
        read = [
            [split, path, subset, hub.contents(path, cache_dir)]
            for split, (path, subset) in [
                *sources.items(),
                *([("", (corpus, ""))] if corpus else []),
            ]
        ]
        for one in read:
            if one[3]:  # then what it holds says more than where it lies
                one[1] = ""
        key = cache_key(
            *("tevatron", read, self.config, self.revision, self.held_out, self.unknown_ids)
        )
        rows = TrainingRows(
            self.name,
            {
                split: functools.partial(self._rows, path, subset, corpus is not None)
                for split, (path, subset) in sources.items()
            },
            None if corpus is None else functools.partial(self._passages, corpus),
            self.held_out,
            self.unknown_ids,
        )
        return cached_collection(cache_dir, self.name, key, rows.build)

    def _sources(self) -> tuple[dict[str, tuple[str, str]], str | None]:
        """Path and subset of each split, and the corpus."""
        path = Path(self.path)
        if path.is_file():
            if set(self.subsets or {TRAIN}) != {TRAIN}:
                raise InputError(
                    f"data.subsets asks for {', '.join(self.subsets)}, and {path} is one file of "
                    "rows: give the folder that holds a file for each, or data.held_out"
                )
            return {TRAIN: (self.path, TRAIN)}, self.corpus
        files = by_stem(path, SUFFIXES)
        if TRAIN not in files:  # a dataset
            subsets = self.subsets or {TRAIN: TRAIN}
            return {split: (self.path, name) for split, name in subsets.items()}, self.corpus
        corpus = files.pop("corpus", None)
        named = self.subsets or {name: name for name in files}
        for split, name in named.items():
            if name not in files:
                raise InputError(
                    f"data.subsets.{split} is {name}, and {path} has no {name}.jsonl (or .gz): its "
                    f"files of rows are {', '.join(files)}"
                )
        sources = {split: (str(files[name]), split) for split, name in named.items()}
        return sources, self.corpus or (None if corpus is None else str(corpus))

    def _rows(self, path: str, subset: str, has_corpus: bool) -> Iterator[Row]:
        found = hub.objects(path, self.config, subset, self.revision, REMEDY)
        for place, fields in some(found, path, REMEDY):
            yield row_of(place, fields, has_corpus)

    def _passages(self, corpus: str) -> Iterator[tuple[str, Record]]:
        found = hub.objects(corpus, self.config, TRAIN, None, OF_CORPUS)
        for place, fields in some(found, corpus, OF_CORPUS):
            yield place, record_of(place, fields, OF_CORPUS)


def row_of(place: str, fields: dict[str, Any], has_corpus: bool) -> Row:
    """A row of either layout."""
    query = fields.get("query", fields.get("query_text"))
    if not isinstance(query, str):
        raise InputError(f"{place}: no query text: {REMEDY}")
    name = id_of(fields.get("query_id", id_of_text(query)))
    if not isinstance(name, str):
        raise InputError(f"{place}: query_id is not a string: {REMEDY}")
    if "positive_passages" in fields:
        keys, take = ("positive_passages", "negative_passages"), _inline
    else:
        keys, take = ("positive_document_ids", "negative_document_ids"), _by_id
        if not has_corpus and any(fields.get(key) for key in keys):
            raise InputError(
                f"{place}: the row names its passages by id, and there is no corpus: give the file "
                "or dataset that has them as data.corpus"
            )
    sides = []
    for key in keys:
        listed = fields.get(key)
        if listed is None and key.startswith("negative"):
            listed = []
        if not isinstance(listed, list):
            raise InputError(f"{place}: {key} is no list: {REMEDY}")
        sides.append([take(place, key, one) for one in listed])
    return Row(place, name, query, *sides)


def _inline(place: str, key: str, one: Any) -> Passage:
    if not isinstance(one, dict):
        raise InputError(f"{place}: an entry of {key} is no object: {REMEDY}")
    text, title = one.get("text"), "" if one.get("title") is None else one["title"]
    if not isinstance(text, str) or not isinstance(title, str):
        raise InputError(f"{place}: text or title in {key} is not a string: {REMEDY}")
    name = id_of(one.get("docid", id_of_text(f"{title}\n{text}" if title else text)))
    if not isinstance(name, str):
        raise InputError(f"{place}: a docid in {key} is not a string: {REMEDY}")
    return Passage(name, title, text, score_of(place, one.get("score"), REMEDY))


def _by_id(place: str, key: str, one: Any) -> Passage:
    name = id_of(one)
    if not isinstance(name, str):
        raise InputError(f"{place}: an id in {key} is not a string: {REMEDY}")
    return Passage(name, "", None, None)
