"""What is made once and kept in a store: embeddings, BM25's index, a reranker's scores.

    store/passages.3f9c2a41d07b/                 named after the digest of what it is made from
    store/passages.3f9c2a41d07b.manifest.json    says what that is, once it is whole

Whoever searches the same corpus with the same model takes it, and nobody else does; what is made
from anything else has another name, so that evaluations which share a store never replace what is
another's, and one that was killed finds its own half. A search also takes over what any evaluation
has made.
"""

from __future__ import annotations

import glob
import logging
from pathlib import Path
from typing import Any

from caravan import manifest
from caravan.data.collection import Collection
from caravan.retrieval.folders import Folders

SUFFIX = ".manifest.json"

log = logging.getLogger(__name__)


def bm25_inputs(collection: Collection, settings: dict[str, Any]) -> dict[str, Any]:
    """What BM25's index is made from; `settings` are those of `caravan.retrieval.lexical.BM25`."""
    return {"collection": collection.digest, "bm25": settings}


def embedding_inputs(collection: Collection, folders: Folders, model: Path) -> dict[str, Any]:
    """What embeddings of either side are made from, but for their length and the device's type."""
    determines = folders.determines(model)
    return {**determines, "collection": collection.digest, "block": folders.block}


def open_bm25(bm25: Any, collection: Collection, folder: Path, inputs: dict[str, Any]) -> None:
    """Open the index in `folder`, or build it there first."""
    if manifest.matches(folder, inputs):
        bm25.open(collection.corpus, folder)
        return
    manifest.remove(folder)
    bm25.build(collection.corpus, folder)
    manifest.write(folder, inputs)


def found(below: Path | None, name: str, inputs: dict[str, Any]) -> Path | None:
    """The finished product of just these inputs, somewhere below a folder, if there is one.

    Args:
        name: what it is called, or begins with.
    """
    if below is None or not below.is_dir():
        return None
    for path in sorted(below.rglob(f"{glob.escape(name)}*{SUFFIX}")):
        product = path.with_name(path.name.removesuffix(SUFFIX))
        if manifest.matches(product, inputs):
            return product
    return None


def place(store: Path, reuse: Path | None, name: str, inputs: dict[str, Any]) -> Path:
    """Where a product lies, or is to be made: under a name of its inputs, so that none gives way.

    Args:
        store: where it is made.
        reuse: below which others may have made it.
        inputs: all that determines it; what they leave out would be shared in silence.
    """
    there = found(store, name, inputs) or found(reuse, name, inputs)
    if there is None:
        own = store / f"{name}.{manifest.digest(inputs)[:12]}"
        _tell_of_others(own, name)
        return own
    if there.parent != store:
        log.info("%s, from the same model, collection and settings, is taken", there)
    return there


def _tell_of_others(own: Path, name: str) -> None:
    """Nothing in a store gives way, and embeddings of a large corpus fill a disk."""
    beside = own.parent.glob(f"{glob.escape(name)}*{SUFFIX}")
    if others := sorted(path.name.removesuffix(SUFFIX) for path in beside):
        log.info(
            "%s has %s from other models, collections or settings; delete what you no longer need",
            *(own.parent, ", ".join(others)),
        )
