"""What is made once and kept in a store: embeddings, BM25's index, a reranker's scores.

    store/passages.3f9c2a41d07b/                 named after the digest of what it is made from
    store/passages.3f9c2a41d07b.manifest.json    says what that is, once it is whole

Only a search of the same corpus with the same model, settings and versions reuses it. A product of
other inputs has another name, so that evaluations which share a store never overwrite each other's
products, and one that was killed finds its own half. A search also reuses the products of any
evaluation.
"""

from __future__ import annotations

import glob
import logging
from pathlib import Path
from typing import Any

from caravan import manifests
from caravan.data.collection import Collection
from caravan.retrieval.bm25 import FILES
from caravan.retrieval.folders import Folders
from caravan.retrieval.shards import refuse_link

SUFFIX = ".manifest.json"

log = logging.getLogger(__name__)


def bm25_inputs(collection: Collection, settings: dict[str, Any]) -> dict[str, Any]:
    """What BM25's index is made from; `settings` are those of `caravan.retrieval.bm25.BM25`."""
    versions = manifests.versions(("bm25s", "PyStemmer"))
    return {"collection": collection.digest, "bm25": settings, "versions": versions}


def embedding_inputs(collection: Collection, folders: Folders, model: Path) -> dict[str, Any]:
    """What embeddings of either side are made from, but for their length and the device's type."""
    determines = folders.determines(model)
    return {**determines, "collection": collection.digest, "block": folders.block}


def open_bm25(bm25: Any, collection: Collection, folder: Path, inputs: dict[str, Any]) -> None:
    """Open the index in `folder`, or build it there first.

    Another process may build the same index meanwhile. Both write the same bytes file by file, so
    that it does not matter whose files remain.
    """
    refuse_link(folder)
    if manifests.matches(folder, inputs):
        if not (damaged := _damaged(folder)):
            bm25.open(collection.corpus, folder)
            return
        log.warning("%s is damaged; the index is built again", damaged)
    manifests.remove(folder)
    bm25.build(collection.corpus, folder)
    written = {name: manifests.content(folder / name) for name in FILES}
    manifests.write(folder, inputs, {"files": written})


def _damaged(folder: Path) -> Path | None:
    """The first file of an index whose content is not what its manifest recorded."""
    written = (manifests.read(folder) or {}).get("facts", {}).get("files", {})
    files = ((folder / name, written.get(name)) for name in FILES)
    return next((path for path, record in files if not manifests.is_as_written(path, record)), None)


def found(below: Path | None, name: str, inputs: dict[str, Any]) -> Path | None:
    """The finished product of just these inputs, somewhere below a folder, if there is one.

    Args:
        name: what it is called, or begins with.
    """
    if below is None or not below.is_dir():
        return None
    for path in sorted(below.rglob(f"{glob.escape(name)}*{SUFFIX}")):
        product = path.with_name(path.name.removesuffix(SUFFIX))
        if not product.is_symlink() and manifests.matches(product, inputs):
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
        own = store / f"{name}.{manifests.digest(inputs)[:12]}"
        _report_others(own, name, inputs)
        return own
    if there.parent != store:
        log.info("reusing %s, from the same model, collection, settings and versions", there)
    return there


def _report_others(own: Path, name: str, inputs: dict[str, Any]) -> None:
    """Nothing in a store is overwritten, and embeddings of a large corpus fill a disk."""
    beside = own.parent.glob(f"{glob.escape(name)}*{SUFFIX}")
    others = sorted(path.with_name(path.name.removesuffix(SUFFIX)) for path in beside)
    if not others:
        return
    nearest = min((manifests.differences(other, inputs) for other in others), key=len)
    log.info(
        "%s has %s from other models, collections, settings or versions (the nearest differs in"
        " %s); delete what you no longer need",
        *(own.parent, ", ".join(other.name for other in others), "; ".join(nearest[:3])),
    )
