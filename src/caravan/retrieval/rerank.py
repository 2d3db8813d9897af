"""Candidates to a better order: a reranker scores each pair of query and passage once.

RankLLaMA (arXiv 2310.08319, section 2.2) reads the retriever's top 200. Pairs of all queries are
cut into blocks; a block is packed by length over all its queries and its scores are written before
the next is begun, so memory is that of one block and a killed run goes on at the block it was in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caravan.data.batching import PairBlocks
from caravan.data.collection import Qrels
from caravan.data.loaders import text_loader
from caravan.data.pairs import PairTemplates
from caravan.data.runs import Run
from caravan.data.segments import Segments
from caravan.data.texts import Texts
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.models import folder as model_folder
from caravan.models import hardware
from caravan.models.cpu import pack_linears
from caravan.models.crossencoder import CrossEncoder
from caravan.models.positions import refuse_too_long
from caravan.progress import progress
from caravan.retrieval.fusion import Weighted
from caravan.retrieval.shards import fill

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reranking:
    """How candidates are reranked.

    Attributes:
        depth: candidates of each query, from the top.
        weight: of the reranker in the final score; what is left to 1 is the candidates' own, both
            from 0 to 1 for each query. 1 takes the reranker's score as it is.
        rest: what becomes of those below: "drop" them, or "keep" them below in their old order.
        judged: score the judged passages of each query too, for a run that teaches.
        block: pairs that are written at once; a killed run goes on at the last one.
        query_length, passage_length: tokens, in place of the model's own.
        segment: None reads a document whole, as far as the length goes; "first" and "best" read
            segments of it, and give it the score of that one.
        segment_words: of a segment.
    """

    depth: int = 100
    weight: float = 1.0
    rest: str = "drop"
    judged: bool = False
    block: int = 2048
    query_length: int | None = None
    passage_length: int | None = None
    segment: str | None = None
    segment_words: int = 150

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise InputError(f"rerank.weight is {self.weight}; it must be above 0, and at most 1")
        if self.rest not in ("drop", "keep"):
            raise InputError(f"rerank.rest is {self.rest!r}; it must be drop or keep")
        if self.segment not in (None, "first", "best"):
            raise InputError(f"rerank.segment is {self.segment!r}; it must be null, first or best")

    @property
    def lengths(self) -> dict[str, int]:
        given = {"query_length": self.query_length, "passage_length": self.passage_length}
        return {name: length for name, length in given.items() if length is not None}


class Scorer:
    """A reranker's folder that scores; it brings its own templates and lengths.

    Args:
        folder: of a reranker. Its weights load when the first pair that is not on disk comes.
        precision: "auto", "bf16" or "float32".
        token_budget: padded tokens a chunk; None leaves them to the machine.
        num_workers: processes that tokenise ahead.
        attention, trust_remote_code: as in `caravan.models.folder.load`.
    """

    def __init__(
        self,
        folder: Path,
        settings: Reranking,
        precision: str = "auto",
        token_budget: int | None = None,
        num_workers: int = 1,
        attention: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.precision = hardware.resolve(precision)
        self.token_budget = hardware.chunk(token_budget)
        self.num_workers = num_workers
        self.how: dict[str, Any] = {
            "attention": attention,
            "trust_remote_code": trust_remote_code,
        }
        self.device = hardware.device()
        encoding = read_encoding(folder)[0]
        if encoding.kind != "reranker":
            raise InputError(f"{folder} is a {encoding.kind}; give the folder of a reranker")
        self.encoding = replace(encoding, **settings.lengths)  # type: ignore[arg-type]

    @cached_property
    def loaded(self) -> tuple[CrossEncoder, PairTemplates]:
        dtype = hardware.dtype(self.precision)
        model, tokenizer, _, _ = model_folder.load(self.folder, dtype, "reranker", **self.how)
        if self.device.type == "cpu":
            pack_linears(model)
        section = "rerank" if self.settings.lengths else "encoding"
        refuse_too_long(model.transformer, self.encoding, f"{section}.")
        return model.to(self.device), PairTemplates(tokenizer, self.encoding, section)

    def inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """The inputs in the manifest of scores, of those that `scores` is given."""
        return {**given, "resolved_precision": self.precision}

    def rerank(
        self,
        candidates: Run,
        queries: Texts,
        corpus: Texts,
        to: Path | None = None,
        inputs: dict[str, Any] | None = None,
        qrels: Qrels | None = None,
    ) -> Run:
        """The candidates in the reranker's order.

        Args:
            to: where scores lie, block by block; None keeps them in memory, for a question or two.
            inputs: digests and settings that determine the scores.
            qrels: whose judged passages are scored too (`Reranking.judged`).
        """
        top = candidates.top(self.settings.depth)
        query_rows = np.repeat(top.query_rows, top.counts)
        passage_rows = top.passage_rows
        if self.settings.judged and qrels is not None:
            query_rows, passage_rows = _with_judged(query_rows, passage_rows, qrels, len(corpus))
        scores = self.scores(query_rows, passage_rows, queries, corpus, to, inputs)
        run = Run.from_flat(query_rows, passage_rows, scores, all_queries=candidates.query_rows)
        if self.settings.weight < 1:
            run = Weighted([self.settings.weight, 1 - self.settings.weight])([run, top])
        return run if self.settings.rest == "drop" else _with_rest(run, candidates, len(corpus))

    def scores(
        self,
        query_rows: np.ndarray,
        passage_rows: np.ndarray,
        queries: Texts,
        corpus: Any,
        to: Path | None = None,
        inputs: dict[str, Any] | None = None,
    ) -> np.ndarray:
        """Scores [N] float32 of pairs, each scored once; resumed where a killed start was."""
        counts = None
        if self.settings.segment is not None and len(passage_rows):
            corpus = Segments(corpus, passage_rows, self.settings.segment_words)
            segments, counts = corpus.of(passage_rows)
            if self.settings.segment == "first":
                segments, counts = segments[np.cumsum(counts) - counts], None
                passage_rows = segments
            else:
                query_rows, passage_rows = np.repeat(query_rows, counts), segments
        blocks = -(-len(query_rows) // self.settings.block)

        def compute(missing: list[int]) -> Iterator[np.ndarray]:
            block = self.settings.block
            left = sum(len(query_rows[i * block :][:block]) for i in missing)
            log.info(
                "rerank %s pairs with %s on %s, %s",
                *(f"{left:,}", self.folder, hardware.named(self.device), self.precision),
            )
            model, templates = self.loaded
            pairs = PairBlocks(
                *(queries, corpus, query_rows, passage_rows, templates),
                block,
                self.token_budget,
            )
            with progress("rerank", left, "pairs") as done, torch.inference_mode():
                for batch in text_loader(pairs, missing, self.num_workers):
                    packed = batch.pairs.to(self.device, non_blocking=True)
                    yield packed.rows_of(model.of, done).cpu().numpy()

        if to is None:
            parts = list(compute(list(range(blocks))))
        else:
            files = fill(to, self.inputs(inputs or {}), blocks, compute)
            parts = [files.read(number) for number in range(blocks)]
        scores = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
        if wrong := int((~np.isfinite(scores)).sum()):
            raise InputError(
                f"{self.folder} gives scores that are NaN or infinite, {wrong} of"
                f" {len(scores)}; its training has diverged: train it again"
            )
        if counts is None:
            return scores
        return np.maximum.reduceat(scores, np.cumsum(counts) - counts)


def _with_judged(
    query_rows: np.ndarray, passage_rows: np.ndarray, qrels: Qrels, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs, and those judged pairs that are not among them."""
    pairs = query_rows * size + passage_rows
    judged = np.unique(qrels.query_rows * size + qrels.passage_rows)
    more = judged[~np.isin(judged, pairs)]
    return np.concatenate((query_rows, more // size)), np.concatenate((passage_rows, more % size))


def _with_rest(run: Run, candidates: Run, size: int) -> Run:
    """The run, and below it each query's other candidates in the order that they had."""
    old_queries = np.repeat(candidates.query_rows, candidates.counts)
    ranked = np.repeat(run.query_rows, run.counts)
    rest = ~np.isin(old_queries * size + candidates.passage_rows, ranked * size + run.passage_rows)
    query_rows, passage_rows = old_queries[rest], candidates.passage_rows[rest]
    lowest = dict(zip(run.query_rows.tolist(), _lowest(run).tolist(), strict=True))
    first = np.searchsorted(query_rows, query_rows)
    below = np.arange(len(query_rows)) - first + 1
    scores = np.array([lowest[row] for row in query_rows.tolist()], dtype=np.float64) - below
    return Run.from_flat(
        np.concatenate((ranked, query_rows)),
        np.concatenate((run.passage_rows, passage_rows)),
        np.concatenate((run.scores, scores)),
        run.tag,
        all_queries=run.query_rows,
    )


def _lowest(run: Run) -> np.ndarray:
    """The lowest score of each query, [Q]; 0 for one without a passage."""
    lowest = np.zeros(len(run))
    some = run.counts > 0
    lowest[some] = run.scores[run.offsets[1:][some] - 1]
    return lowest
