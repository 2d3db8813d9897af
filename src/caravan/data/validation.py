"""The queries and passages of one collection's validation during training.

Validation embeds the development queries and either the whole corpus or a fixed subset: all judged
passages, the top of a run (hard passages) and random passages. Subsets are drawn with a constant
seed, so that trainings with different seeds are compared on the same queries and passages.
"""

from __future__ import annotations

import numpy as np

from caravan.data.batching import PairBatches, TextBatches
from caravan.data.collection import Collection, own_passages, warn_if_queries_are_passages
from caravan.data.negatives import run_over
from caravan.data.pairs import PairTemplates
from caravan.data.runs import Run
from caravan.data.segments import Cut, Reading, cut
from caravan.data.tokenization import Templates
from caravan.distributed import is_main_process
from caravan.errors import InputError

BATCH_SIZE = 1024  # texts: enough to sort by length, few enough to balance ranks
SUBSET_SEED = 0  # for the queries and passages; independent of the training seed


class Validation:
    """What is validated of a collection.

    Args:
        templates: tokenize queries and passages.
        split: split with the queries.
        passages: number of passages to search; None searches the whole corpus.
        queries: number of queries to score; None scores all.
        run, run_depth: a run over the queries; its top passages are in the subset, or for a
            reranker are the candidates to rerank.
        ignore_identical_ids: drop the passage with the query's id from its results, as in
            `evaluate.py` (`caravan.data.collection.warn_if_queries_are_passages`).
        name: in logs, if a training validates several collections.

    Attributes:
        qrels: judgements of the queries that are scored.
        passages: rows of the searched passages [n], ascending.
        candidates: what a reranker reranks; None for a retriever.
        relevant_from: the lowest relevant grade in metrics without grades.
        reading: how much of a passage is read; its lengths are those of the templates.
        read: what the latest `batches` read: passages, or their segments.

    Raises:
        InputError: "empty-split", "missing-run", "other-queries".
    """

    read: Cut

    def __init__(
        self,
        collection: Collection,
        templates: Templates | PairTemplates,
        split: str,
        passages: int | None = None,
        queries: int | None = None,
        run: str | None = None,
        run_depth: int = 100,
        ignore_identical_ids: bool = False,
        name: str = "",
    ) -> None:
        self.collection, self.templates, self.split = collection, templates, split
        self.ignore_identical_ids, self.name = ignore_identical_ids, name
        self.reading = Reading()
        self.relevant_from = collection.relevant_from.get(split, 1)
        self.candidates: Run | None = None
        # Queries without a relevant passage in the corpus score 0 for any model. evaluate.py counts
        # them; validation excludes them.
        judged = collection.qrels(split)
        self.qrels = judged.only(judged.relevant.queries)
        if queries is not None and queries < len(self.qrels.queries):
            rng = np.random.default_rng(SUBSET_SEED)
            self.qrels = self.qrels.only(rng.choice(self.qrels.queries, queries, replace=False))
        if not len(self.qrels):
            raise InputError(
                "empty-split",
                f"{collection.name}: split {split!r} has no query with a relevant passage, so"
                " validation is not possible; choose another split with data.dev_split",
            )
        if not ignore_identical_ids and is_main_process():
            warn_if_queries_are_passages(collection, self.qrels.queries)
        if isinstance(templates, PairTemplates):
            if run is None:
                raise InputError(
                    "missing-run",
                    "a reranker is validated on candidates: set validation.run to a run over the"
                    f" {split} queries of {collection.name}",
                )
            candidates = run_over(collection, run, self.qrels, run_depth + ignore_identical_ids)
            self.candidates = self.without_own(candidates.only(self.qrels.queries), run_depth)
            self.passages = np.unique(self.candidates.passage_rows)
        else:
            self.passages = self._subset(passages, run, run_depth)

    def without_own(self, run: Run, depth: int) -> Run:
        """Cut a run to `depth`, dropping own passages if `ignore_identical_ids`."""
        if self.ignore_identical_ids:
            run = run.without(run.query_rows, own_passages(self.collection, run.query_rows))
        return run.top(depth)

    def batches(self, token_budget: int) -> list[TextBatches | PairBatches]:
        """[queries, passages] of a retriever, [pairs] of a reranker."""
        queries, corpus = self.collection.queries, self.collection.corpus
        templates, sizes = self.templates, (BATCH_SIZE, token_budget)
        if isinstance(templates, PairTemplates):
            run = self.candidates
            assert run is not None  # made for pair templates
            self.read = cut(corpus, run.passage_rows, self.reading)
            query_rows = self.read.repeated(np.repeat(run.query_rows, run.counts))
            rows = (query_rows, self.read.rows)
            return [PairBatches(queries, self.read.texts, *rows, templates, *sizes)]
        self.read = cut(corpus, self.passages, self.reading)
        return [
            TextBatches(queries, self.qrels.queries, templates, "query", *sizes),
            TextBatches(self.read.texts, self.read.rows, templates, "passage", *sizes),
        ]

    def _subset(self, size: int | None, run: str | None, depth: int) -> np.ndarray:
        """Passage rows [n] to search, ascending."""
        corpus = len(self.collection.corpus)
        if size is None or size >= corpus:
            return np.arange(corpus)
        rows = np.unique(self.qrels.passage_rows)
        if run is not None:
            top = self.collection.read_run(run, depth).only(self.qrels.queries)
            rows = np.union1d(rows, top.passage_rows)
        if len(rows) < size:
            others = np.setdiff1d(np.arange(corpus), rows, assume_unique=True)
            rng = np.random.default_rng(SUBSET_SEED)
            rows = np.union1d(rows, rng.choice(others, size - len(rows), replace=False))
        return rows
