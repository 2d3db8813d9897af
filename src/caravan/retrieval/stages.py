"""The stages of an evaluation: retrieve, fuse, rerank. Each writes a run with a manifest.

    run_dir/store/      embeddings, BM25's index, a reranker's scores (caravan.retrieval.store)
    run_dir/runs/       <stage>.<split>.trec

A run is reused if its manifest records equal inputs (`caravan.manifests`) and its bytes have not
changed. Inputs are the digests of the model, the collection and the candidates, the settings of the
search, fusion or reranking, the split, precision, token budget, attention, and library versions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
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
from caravan.errors import InputError
from caravan.retrieval import peers
from caravan.retrieval.bm25 import index_inputs, open_index
from caravan.retrieval.exact import Exact, measured_recall
from caravan.retrieval.inference import Models
from caravan.retrieval.rerank import Reranker
from caravan.retrieval.store import Store
from caravan.retrieval.systems import Dense, Systems

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
    depth: int | None  # of the search; None: unknown, only the lists are given

    @property
    def digest(self) -> str:
        """The digest of the run's bytes."""
        return str(self.facts["run_xxh3"])

    def seconds(self, suffix: str = "_s") -> float:
        """Seconds of the stage, or with the suffix `_query_s` those spent on queries."""
        return float(sum(value for key, value in self.facts.items() if key.endswith(suffix)))


