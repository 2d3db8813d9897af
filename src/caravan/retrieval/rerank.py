"""Reranking: score each (query, passage) pair of a run with a cross-encoder, and sort by score.

RankLLaMA (arXiv 2310.08319, section 2.2) reranks the retriever's top 200. The pairs of all queries
are split into blocks, which are sorted by length and written one after the other, so memory holds
one block and an interrupted run resumes there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from caravan.data.collection import Qrels
from caravan.data.runs import Run
from caravan.data.segments import Reading, cut
from caravan.retrieval.fusion import Weighted
from caravan.retrieval.inference import Inference
from caravan.retrieval.store import Save


@dataclass(frozen=True)
class Reranking(Reading):
    """Settings of reranking; those of how pairs are read are in `Reading`.

    Attributes:
        depth: candidates per query, from the top.
        weight: weight of the reranker's score; the first-stage score has weight 1 - `weight`. With
            weight 1 the reranker's score is used as it is.
        normalise: how both are scaled before they are added, see
            `caravan.retrieval.fusion.Weighted`.
        rest: "drop" candidates ranked below `depth`, or "keep" them at the end in their old order.
        judged: also score the judged passages of each query, for a run used as a teacher.
        block: pairs per block.
    """

    depth: int = 100
    weight: float = 1.0
    normalise: Literal["minmax", "zscore", "none"] = "minmax"
    rest: Literal["drop", "keep"] = "drop"
    judged: bool = False
    block: int = 2048


class Reranker:
    """Reranks runs with a cross-encoder, opened with `settings.lengths`.

    `instruction` is that of the collection; None for that of the model.
    """

    def __init__(
        self, model: Inference, settings: Reranking, instruction: str | None = None
    ) -> None:
        self.model = model
        self.settings, self.instruction = settings, instruction

    def rerank(
        self,
        candidates: Run,
        queries: Any,
        corpus: Any,
        save: Save | None = None,
        qrels: Qrels | None = None,
    ) -> Run:
        """Return the candidates sorted by the reranker.

        Args:
            queries, corpus: `caravan.data.texts.Texts`.
            save: writes the scores to disk; None keeps them in memory.
            qrels: the judgements for `settings.judged`.
        """
        top = candidates.top(self.settings.depth)
        query_rows = np.repeat(top.query_rows, top.counts)
        passage_rows = top.passage_rows
        if self.settings.judged and qrels is not None:
            query_rows, passage_rows = _with_judged(query_rows, passage_rows, qrels, len(corpus))
        scores = self.scores(query_rows, passage_rows, queries, corpus, save)
        run = Run.from_flat(query_rows, passage_rows, scores, all_queries=candidates.query_rows)
        if self.settings.weight < 1:
            weights = [self.settings.weight, 1 - self.settings.weight]
            run = Weighted(weights, self.settings.normalise)([run, top])
        return run if self.settings.rest == "drop" else _with_rest(run, candidates, len(corpus))

    def scores(
        self,
        query_rows: np.ndarray,
        passage_rows: np.ndarray,
        queries: Any,
        corpus: Any,
        save: Save | None = None,
    ) -> np.ndarray:
        """Scores [N] float32 of pairs; arguments as in `rerank`."""
        read = cut(corpus, passage_rows, self.settings)
        query_rows, block = read.repeated(query_rows), self.settings.block
        count = -(-len(query_rows) // block)
        pairs = (queries, read.texts, query_rows, read.rows)
        compute = self.model.score_rows(*pairs, block, self.instruction)
        blocks = compute(list(range(count))) if save is None else save(count, compute)
        return read.best(np.concatenate([np.empty(0, dtype=np.float32), *blocks]))


def _with_judged(
    query_rows: np.ndarray, passage_rows: np.ndarray, qrels: Qrels, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Append the judged pairs that are missing."""
    pairs = query_rows * size + passage_rows
    judged = np.unique(qrels.query_rows * size + qrels.passage_rows)
    more = judged[~np.isin(judged, pairs)]
    return np.concatenate((query_rows, more // size)), np.concatenate((passage_rows, more % size))


def _with_rest(run: Run, candidates: Run, size: int) -> Run:
    """Append the other candidates of each query to the run, in their old order."""
    old_queries = np.repeat(candidates.query_rows, candidates.counts)
    ranked = np.repeat(run.query_rows, run.counts)
    rest = ~np.isin(old_queries * size + candidates.passage_rows, ranked * size + run.passage_rows)
    query_rows = old_queries[rest]
    lowest = {row: [0.0, *run.of(row)[1]][-1] for row in set(query_rows.tolist())}
    below = np.arange(len(query_rows)) - np.searchsorted(query_rows, query_rows) + 1
    scores = np.array([lowest[row] for row in query_rows.tolist()], dtype=np.float64) - below
    return Run.from_flat(
        np.concatenate((ranked, query_rows)),
        np.concatenate((run.passage_rows, candidates.passage_rows[rest])),
        np.concatenate((run.scores, scores)),
        run.tag,
        all_queries=run.query_rows,
    )
