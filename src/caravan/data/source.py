"""The `Source` protocol, streams of records, and the cache of built collections."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import xxhash

from caravan import manifests
from caravan.data.collection import FORMAT, Collection, write_collection
from caravan.data.qrels import Judgement, Scored
from caravan.data.texts import Record
from caravan.errors import InputError
from caravan.files import cache_folder, refuse_foreign

T = TypeVar("T")
Stream = Callable[[], Iterable[tuple[str, T]]]
"""Reads a part of a source from its start: each item with its place, such as `corpus.jsonl:12`."""

log = logging.getLogger(__name__)


class Source(Protocol):
    """A data source: anything that gives a `Collection`.

    A source is a class whose arguments are the keys of `conf/data/<name>.yaml`. It needs
    `collection` and the attributes below; subclassing `Source` gives the defaults.
    `docs/extending.md` has an example.

    Attributes:
        name: what reports call the collection; None for a name made from the path.
        train_split, dev_split, split: qrels to train on, to validate on, and to score; "" for none.
        hub_id: the dataset on the Hugging Face hub, for model cards.
        language: of its texts, such as "en", for model cards.
    """

    name: str | None
    train_split: str = ""
    dev_split: str = ""
    split: str = ""
    hub_id: str | None = None
    language: str | None = None

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: a file is missing or wrong; names the file, the line and the remedy.
        """
        ...


@dataclass(frozen=True)
class Streams:
    """The records of a source, by part."""

    source: str  # the place of a part that has no items
    corpus: Stream[Record]
    queries: Stream[Record] = tuple
    qrels: Mapping[str, Stream[Judgement]] = field(default_factory=dict)  # by split
    runs: Mapping[str, Stream[Scored]] = field(default_factory=dict)  # by name

    def write(self, folder: Path, name: str, **settings: Any) -> Collection:
        """Write a collection; `settings` are those of `write_collection`.

        For an error message, a part is read again up to the record that is wrong.
        """
        parts: dict[str, Stream[Any]] = {"corpus": self.corpus, "queries": self.queries}
        parts |= {f"qrels/{split}": read for split, read in self.qrels.items()}
        parts |= {f"runs/{run}": read for run, read in self.runs.items()}

        def place(part: str, n: int) -> str:
            return next(itertools.islice(parts[part](), n, None), (self.source, None))[0]

        return write_collection(
            folder,
            name,
            _items(self.corpus),
            _items(self.queries),
            {split: _items(read) for split, read in self.qrels.items()},
            runs={run: _items(read) for run, read in self.runs.items()},
            where=place,
            resumes=True,
            **settings,
        )


def _items(read: Stream[T]) -> Iterator[T]:
    return (item for _, item in read())


def held_out(
    qrels: Mapping[str, Stream[Judgement]], share: float, train: str = "train", dev: str = "dev"
) -> dict[str, Stream[Judgement]]:
    """The qrels of a source, with a share of the training queries as the split `dev`.

    A hash of their ids selects the queries, so the split is the same in every run.

    Raises:
        InputError: "invalid-setting", the share is not in [0, 1) or the split cannot be made.
    """
    if not 0 <= share < 1:
        raise InputError("invalid-setting", f"data.held_out={share} is not in [0, 1)")
    if share and (dev in qrels or train not in qrels):
        there = ", ".join(sorted(qrels)) or "none"
        raise InputError(
            "invalid-setting",
            f"data.held_out makes {dev} from {train}, but the splits are {there}: set it to 0",
        )
    if not share:
        return dict(qrels)

    def part(is_dev: bool) -> Iterator[tuple[str, Judgement]]:
        for place, judgement in qrels[train]():
            digest = xxhash.xxh3_64_intdigest(judgement[0].encode("utf-8", "replace"))
            if (digest / 2**64 < share) == is_dev:
                yield place, judgement

    parts = {split: functools.partial(part, split == dev) for split in (train, dev)}
    return {**qrels, **parts}


def cache_key(*parts: object) -> str:
    """A short hex key of everything that shapes a collection; JSON-able parts, format included."""
    content = json.dumps([FORMAT, *parts], sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def cached_collection(
    cache_dir: str | Path,
    name: str,
    key: str,
    build: Callable[[Path], Collection],
    resumes: bool = False,
) -> Collection:
    """Open `cache_dir/collections/<name>-<key>`, or build it by `build(folder)`.

    A damaged collection is built again. One process builds while the others (ranks, a sweep's jobs)
    wait for its lock.

    Args:
        build: writes the collection into an empty folder.
        resumes: give `build` the folder of an interrupted build instead, with what that has
            written, if there is one.

    Raises:
        InputError: the cache or the folder belongs to another user, or is writable by everyone;
            the folder is damaged and is a symbolic link.
    """
    plain = re.sub(r"[^\w.-]+", "-", name)
    folder = cache_folder(cache_dir, "collections") / f"{plain}-{key}"

    def logged(scratch: Path) -> None:
        started = time.monotonic()
        log.info("building collection %s in %s", name, folder)
        collection = build(scratch)
        log.info(
            "built collection %s: %d passages, %d queries, %.1f s",
            name, len(collection.corpus), len(collection.queries), time.monotonic() - started,
        )  # fmt: skip

    if folder.exists():
        refuse_foreign(folder)
    manifests.ensure(folder, {"collection": key}, logged, resumes)
    return Collection.open(folder)