class Stages:
    """Computes the rankings for one split of a collection.

    Args:
        collection, split: the collection and its judged queries.
        run_dir: where the runs are written.
        store: for embeddings, BM25's index and reranker scores; evaluations may share it.
        models: opens the model folders; evaluations may share it.
        ignore_identical_ids: drop the passage that has the query's id from each result.

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
        self.texts, self.k = (collection.queries, collection.corpus), systems.k
        self.qrels: Qrels = collection.qrels(split)
        if not len(self.qrels.queries):
            raise InputError(
                "empty-split",
                f"{collection.name}: split {split!r} has no judged query; set another data.split",
            )
        self.ignore_identical_ids = ignore_identical_ids
        # Recorded in manifests only if set.
        self._ignoring = {"ignore_identical_ids": True} if ignore_identical_ids else {}
        self._own: np.ndarray | None = None
        if ignore_identical_ids:
            self._own = own_passages(collection, self.qrels.queries)
        elif is_main_process():
            warn_if_queries_are_passages(collection, self.qrels.queries)
        self._depth = self.k if self._own is None else self.k + 1  # own passages are dropped

    def bm25(self, name: str) -> Ranking:
        """Search with BM25; `name` is that of the stage."""
        settings = self.systems.settings["bm25"]

        def search() -> tuple[Run, Facts]:
            started = time.monotonic()
            bm25 = open_index(self.systems.make("bm25"), settings, self.collection, self.store)
            built = time.monotonic()
            rows = self.qrels.queries
            texts = [text for _, text in self.collection.queries.get(rows)]
            run = self._cut(bm25.search(texts, rows, self._depth))
            return run, {"index_s": built - started, "search_query_s": time.monotonic() - built}

        inputs = {**index_inputs(self.collection, settings), "k": self.k, **self._ignoring}
        return self._ranking(name, inputs, search, self.k)

    def dense(self, name: str, folder: Path) -> Ranking:
        """Embed corpus and queries with a model folder, build the index and search."""
        model = self.models.open(folder, "retriever", self.systems.overrides)
        dense = Dense(model, self.models, self.systems, self.collection, self.store)

        def search() -> tuple[Run, Facts] | None:
            times = [time.monotonic()]
            passages, segments = dense.passages()
            times.append(time.monotonic())
            queries = dense.queries(self.split)
            times.append(time.monotonic())
            index = self.systems.make_index(segments)
            parts = passages.parts(PART) if isinstance(index, Exact) else [passages]
            if len(parts) < 2 and not is_main_process():
                return None
            index.build(passages)
            times.append(time.monotonic())
            depth = min(self._depth, len(self.collection.corpus))
            if isinstance(index, Exact) and len(parts) > 1:
                product = {**inputs, "split": self.split, "part": PART}
                save = partial(self.store.shards, "found", product)
                scores, rows = index.search_parts(queries, parts, depth, save)
            else:
                scores, rows = index.search(queries, depth)
            times.append(time.monotonic())
            names = ("encode_s", "encode_query_s", "index_s", "search_query_s")
            facts: Facts = dict(zip(names, np.diff(times).tolist(), strict=True))
            facts |= {"device": str(model.device), "precision": model.precision}
            facts |= {"dim": passages.dim, "bytes_per_vector": index.bytes_per_vector}
            if index.approximate:
                facts["recall_against_exact"] = measured_recall(rows, queries, passages, segments)
                log.info("recall against exact search: %.4f", facts["recall_against_exact"])
            return self._cut(Run.from_topk(self.qrels.queries, scores, rows)), facts

        inputs = {
            **dense.inputs,
            **dense.instruction,
            **self.systems.overrides,
            **self.systems.reading.segments,
            "index": self.systems.settings["index"],
            "k": self.k,
            "versions": manifests.versions((*manifests.LIBRARIES, "faiss-cpu")),
            **self._ignoring,
        }
        return self._ranking(name, inputs, search, self.k, together=True)

    def given(self, name: str, path: Path) -> Ranking:
        """Read a run file (TREC or MS MARCO) of any system, limited to the split's queries."""
        if not path.is_file():
            text = f"retriever={path}: no model folder or run file has this path"
            raise InputError("file-not-found", text)
        inputs = {
            "collection": self.collection.digest,
            "given": manifests.content_digest(path),
            "k": self.k,
            "versions": manifests.versions(()),
            **self._ignoring,
        }

        def search() -> tuple[Run, Facts]:
            run = read_run(path, *self.texts, depth=self._depth).only(self.qrels.queries)
            if not len(run):
                raise InputError(
                    "run-of-other-queries",
                    f"{path} ranks none of the {self.split} queries of {self.collection.name}; use"
                    " a run over these queries or choose another data.split",
                )
            return self._cut(run), {}

        return self._ranking(name, inputs, search, depth=None)

    def fused(self, rankings: Sequence[Ranking]) -> Ranking:
        """Fuse several rankings into one."""
        inputs = {
            "fuse": self.systems.settings["fuse"],
            "runs": [ranking.digest for ranking in rankings],
            "k": self.k,
            "versions": manifests.versions(()),
        }

        def search() -> tuple[Run, Facts]:
            runs = [self.read(ranking) for ranking in rankings]
            started = time.monotonic()
            fused = self.systems.make("fuse")(runs).top(self.k)
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
            started = time.monotonic()
            product = {**scored_from, "resolved_precision": model.precision}
            save = partial(self.store.shards, f"scores.{self.split}", product)
            reranker = Reranker(model, settings, **own)
            reranked = reranker.rerank(run, *self.texts, save, self.qrels)
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
        return read_run(ranking.path, *self.texts, depth=depth)

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
        path = self.run_dir / "runs" / f"{name}.{self.split}.trec"
        inputs = {**inputs, "split": self.split}
        if is_finished(path, inputs, "run_xxh3"):
            log.info("%s exists, from the same model, collection, settings and versions", path)
        elif is_main_process():
            if manifests.read(path) is not None and (lines := manifests.differences(path, inputs)):
                log.info("recomputing %s, which differs in %s", path, "; ".join(lines[:3]))
            manifests.remove(path)
            found = search()
            assert found is not None  # None only on other ranks
            run, facts = canonical(found[0], self.collection.corpus), found[1]
            write_run(path, run, *self.texts)
            facts["run_xxh3"] = manifests.content_digest(path)
            manifests.write(path, inputs, facts)
        elif together:
            search()
        # Also if the run exists: rank 0 may have finished it before the others looked.
        peers.barrier(lambda: is_finished(path, inputs, "run_xxh3", warn=False), path)
        return Ranking(name, path, inputs, manifests.facts(path), depth)


def is_finished(path: Path, inputs: dict[str, Any], digest: str, warn: bool = True) -> bool:
    """Whether a file was made from these inputs and has not changed since.

    Args:
        digest: the fact in its manifest that is the digest of its content.
    """
    if not manifests.matches(path, inputs):
        return False
    unchanged: bool = manifests.facts(path).get(digest) == manifests.content_digest(path)
    if warn and not unchanged:
        log.warning("%s has changed since it was written; it is made again", path)
    return unchanged
