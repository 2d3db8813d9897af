"""The stages of an evaluation: retrieve, fuse, rerank. Each writes a run with a manifest.

    run_dir/store/      embeddings, BM25's index, a reranker's scores (caravan.retrieval.store)
    run_dir/runs/       <stage>.<split>.trec

A stage is skipped if its run was made from the same inputs (`caravan.retrieval.store`) and has not
changed since it was written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifests
from caravan.data.collection import Collection, Qrels, own_passages, warn_if_queries_are_passages
from caravan.data.runs import Run, canonical, read_run, write_run
from caravan.data.tokenization import instruction_for
from caravan.distributed import is_main_process
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.retrieval import peers
from caravan.retrieval.bm25 import index_inputs, open_index
from caravan.retrieval.exact import Exact, found, merged
from caravan.retrieval.index import Found
from caravan.retrieval.inference import Models
from caravan.retrieval.rerank import Reranker
from caravan.retrieval.segments import measured_recall
from caravan.retrieval.store import Embeddings, Store
from caravan.retrieval.systems import Systems, encode_corpus, encode_queries

log = logging.getLogger(__name__)

PART = 1 << 18
"""Passages, about, of a part of the corpus in exact search: the work of one process at a time."""

Facts = dict[str, Any]
"""How a run was computed. Keys ending in `_s` are seconds, in `_query_s` seconds on queries."""


@dataclass(frozen=True)
class Ranking:
    """The run of a stage, on disk."""

    name: str
    path: Path
    inputs: dict[str, Any]  # all that determines the run
    facts: Facts
    digest: str  # of the run's bytes
    depth: int | None  # of the search; None: unknown, only the lists are given

    def seconds(self, suffix: str = "_s") -> float:
        """Seconds of the stage, or with the suffix `_query_s` those spent on queries."""
        return float(sum(value for key, value in self.facts.items() if key.endswith(suffix)))


class Stages:
    """Computes the rankings for one split of a collection; arguments as in `Evaluation`.

    Raises:
        InputError: If the split has no judged query.
    """

    def __init__(
        self,
        collection: Collection,
        split: str,
        run_dir: Path,
        store: Store,
        systems: Systems,
        models: Models,
        ignore_identical_ids: bool = False,
    ) -> None:
        self.collection, self.split, self.run_dir = collection, split, run_dir
        self.store, self.systems, self.models = store, systems, models
        self.k = systems.k
        self.qrels: Qrels = collection.qrels(split)
        if not len(self.qrels.queries):
            raise InputError(
                "empty-split",
                f"{collection.name}: split {split!r} has no judged query; set another data.split",
            )
        self._names: dict[str, int] = {}
        self._ignoring: dict[str, Any] = {}  # recorded in manifests only if set
        self._own: np.ndarray | None = None
        if ignore_identical_ids:
            self._ignoring = {"ignore_identical_ids": True}
            self._own = own_passages(collection, self.qrels.queries)
        elif is_main_process():
            warn_if_queries_are_passages(collection, self.qrels.queries)
        self._depth = self.k if self._own is None else self.k + 1  # own passages are dropped

    def bm25(self) -> Ranking:
        """Search with BM25."""
        settings = self.systems.bm25.settings

        def search() -> tuple[Run, Facts]:
            started = time.monotonic()
            bm25 = self.systems.bm25.make()
            open_index(bm25, settings, self.collection, self.store)
            built = time.monotonic()
            rows = self.qrels.queries
            texts = [text for _, text in self.collection.queries.get(rows)]
            run = self._cut(bm25.search(texts, rows, self._depth))
            return run, {"index_s": built - started, "search_query_s": time.monotonic() - built}

        inputs = {**index_inputs(self.collection, settings), "k": self.k, **self._ignoring}
        return self._ranking("bm25", inputs, search, self.k)

    def dense(self, folder: Path) -> Ranking:
        """Embed corpus and queries with a model folder, build the index and search."""
        reading, model_inputs = self.systems.reading, self.models.inputs(folder)

        def search() -> tuple[Run, Facts] | None:
            times = [time.monotonic()]
            model = self.models.open(folder, "retriever", self.systems.overrides)
            product = (model, model_inputs, self.systems, self.collection, self.store)
            passages, segments = encode_corpus(*product)
            times.append(time.monotonic())
            queries = encode_queries(*product, self.split)
            times.append(time.monotonic())
            index = self.systems.make_index(segments)
            parts = passages.parts(PART) if isinstance(index, Exact) else []
            if len(parts) < 2 and not is_main_process():
                return None
            index.build(passages)
            size = index.bytes_per_vector
            if size is not None:
                log.info(f"index of {passages.rows:,} vectors, {size:,} bytes each")
            times.append(time.monotonic())
            depth = min(self._depth, len(self.collection.corpus))
            if isinstance(index, Exact) and len(parts) > 1:
                scores, rows = self._search_parts(index, queries, parts, depth, inputs)
                if not is_main_process():
                    return None
            else:
                scores, rows = index.search(queries, depth)
            times.append(time.monotonic())
            names = ("encode_s", "encode_query_s", "index_s", "search_query_s")
            facts: Facts = dict(zip(names, np.diff(times).tolist(), strict=True))
            facts |= {"device": str(model.device), "precision": model.precision}
            facts |= {"dim": passages.dim, "bytes_per_vector": size}
            if index.approximate:
                facts["recall_against_exact"] = measured_recall(rows, queries, passages, segments)
                log.info("recall against exact search: %.4f", facts["recall_against_exact"])
            return self._cut(Run.from_topk(self.qrels.queries, scores, rows)), facts

        inputs = {
            **model_inputs,
            **instruction_for(read_encoding(folder)[0], self.collection.name),
            **self.systems.overrides,
            **reading.segments,
            "collection": self.collection.digest,
            "block": self.systems.block,
            "index": self.systems.index.settings,
            "k": self.k,
            "versions": manifests.versions((*manifests.LIBRARIES, "faiss-cpu")),
            **self._ignoring,
        }
        return self._ranking("retriever", inputs, search, self.k, together=True)

    def _search_parts(
        self,
        index: Exact,
        queries: np.ndarray,
        parts: Sequence[Embeddings],
        depth: int,
        inputs: dict[str, Any],
    ) -> Found:
        """Search parts of the corpus, each process its share; a killed search resumes."""

        product = {**inputs, "split": self.split, "part": PART}

        def compute(numbers: list[int]) -> Iterator[np.ndarray]:
            return (index.keys(queries, parts[number], depth) for number in numbers)

        return found(merged(self.store.shards("found", product, len(parts), compute)))

    def given(self, path: Path) -> Ranking:
        """Read a run file (TREC or MS MARCO) of any system, limited to the split's queries."""
        inputs = {
            "collection": self.collection.digest,
            "given": manifests.content_digest(path),
            "k": self.k,
            "versions": manifests.versions(()),
            **self._ignoring,
        }

        def search() -> tuple[Run, Facts]:
            texts = (self.collection.queries, self.collection.corpus)
            run = self._cut(read_run(path, *texts, depth=self._depth).only(self.qrels.queries))
            if not len(run):
                raise InputError(
                    "run-of-other-queries",
                    f"{path} ranks none of the {self.split} queries of {self.collection.name}; use"
                    " a run over these queries or choose another data.split",
                )
            if missing := len(self.qrels.queries) - len(run):
                number = len(self.qrels.queries)
                log.warning(f"{path} lacks {missing} of {number} queries; they score 0")
            return run, {}

        return self._ranking("run", inputs, search, depth=None)

    def fused(self, rankings: Sequence[Ranking]) -> Ranking:
        """Fuse several rankings into one."""
        inputs = {
            "fuse": self.systems.fuse.settings,
            "runs": [ranking.digest for ranking in rankings],
            "k": self.k,
            "versions": manifests.versions(()),
        }

        def search() -> tuple[Run, Facts]:
            runs = [self.read(ranking) for ranking in rankings]
            started = time.monotonic()
            fused = self.systems.fuse.make()(runs).top(self.k)
            return fused, {"fuse_query_s": time.monotonic() - started}

        known = any(ranking.depth is not None for ranking in rankings)
        return self._ranking("fused", inputs, search, self.k if known else None)

    def reranked(self, folder: Path, candidates: Ranking) -> Ranking:
        """Rerank the candidates with a model folder."""
        settings = self.systems.rerank
        values = asdict(settings)
        model = self.models.open(folder, "reranker", settings.lengths)
        own = instruction_for(model.encoding, self.collection.name)
        scored_from = {
            **self.models.inputs(folder),
            **own,
            "collection": self.collection.digest,
            "candidates": candidates.digest,
            "split": self.split,  # rerank.judged adds its judged pairs
            **{name: value for name, value in values.items() if name not in ("weight", "rest")},
        }

        def search() -> tuple[Run, Facts]:
            run = self.read(candidates)
            deepest = int(run.counts.max(initial=0))
            if deepest < settings.depth:
                log.warning(f"rerank.depth={settings.depth}, but the run has depth {deepest}")
            started = time.monotonic()
            product = {**scored_from, "resolved_precision": model.precision}
            save = partial(self.store.shards, f"scores.{self.split}", product)
            texts = (self.collection.queries, self.collection.corpus)
            reranked = Reranker(model, settings, **own).rerank(run, *texts, save, self.qrels)
            facts = {"rerank_query_s": time.monotonic() - started}
            return reranked, {**facts, "device": str(model.device), "precision": model.precision}

        depth = candidates.depth
        if depth is not None and settings.rest == "drop":
            depth = min(depth, settings.depth)
        return self._ranking("reranked", {**scored_from, **values}, search, depth, together=True)

    def read(self, ranking: Ranking, depth: int | None = None) -> Run:
        """Read the run of a ranking."""
        if not ranking.path.stat().st_size:  # an empty run is a valid result
            nothing = np.full((2, len(self.qrels.queries), 1), -1, dtype=np.int64)
            return Run.from_topk(self.qrels.queries, *nothing)
        return read_run(ranking.path, self.collection.queries, self.collection.corpus, depth=depth)

    def _cut(self, run: Run) -> Run:
        """Drop own passages from a run of depth `_depth` and cut it to depth k."""
        if self._own is None:
            return run
        return run.without(self.qrels.queries, self._own).top(self.k)

    def _ranking(
        self,
        name: str,
        inputs: dict[str, Any],
        search: Callable[[], tuple[Run, Facts] | None],
        depth: int | None,
        together: bool = False,
    ) -> Ranking:
        """Write the run unless one from the same inputs exists.

        Args:
            depth: search depth; None if only the lists of a run are known.
            together: all processes take part in the search; otherwise only rank 0 does.
        """
        number = self._names[name] = self._names.get(name, 0) + 1
        name = name if number == 1 else f"{name}-{number}"
        path = self.run_dir / "runs" / f"{name}.{self.split}.trec"
        inputs = {**inputs, "split": self.split}
        digest = _finished_digest(path, inputs)
        if digest is not None:
            log.info("%s exists, from the same model, collection, settings and versions", path)
        elif is_main_process():
            if manifests.read(path) is not None and (lines := manifests.differences(path, inputs)):
                log.info("recomputing %s, which differs in %s", path, "; ".join(lines[:3]))
            manifests.remove(path)
            found = search()
            assert found is not None  # None only on other ranks
            run, facts = canonical(found[0], self.collection.corpus), found[1]
            write_run(path, run, self.collection.queries, self.collection.corpus)
            digest = manifests.content_digest(path)
            manifests.write(path, inputs, {**facts, "run_xxh3": digest})
        elif together:
            search()
        # Also if the run exists: rank 0 may have finished it before the others looked.
        peers.meet(lambda: _finished_digest(path, inputs, warn=False) is not None, path)
        digest = digest or _finished_digest(path, inputs) or ""
        return Ranking(name, path, inputs, manifests.facts(path), digest, depth)


def _finished_digest(path: Path, inputs: dict[str, Any], warn: bool = True) -> str | None:
    """The digest of a run made from these inputs and unchanged since; otherwise None."""
    if not manifests.matches(path, inputs):
        return None
    digest = manifests.content_digest(path)
    if manifests.facts(path).get("run_xxh3") == digest:
        return digest
    if warn:
        log.warning("%s has changed since it was written; it is made again", path)
    return None
