"""What an evaluation or a search runs, with its settings; and the embeddings of a collection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifests
from caravan.data.collection import Collection
from caravan.data.segments import Reading, cut
from caravan.data.tokenization import instruction_for
from caravan.distributed import is_main_process
from caravan.encoding import has_instruction, read_encoding
from caravan.retrieval.index import BestSegments, Faiss, Index
from caravan.retrieval.inference import Inference, Models
from caravan.retrieval.rerank import Reranking
from caravan.retrieval.store import Embeddings, Store


@dataclass(frozen=True)
class Systems:
    """What an evaluation runs: retrievers, fusion if there are several, a reranker if any.

    Attributes:
        retrievers: "bm25", model folders and run files.
        make: makes a new "bm25" (`caravan.retrieval.bm25.BM25`), "index"
            (`caravan.retrieval.index.Index`) or "fuse" (`caravan.retrieval.fusion`). Each
            collection has its own, so that one index is freed before the next is built.
        settings: of these three, for manifests; `k` of the index is the depth of all runs.
        reranker: a model folder or None.
        reading: how much of a text the retrievers read.
        dim: the first dimensions of an embedding that are kept; None is as in the model folder.
        block: texts per shard of embeddings.
    """

    retrievers: Sequence[str]
    make: Callable[[str], Any]
    settings: Mapping[str, dict[str, Any]]
    reranker: Path | None = None
    rerank: Reranking = field(default_factory=Reranking)
    reading: Reading = field(default_factory=Reading)
    dim: int | None = None
    block: int = 16384

    @property
    def searches(self) -> dict[str, str]:
        """The retrievers by the names of their stages: bm25, retriever, run, retriever-2, ..."""
        numbers, found = Counter[str](), {}
        for retriever in self.retrievers:
            kind = "retriever" if Path(retriever).is_dir() else "run"
            name = "bm25" if retriever == "bm25" else kind
            numbers[name] += 1
            found[name if numbers[name] == 1 else f"{name}-{numbers[name]}"] = retriever
        return found

    @property
    def k(self) -> int:
        """The depth of all runs."""
        return int(self.settings["index"]["k"])

    @property
    def overrides(self) -> dict[str, int]:
        """The settings that replace those of the retrievers' encodings."""
        return self.reading.lengths | ({} if self.dim is None else {"dim": self.dim})

    @property
    def folders(self) -> list[tuple[Path, str, dict[str, int]]]:
        """The model folders, each with its kind and the settings that replace its encoding's."""
        paths = [Path(name) for name in self.retrievers if name != "bm25"]
        found = [(path, "retriever", self.overrides) for path in paths if path.is_dir()]
        if self.reranker is not None and self.reranker.is_dir():
            found.append((self.reranker, "reranker", self.rerank.lengths))
        return found

    def make_index(self, counts: np.ndarray | None) -> Index:
        """An index of documents.

        Args:
            counts: segments of each document, of which the best one counts; None without segments.
        """
        index: Index = self.make("index")
        return index if counts is None else BestSegments(index, counts)

    def check_settings(self, models: Models) -> None:
        """Check lengths and dimensions against the models, before the first stage takes hours.

        Raises:
            InputError: If a model has too few positions or dimensions.
        """
        for folder in self.folders:
            models.new(*folder).check_settings()

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
            return models.digest(path) if path.is_dir() else manifests.content_digest(path)

        retrievers = {str(i): digest(name) for i, name in enumerate(self.retrievers, start=1)}
        inputs: dict[str, Any] = {"retriever": retrievers, "k": self.k}
        if "bm25" in self.retrievers:
            inputs["bm25"] = self.settings["bm25"]
        if any(kind == "retriever" for _, kind, _ in self.folders):
            unset = {"query_length": None, "passage_length": None}
            inputs |= {"index": self.settings["index"], **unset, **self.overrides}
            inputs |= self.reading.segments
        if len(self.retrievers) > 1:
            inputs["fuse"] = self.settings["fuse"]
        if self.reranker is not None:
            inputs["reranker"] = digest(str(self.reranker))
            inputs["rerank"] = {k: v for k, v in asdict(self.rerank).items() if k != "block"}
        if self.folders:
            inputs |= {"precision": models.precision, "attention": models.attention}
        encodings = [read_encoding(folder)[0] for folder, _, _ in self.folders]
        found = [instruction_for(encoding, collection) for encoding in encodings]
        if any(found):
            inputs["instructions"] = [one.get("instruction") for one in found]
        return inputs


class Dense:
    """The embeddings of a collection by a retriever; those in the store are reused.

    Attributes:
        instruction: of the collection (`instruction_for`).
        inputs: what determines the embeddings of both sides.
    """

    def __init__(
        self,
        model: Inference,
        models: Models,
        systems: Systems,
        collection: Collection,
        store: Store,
    ) -> None:
        self.model, self.systems, self.collection, self.store = model, systems, collection, store
        self.instruction = instruction_for(model.encoding, collection.name)
        self.inputs = {
            **models.inputs(model.folder),
            "collection": collection.digest,
            "block": systems.block,
        }

    def passages(self) -> tuple[Embeddings, np.ndarray | None]:
        """Embed the passages, or their segments.

        Returns:
            The embeddings, and how many each passage has if each of its segments has one
            (`Systems.make_index`).

        Raises:
            InputError: "out-of-memory", before anything is encoded, if the main process cannot
                hold the index of faiss.
        """
        corpus, reading = self.collection.corpus, self.systems.reading
        read = cut(corpus, np.arange(len(corpus)), reading)
        index, dim = self.systems.make("index"), self.model.dim
        if isinstance(index, Faiss) and dim is not None and is_main_process():
            index.refuse_too_large(len(read.rows), dim)
        name = "segments" if reading.segments else "passages"
        return self._embedded("passage", read.texts, read.rows, name, reading.segments), read.counts

    def queries(self, split: str) -> np.ndarray:
        """Embeddings [Q, d] float32 of the judged queries of a split."""
        rows, name = self.collection.qrels(split).queries, f"queries.{split}"
        return self._embedded("query", self.collection.queries, rows, name, {"split": split}).read()

    def _embedded(
        self, side: str, texts: Any, rows: np.ndarray, name: str, more: dict[str, Any]
    ) -> Embeddings:
        model, block = self.model, self.systems.block
        inputs = {**self.inputs, **more, "length": model.overrides.get(f"{side}_length")}
        inputs["resolved_precision"] = model.precision
        if "dim" in model.overrides:
            inputs["dim"] = model.overrides["dim"]
        if has_instruction(getattr(model.encoding, f"{side}_template")):
            inputs |= self.instruction
        compute = model.encode_rows(texts, rows, side, block, **self.instruction)
        return self.store.embeddings(name, inputs, len(rows), block, compute)
