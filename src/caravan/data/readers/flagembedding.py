"""FlagEmbedding's training rows: texts without ids, and a teacher's scores beside them.

    {"query": "...", "pos": ["..."], "neg": ["..."], "pos_scores": [0.9], "neg_scores": [0.1]}

The id of a text is its hash, so that equal texts are one passage (or one query). Negatives become
the run `data:negatives`, scores the run `data:teacher`.

    python train.py data=flagembedding data.path=train.jsonl data.held_out=0.02 \
        loss=infonce_kl 'sampler.runs=[data:negatives]' sampler.teacher=data:teacher
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.cached import cache_key, cached_collection
from caravan.data.collection import Collection
from caravan.data.readers import hub
from caravan.data.readers.held_out import check_held_out
from caravan.data.readers.hub import SAVED
from caravan.data.readers.training_rows import (
    DEV,
    TRAIN,
    Passage,
    Row,
    TrainingRows,
    id_of_text,
    score_of,
    some,
)
from caravan.errors import InputError
from caravan.files import listed

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
REMEDY = (
    'every line is one object such as {"query": "...", "pos": ["..."], "neg": ["..."]}, with '
    '"pos_scores" and "neg_scores" or without'
)


class FlagEmbedding:
    """Training rows of FlagEmbedding, https://github.com/FlagOpen/FlagEmbedding.

    Args:
        path: a file of rows, or a folder whose files are all read; or a Hugging Face dataset of
            such rows, by hub id or folder.
        dev: file, folder or dataset of the rows to validate on.
        held_out: the share of the training queries that become the split dev, where `dev` is None.
        config, subset, revision: of a dataset: its configuration, split and version.
        name: what reports call the collection; the path's name by default.
        train_split, dev_split, split: to train on, to validate on, and to score.
    """

    def __init__(
        self,
        path: str,
        dev: str | None = None,
        held_out: float = 0.0,
        config: str | None = None,
        subset: str = "train",
        revision: str | None = None,
        name: str | None = None,
        train_split: str = "train",
        dev_split: str = "dev",
        split: str = "dev",
    ) -> None:
        self.paths = {TRAIN: path} if dev is None else {TRAIN: path, DEV: dev}
        self.held_out = held_out
        self.dataset = (config, subset, revision)
        self.name = name or Path(path).resolve().name.removesuffix(".gz")
        self.train_split, self.dev_split, self.split = train_split, dev_split, split

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: a file is missing or wrong; says which, at which line, and what to do.
        """
        check_held_out(self.held_out, self.paths)
        files = {split: _files(path) for split, path in self.paths.items()}
        read = [
            [split, [hub.contents(path, cache_dir) or path for path in paths]]
            for split, paths in files.items()
        ]
        key = cache_key("flagembedding", read, self.dataset, self.held_out)
        rows = TrainingRows(
            self.name,
            {split: functools.partial(self._rows, paths) for split, paths in files.items()},
            held_out=self.held_out,
        )
        return cached_collection(cache_dir, self.name, key, rows.build)

    def _rows(self, paths: list[str]) -> Iterator[Row]:
        found = itertools.chain.from_iterable(
            hub.objects(path, *self.dataset, REMEDY) for path in paths
        )
        for place, fields in some(found, " and ".join(paths), REMEDY):
            yield row_of(place, fields)


def row_of(place: str, fields: dict[str, Any]) -> Row:
    """A row: "prompt" and "type" are left out, the encoding says how a query is asked."""
    query = fields.get("query")
    if not isinstance(query, str):
        raise InputError(f"{place}: no query: {REMEDY}")
    sides = [_side(place, fields, side) for side in ("pos", "neg")]
    return Row(place, id_of_text(query), query, *sides)


def _side(place: str, fields: dict[str, Any], side: str) -> list[Passage]:
    texts, scores = fields.get(side), fields.get(f"{side}_scores")
    if side == "neg" and texts is None:
        texts = []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{place}: {side} is no list of strings: {REMEDY}")
    if scores is None:
        scores = [None] * len(texts)
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise InputError(
            f"{place}: {side}_scores must be a list of {len(texts)} numbers, one for each of "
            f"{side}: {REMEDY}"
        )
    return [
        Passage(id_of_text(text), "", text, score_of(place, score, REMEDY))
        for text, score in zip(texts, scores, strict=True)
    ]


def _files(path: str) -> list[str]:
    """The files of a folder; a file or a dataset as it is."""
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).is_file() for name in SAVED):
        return [path]
    found = [str(file) for file in listed(folder) if file.name.endswith(SUFFIXES)]
    if not found and not any(folder.glob("**/*.parquet")):
        raise InputError(f"{path} holds no .jsonl or .json (nor such as .gz): give training rows")
    return found or [path]  # a dataset of parquet
