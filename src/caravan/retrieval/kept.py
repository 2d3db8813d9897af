"""What is made of a corpus once and kept: its embeddings, and BM25's index.

A manifest beside each says by digests what it was made from, so that whoever searches the same
corpus with the same model takes it, and nobody else does. An evaluation keeps its own in its store;
a search takes over what any evaluation has made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caravan import manifest
from caravan.data.collection import Collection
from caravan.retrieval.folders import Folders

SUFFIX = ".manifest.json"


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
    for path in sorted(below.rglob(f"{name}*{SUFFIX}")):
        product = path.with_name(path.name.removesuffix(SUFFIX))
        if manifest.matches(product, inputs):
            return product
    return None


def place(store: Path, reuse: Path | None, name: str, inputs: dict[str, Any]) -> Path:
    """Where a product lies, or is to be made: under a name of its inputs, so that none gives way.

    Args:
        store: where it is made.
        reuse: below which others may have made it.
    """
    there = found(store, name, inputs) or found(reuse, name, inputs)
    return there or store / f"{name}.{manifest.digest(inputs)[:12]}"
