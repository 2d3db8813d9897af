"""What an evaluation or a search runs, with its settings; and the embeddings of a collection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifests
from caravan.data.collection import Collection
from caravan.data.segments import Reading, cut
from caravan.data.tokenization import instruction_for
from caravan.encoding import FILE, read_encoding
from caravan.retrieval.index import Index
from caravan.retrieval.inference import Inference, Models
from caravan.retrieval.rerank import Reranking
from caravan.retrieval.segments import BestSegments
from caravan.retrieval.store import Embeddings, Store


@dataclass(frozen=True)
class Component:
    """A part of the pipeline, such as an index.

    Each collection makes its own, so that one index is freed before the next is built.
    """

    make: Callable[[], Any]
    settings: dict[str, Any]  # of `make`, for manifests


@dataclass(frozen=True)
class Systems:
    """What an evaluation runs: retrievers, fusion if there are several, a reranker if any.

    Attributes:
        retrievers: "bm25", model folders and run files.
        bm25: `caravan.retrieval.bm25.BM25`.
        index: `caravan.retrieval.index.Index`; its setting `k` is the depth of all runs.
        fuse: `caravan.retrieval.fusion`.
        reranker: a model folder or None.
        reading: how much of a text the retrievers read.
        dim: the first dimensions of an embedding that are kept; None is as in the model folder.
        block: texts per shard of embeddings.
    """

    retrievers: Sequence[str]
    bm25: Component
    index: Component
    fuse: Component
    reranker: Path | None = None
    rerank: Reranking = field(default_factory=Reranking)
    reading: Reading = field(default_factory=Reading)
    dim: int | None = None
    block: int = 16384

    def __len__(self) -> int:
        """The number of stages."""
        return len(self.retrievers) + (len(self.retrievers) > 1) + (self.reranker is not None)

    @property
    def k(self) -> int:
        """The depth of all runs."""
        return int(self.index.settings["k"])

    @property
    def overrides(self) -> dict[str, int]:
        """The settings that replace those of the retrievers' encodings."""
        return self.reading.lengths | ({} if self.dim is None else {"dim": self.dim})

    def make_index(self, counts: np.ndarray | None) -> Index:
        """An index of documents.

        Args:
            counts: segments of each document, of which the best one counts; None without segments.
        """
        index: Index = self.index.make()
        return index if counts is None else BestSegments(index, counts)

    def check_settings(self, models: Models) -> None:
        """Check lengths and dimensions against the models, before the first stage takes hours.

        Raises:
            InputError: If a model has too few positions or dimensions.
        """
        for name in self.retrievers:
            if Path(name).is_dir():
                models.new(Path(name), "retriever", self.overrides).check_settings()
        if self.reranker is not None and self.reranker.is_dir():
            models.new(self.reranker, "reranker", self.rerank.lengths).check_settings()

    def inputs(self, models: Models, collection: str) -> dict[str, Any]:
        """The systems and settings that determine the results of an evaluation.

        Chunk sizes and versions, which change only the last digits, are in each stage's manifest.

        Args:
            collection: its name, which determines the instructions.
        """

        def digest(name: str) -> str:
            path = Path(name)
            if name == "bm25" or not path.exists():  # the stage reports what is missing
                return name
            return models.digest(path) if is_model(path) else manifests.content_digest(path)

        retrievers = {str(i): digest(name) for i, name in enumerate(self.retrievers, start=1)}
        inputs: dict[str, Any] = {"retriever": retrievers, "k": self.k}
        dense = any(is_model(Path(name)) for name in self.retrievers)
        if "bm25" in self.retrievers:
            inputs["bm25"] = self.bm25.settings
        if dense:
            unset = {"query_length": None, "passage_length": None}
            inputs |= {"index": self.index.settings, **unset, **self.overrides}
            inputs |= self.reading.segments
        if len(self.retrievers) > 1:
            inputs["fuse"] = self.fuse.settings
        if self.reranker is not None:
            inputs["reranker"] = digest(str(self.reranker))
            inputs["rerank"] = {k: v for k, v in asdict(self.rerank).items() if k != "block"}
        if dense or self.reranker is not None:
            inputs |= {"precision": models.precision, "attention": models.attention}
        names = [*self.retrievers, *([] if self.reranker is None else [str(self.reranker)])]
        folders = [Path(name) for name in names if is_model(Path(name))]
        found = [instruction_for(read_encoding(one)[0], collection) for one in folders]
        if any(found):
            inputs["instructions"] = [one.get("instruction") for one in found]
        return inputs


def is_model(path: Path) -> bool:
    """Whether a retriever is meant as a model folder and not as a run file."""
    return path.is_dir() or path.name == FILE


def encode_corpus(
    model: Inference,
    inputs: dict[str, Any],
    systems: Systems,
    collection: Collection,
    store: Store,
) -> tuple[Embeddings, np.ndarray | None]:
    """Embed the passages of a collection, or their segments; reuses embeddings in the store.

    Args:
        inputs: the result of `Models.inputs`.

    Returns:
        The embeddings, and how many each passage has if each of its segments has one
        (`Systems.make_index`).
    """
    reading, block = systems.reading, systems.block
    read = cut(collection.corpus, np.arange(len(collection.corpus)), reading)
    inputs = {**inputs, **_encoded(model, "passage"), **reading.segments}
    inputs |= {"collection": collection.digest, "block": block}
    name = "segments" if reading.segments else "passages"
    own = instruction_for(model.encoding, collection.name)
    texts = (read.texts, read.rows, "passage", block, store, name, inputs)
    rows = model.encode_rows(*texts, own.get("instruction"))
    return rows, read.counts


def encode_queries(
    model: Inference,
    inputs: dict[str, Any],
    systems: Systems,
    collection: Collection,
    store: Store,
    split: str,
) -> np.ndarray:
    """Embeddings [Q, d] float32 of the judged queries of a split; arguments: `encode_corpus`."""
    texts, rows, block = collection.queries, collection.qrels(split).queries, systems.block
    inputs = {**inputs, **_encoded(model, "query"), "split": split}
    inputs |= {"collection": collection.digest, "block": block}
    own = instruction_for(model.encoding, collection.name)
    name = f"queries.{split}"
    return model.encode_rows(texts, rows, "query", block, store, name, inputs, **own).read()


def _encoded(model: Inference, side: str) -> dict[str, int | None]:
    """The settings of a side's embeddings that are not those of the model folder."""
    given = model.overrides
    dim = {"dim": given["dim"]} if "dim" in given else {}
    return {"length": given.get(f"{side}_length"), **dim}
