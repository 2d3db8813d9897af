"""Queries one at a time: the stages of an evaluation, kept in memory, with nothing written.

    search = open_searcher(collection, systems, Store(folder), models)
    results = search("which function splits a path?")

A query finds what the same text as a query of the collection finds in an evaluation: it is
embedded, searched, fused and reranked by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from caravan.data.collection import Collection
from caravan.data.runs import Run, canonical
from caravan.data.tokenization import instruction_for
from caravan.errors import InputError
from caravan.retrieval.bm25 import BM25, open_index
from caravan.retrieval.fusion import Fusion
from caravan.retrieval.inference import Models, TextList
from caravan.retrieval.rerank import Reranker
from caravan.retrieval.store import Store
from caravan.retrieval.systems import Dense, Systems

ROW = np.zeros(1, dtype=np.int64)  # the row of the only query in a run


@dataclass(frozen=True)
class Result:
    """The run of one stage for a query."""

    stage: str
    run: Run  # of one query, row 0
    seconds: float

    def ranks(self) -> dict[int, tuple[int, float]]:
        """(rank from 1, score) by passage row."""
        rows, scores = self.run.of(0)
        ranked = enumerate(zip(rows.tolist(), scores.tolist(), strict=True), start=1)
        return {row: (rank, score) for rank, (row, score) in ranked}


@dataclass(frozen=True)
class Searcher:
    """Searches a collection with a search function per retrieval stage."""

    collection: Collection
    retrievers: Mapping[str, Callable[[str], Run]]
    fuse: Fusion
    reranker: Reranker | None
    k: int

    def __call__(self, query: str) -> list[Result]:
        """The results of all stages in order; the last one's run is the answer."""
        results: list[Result] = []

        def add(stage: str, search: Callable[[], Run]) -> None:
            started = time.monotonic()
            run = canonical(search(), self.collection.corpus)
            results.append(Result(stage, run, time.monotonic() - started))

        for name, search in self.retrievers.items():
            add(name, partial(search, query))
        if len(results) > 1:
            runs = [result.run for result in results]
            add("fused", lambda: self.fuse(runs).top(self.k))
        if self.reranker is not None:
            texts = TextList([("", query)]), self.collection.corpus
            add("reranked", partial(self.reranker.rerank, results[-1].run, *texts))
        return results


def open_searcher(
    collection: Collection, systems: Systems, store: Store, models: Models
) -> Searcher:
    """Load the models, and embed or index the corpus unless the store has it.

    Raises:
        InputError: "run-in-search", a retriever is a run file; or a length exceeds a model's
            positions.
    """
    systems.check_settings(models)
    retrievers: dict[str, Callable[[str], Run]] = {}
    for name, retriever in systems.searches.items():
        if retriever == "bm25":
            bm25 = open_index(systems.make("bm25"), systems.settings["bm25"], collection, store)
            retrievers[name] = partial(_search_bm25, bm25, systems.k)
        elif Path(retriever).is_file():
            raise InputError(
                "run-in-search",
                f"retriever: {retriever} is a run file, which has no results for other queries;"
                " give a model folder or bm25",
            )
        else:
            model = models.new(Path(retriever), "retriever", systems.overrides)
            retrievers[name] = _dense(Dense(model, models, systems, collection, store))
    reranker = None
    if systems.reranker is not None:
        model = models.new(systems.reranker, "reranker", systems.rerank.lengths)
        model.num_workers = 0  # a query has too few pairs
        model.load()
        own = instruction_for(model.encoding, collection.name)
        reranker = Reranker(model, systems.rerank, **own)
    return Searcher(collection, retrievers, systems.make("fuse"), reranker, systems.k)


def _search_bm25(bm25: BM25, k: int, query: str) -> Run:
    return bm25.search([query], ROW, k)


def _dense(dense: Dense) -> Callable[[str], Run]:
    systems, passages = dense.systems, len(dense.collection.corpus)
    embeddings, segments = dense.passages()
    index = systems.make_index(segments)
    index.build(embeddings)
    dense.model.load()

    def search(query: str) -> Run:
        texts = [("", query)]
        vectors = dense.model.embed(texts, "query", **dense.instruction).astype(np.float16)
        found = index.search(vectors.astype(np.float32), min(systems.k, passages))  # as on disk
        return Run.from_topk(ROW, *found)

    return search
