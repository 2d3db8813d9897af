"""What a data source must provide, and the cache in which its collection is built once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from caravan.data.collection import FILES, FORMAT, Collection, DamagedError
from caravan.files import cache_folder, locked, refuse_foreign, writing

log = logging.getLogger(__name__)


class Source(Protocol):
    """A data source: anything that gives a `Collection`.

    A source is a class whose arguments are the keys of a config group, `conf/data/<name>.yaml`. It
    needs `collection` and the attributes below; subclassing `Source` gives the defaults. A new
    format needs nothing but an iterator of records:

    >>> from dataclasses import dataclass
    >>> from caravan.data.collection import write_collection
    >>> @dataclass
    ... class Facts(Source):
    ...     path: str  # a file of "id: sentence" lines; a fact is asked for by its first word
    ...     name: str = "facts"
    ...     train_split: str = "train"
    ...     dev_split: str = "train"
    ...     split: str = "train"
    ...
    ...     def collection(self, cache_dir):
    ...         text = Path(self.path).read_text()
    ...         rows = [line.split(": ") for line in text.splitlines()]
    ...         corpus = [(id_, "", fact) for id_, fact in rows]
    ...         queries = [(id_, "", fact.split()[0]) for id_, fact in rows]
    ...         qrels = {"train": [(id_, id_, 1) for id_, _ in rows]}
    ...
    ...         def build(folder):
    ...             return write_collection(folder, self.name, corpus, queries, qrels)
    ...
    ...         return cached_collection(cache_dir, self.name, cache_key("facts", text), build)
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> path = Path(folder, "facts.txt")
    >>> _ = path.write_text("1: Camels store fat.\\n2: Salt is a mineral.\\n")
    >>> found = Facts(str(path)).collection(folder)
    >>> found.corpus.get([1]), found.qrels("train").positives(0)
    ([('', 'Salt is a mineral.')], array([0]))

    In a config: `_target_: my_package.Facts`, and one line for each argument.

    Attributes:
        name: what reports call the collection; None for a name made from the path.
        train_split, dev_split, split: qrels to train on, to validate on, and to score; "" for none.
        hub_id: the dataset on the Hugging Face hub, for model cards.
        language: of its texts, such as "en", for model cards.
    """

    name: str | None
    train_split: str
    dev_split: str
    split: str
    hub_id: str | None = None
    language: str | None = None

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: a file is missing or wrong; names the file, the line and the remedy.
        """
        ...


def cache_key(*parts: object) -> str:
    """A short hex key of everything that shapes a collection; JSON-able parts, format included."""
    content = json.dumps([FORMAT, *parts], sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def cached_collection(
    cache_dir: str | Path, name: str, key: str, build: Callable[[Path], Collection]
) -> Collection:
    """Open `cache_dir/collections/<name>-<key>`, or build it by `build(folder)`.

    A damaged collection is built again, unless its folder has files that Caravan did not write.
    One process builds while the others (ranks, a sweep's jobs) wait for its lock, which ends with
    the process, so that a killed build blocks nobody.

    Raises:
        InputError: the cache or the folder belongs to another user, or everybody may write to it.
        DamagedError: the folder is damaged, and has foreign files or is a link.
    """
    plain = re.sub(r"[^\w.-]+", "-", name)
    folder = cache_folder(cache_dir, "collections") / f"{plain}-{key}"
    try:
        if folder.exists():
            return _open(folder)
    except DamagedError:
        if not os.access(folder.parent, os.W_OK):
            raise
    with locked(folder.parent / f".{folder.name}.lock"):
        try:
            if folder.exists():
                return _open(folder)
        except DamagedError as error:
            _remove(folder, error)
        started = time.monotonic()
        log.info("building collection %s in %s", name, folder)
        with writing(folder):
            collection = build(folder)
        log.info(
            "built collection %s: %d passages, %d queries, %.1f s",
            name, len(collection.corpus), len(collection.queries), time.monotonic() - started,
        )  # fmt: skip
        return collection


def _open(folder: Path) -> Collection:
    refuse_foreign(folder)
    return Collection.open(folder)


def _remove(folder: Path, damage: DamagedError) -> None:
    """Remove a damaged collection; raise if the folder is a link or has foreign files."""
    files = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    names = (path.relative_to(folder).as_posix() for path in files)
    if folder.is_symlink() or not folder.is_dir() or not all(map(FILES.fullmatch, names)):
        raise damage
    log.warning("%s is damaged; building it again", folder)
    shutil.rmtree(folder)
