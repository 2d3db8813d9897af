"""Collections in the cache: built once, by one process, and again if they are damaged."""

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

from caravan.data.collection import FORMAT, Collection, DamagedError
from caravan.files import cache_folder, locked, refuse_foreign, writing

_FILE = re.compile(
    r"collection\.json|(corpus|queries)\.(arrow|ids\.npy)|qrels/[^/]+\.npz|runs/[^/]+\.trec"
)
"""The files of a collection's folder."""

log = logging.getLogger(__name__)


def cache_key(*parts: object) -> str:
    """A short hex key of everything that shapes a collection; JSON-able parts, format included."""
    content = json.dumps([FORMAT, *parts], sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def cached_collection(
    cache_dir: str | Path, name: str, key: str, build: Callable[[Path], Collection]
) -> Collection:
    """`cache_dir/collections/<name>-<key>`: opened if it is there, else built by `build(folder)`.

    One that is damaged is built again, unless its folder has files that Caravan did not write.
    One process builds while the others (ranks, a sweep's jobs) wait for it; a lock that dies with
    its process guards this, so a killed build blocks nobody.

    Raises:
        InputError: the cache or the folder belongs to another user, or everybody may write to it.
        DamagedError: the folder is damaged, and has files of somebody else or is a link.
    """
    plain = re.sub(r"[^\w.-]+", "-", name)
    folder = cache_folder(cache_dir, "collections") / f"{plain}-{key}"
    try:
        if folder.exists():
            return _open_cached(folder)
    except DamagedError:
        if not os.access(folder.parent, os.W_OK):
            raise
    with locked(folder.parent / f".{folder.name}.lock"):
        try:
            if folder.exists():
                return _open_cached(folder)
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


def _open_cached(folder: Path) -> Collection:
    refuse_foreign(folder)
    return Collection.open(folder)


def _remove(folder: Path, damage: DamagedError) -> None:
    """Remove a damaged collection.

    Raises:
        DamagedError: the folder is a link, or has files that no collection has.
    """
    files = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    names = (path.relative_to(folder).as_posix() for path in files)
    if folder.is_symlink() or not folder.is_dir() or not all(map(_FILE.fullmatch, names)):
        raise damage
    log.warning("%s is damaged; it is built again", folder)
    shutil.rmtree(folder)
