"""The stages of retrieval, each a run on disk with a manifest: retrieve, fuse, rerank.

    run_dir/store/      embeddings, BM25's index, a reranker's scores (caravan.retrieval.store)
    run_dir/runs/       <stage>.<split>.trec

A stage is skipped only if its run was made from the same model, collection, candidates, settings
and versions, and the run is as it was written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifests
from caravan.data.collection import Collection, Qrels
from caravan.data.negatives import own_passages, warn_if_queries_are_passages
from caravan.data.runs import Run, canonical, read_run, write_run
from caravan.distributed import is_main_process, wait_until
from caravan.errors import InputError
from caravan.retrieval import store
from caravan.retrieval.folders import Folders

log = logging.getLogger(__name__)

Facts = dict[str, Any]
"""What making a run took: seconds end with `_s`, those that queries take with `_query_s`."""


@dataclass(frozen=True)
class Stage:
    """A run on disk."""

    name: str
    path: Path
    inputs: dict[str, Any]  # what it was made from
    facts: Facts
    digest: str  # of the run's bytes
    depth: int | None  # of the search; None: as deep as its lists are

    @property
    def seconds(self) -> float:
        return float(sum(value for key, value in self.facts.items() if key.endswith("_s")))

    @property
    def query_seconds(self) -> float:
        """What its queries took, with nothing that is done once for a collection."""
        return float(sum(value for key, value in self.facts.items() if key.endswith("_query_s")))


class Stages:
    """Makes the runs of one split of a collection.

    Args:
        collection, split: what is searched, and the judged queries that are asked.
        run_dir: where runs go.
        store: where embeddings, BM25's index and a reranker's scores lie; that of any other
            evaluation may be given.
        k: depth of the runs.
        folders: opens the models.
        ignore_identical_ids: leave the passage that has a query's id out of what it finds.
    """

    def __init__(
        self,
        collection: Collection,
        split: str,
        run_dir: Path,
        store: Path,
        k: int,
        folders: Folders,
        ignore_identical_ids: bool = False,
    ) -> None:
        self.collection = collection
        self.split = split
        self.qrels: Qrels = collection.qrels(split)
        if not len(self.qrels.queries):
            raise InputError(
                f"{collection.name}: split {split!r} judges no query; choose another data.split"
            )
        self.run_dir = run_dir
        self.store = store
        self.k = k
        self.folders = folders
        self._names: dict[str, int] = {}
        self._ignoring: dict[str, Any] = {}  # what stands in a manifest where it is set
        self._own: np.ndarray | None = None
        if ignore_identical_ids:
            self._ignoring = {"ignore_identical_ids": True}
            self._own = own_passages(collection, self.qrels.queries)
        elif is_main_process():
            warn_if_queries_are_passages(collection, self.qrels.queries)

    def bm25(self, bm25: Any, settings: dict[str, Any]) -> Stage:
        """Search with BM25.

        Args:
            bm25: `caravan.retrieval.bm25.BM25`.
            settings: what it was made with, for the manifest.
        """
        built_from = store.bm25_inputs(self.collection, settings)

        def search() -> tuple[Run, Facts]:
            started = time.monotonic()
            folder = store.place(self.store, None, "bm25", built_from)
            store.open_bm25(bm25, self.collection, folder, built_from)
            built = time.monotonic()
            queries = self.qrels.queries
            texts = [text for _, text in self.collection.queries.get(queries)]
            run = self._cut(bm25.search(texts, queries, self._depth))
            return run, {"index_s": built - started, "search_query_s": time.monotonic() - built}

        made_from = {**built_from, "k": self.k, **self._ignoring}
        return self._stage("bm25", made_from, search, self.k)

    def dense(self, model: Path, index: Any, index_settings: dict[str, Any]) -> Stage:
        """Embed corpus and queries with a model folder, index, and search.

        Args:
            index: `caravan.retrieval.index.Faiss` or `Exact`, of `index_settings`.
        """
        lengths = self.folders.lengths
        encoded_from = store.embedding_inputs(self.collection, self.folders, model)

        of_passages = {**encoded_from, "length": lengths.get("passage_length")}
        of_queries = {**encoded_from, "length": lengths.get("query_length"), "split": self.split}

        def search() -> tuple[Run, Facts] | None:
            started = time.monotonic()
            encoder = self.folders.encoder(model)
            passages = encoder.encode(
                self.collection.corpus,
                np.arange(len(self.collection.corpus)),
                "passage",
                store.place(self.store, None, "passages", encoder.inputs(of_passages)),
                of_passages,
            )
            encoded = time.monotonic()
            queries = encoder.encode(
                self.collection.queries,
                self.qrels.queries,
                "query",
                store.place(self.store, None, f"queries.{self.split}", encoder.inputs(of_queries)),
                of_queries,
            ).read()
            asked = time.monotonic()
            if not is_main_process():
                return None
            index.build(passages)
            built = time.monotonic()
            scores, rows = index.search(queries, min(self._depth, passages.rows))
            facts: Facts = {
                "encode_s": encoded - started,
                "encode_query_s": asked - encoded,
                "index_s": built - asked,
                "search_query_s": time.monotonic() - built,
                "device": str(encoder.device),
                "precision": encoder.precision,
            }
            if index.approximate:
                from caravan.retrieval.index import measured_recall

                facts["recall_against_exact"] = measured_recall(rows, queries, passages)
                log.info("recall against exact search: %.4f", facts["recall_against_exact"])
            return self._cut(Run.from_topk(self.qrels.queries, scores, rows)), facts

        made_from = {**encoded_from, **lengths, "index": index_settings, "k": self.k}
        made_from |= self._ignoring
        made_from["versions"] = manifests.versions((*manifests.LIBRARIES, "faiss-cpu"))
        return self._stage("retriever", made_from, search, self.k, together=True)

    def given(self, path: Path) -> Stage:
        """A run of any system, TREC or MS MARCO, over the queries of the split."""
        made_from = {
            "collection": self.collection.digest,
            "given": manifests.content_digest(path),
            "k": self.k,
            "versions": manifests.versions(()),
            **self._ignoring,
        }

        def search() -> tuple[Run, Facts]:
            texts = (self.collection.queries, self.collection.corpus)
            own = self._cut(read_run(path, *texts, depth=self._depth).only(self.qrels.queries))
            if not len(own):
                raise InputError(
                    f"{path} ranks none of the {self.split} queries of {self.collection.name}; give"
                    " a run over them, or choose another data.split"
                )
            missing = len(self.qrels.queries) - len(own)
            if missing:
                log.warning(
                    "%s has nothing for %d of %d queries; they count 0",
                    *(path, missing, len(self.qrels.queries)),
                )
            return own, {}

        return self._stage("run", made_from, search, depth=None)

    def fused(self, fuse: Any, settings: dict[str, Any], stages: list[Stage]) -> Stage:
        """The runs of several stages as one."""
        made_from = {
            "fuse": settings,
            "runs": [stage.digest for stage in stages],
            "k": self.k,
            "versions": manifests.versions(()),
        }

        def search() -> tuple[Run, Facts]:
            runs = [self.read(stage) for stage in stages]
            started = time.monotonic()
            return fuse(runs).top(self.k), {"fuse_query_s": time.monotonic() - started}

        known = any(stage.depth is not None for stage in stages)
        return self._stage("fused", made_from, search, self.k if known else None)

    def reranked(self, model: Path, settings: dict[str, Any], candidates: Stage) -> Stage:
        """The candidates in the order of a reranker.

        Args:
            settings: of `caravan.retrieval.rerank.Reranking`.
        """
        scorer = self.folders.scorer(model, settings)
        of_scores = {
            **self.folders.determines(model),
            "collection": self.collection.digest,
            "candidates": candidates.digest,
            "split": self.split,  # rerank.judged adds pairs of its judgements
            **{name: value for name, value in settings.items() if name not in ("weight", "rest")},
        }
        made_from = {**of_scores, **settings}

        def search() -> tuple[Run, Facts]:
            run = self.read(candidates)
            deepest = int(run.counts.max(initial=0))
            if deepest < scorer.settings.depth:
                log.warning(
                    "rerank.depth=%d, but the candidates go down to %d",
                    *(scorer.settings.depth, deepest),
                )
            started = time.monotonic()
            found = scorer.rerank(
                run,
                self.collection.queries,
                self.collection.corpus,
                store.place(self.store, None, f"scores.{self.split}", scorer.inputs(of_scores)),
                of_scores,
                self.qrels,
            )
            facts = {
                "rerank_query_s": time.monotonic() - started,
                "device": str(scorer.device),
                "precision": scorer.precision,
            }
            return found, facts

        depth = candidates.depth
        if depth is not None and scorer.settings.rest == "drop":
            depth = min(depth, scorer.settings.depth)
        return self._stage("reranked", made_from, search, depth, together=True)

    def read(self, stage: Stage, depth: int | None = None) -> Run:
        """The run of a stage, as it lies on disk."""
        if not stage.path.stat().st_size:  # no query has a hit, which is a result and no mistake
            nothing = np.full((2, len(self.qrels.queries), 1), -1, dtype=np.int64)
            return Run.from_topk(self.qrels.queries, *nothing)
        return read_run(stage.path, self.collection.queries, self.collection.corpus, depth=depth)

    @property
    def _depth(self) -> int:
        """How deep to search for runs of depth k."""
        return self.k if self._own is None else self.k + 1

    def _cut(self, run: Run) -> Run:
        """What was found at that depth, at depth k."""
        if self._own is None:
            return run
        return run.without(self.qrels.queries, self._own).top(self.k)

    def _stage(
        self,
        name: str,
        made_from: dict[str, Any],
        search: Callable[[], tuple[Run, Facts] | None],
        depth: int | None,
        together: bool = False,
    ) -> Stage:
        """Write the run, unless it is there from the same inputs.

        Args:
            depth: of the search; None where the lists of a run are all that is known.
            together: several processes take part in the search; else rank 0 alone.
        """
        number = self._names[name] = self._names.get(name, 0) + 1
        name = name if number == 1 else f"{name}-{number}"
        path = self.run_dir / "runs" / f"{name}.{self.split}.trec"
        inputs = {**made_from, "split": self.split}
        digest = _made_before(path, inputs)
        if digest is not None:
            log.info(
                "%s is there already, from the same model, collection, settings and versions", path
            )
        elif not is_main_process():
            if together:
                search()
            wait_until(lambda: _made_before(path, inputs, warn=False) is not None)
            digest = _made_before(path, inputs)
            assert digest is not None  # just waited for
        else:
            if manifests.read(path) is not None and (lines := manifests.differences(path, inputs)):
                log.info("%s is made again; it differs in %s", path, "; ".join(lines[:3]))
            manifests.remove(path)
            found = search()
            assert found is not None
            run, facts = found
            run = canonical(run, self.collection.corpus)
            write_run(path, run, self.collection.queries, self.collection.corpus)
            digest = manifests.content_digest(path)
            manifests.write(path, inputs, {**facts, "run_xxh3": digest})
        facts = (manifests.read(path) or {}).get("facts", {})
        return Stage(name, path, inputs, facts, digest, depth)


def _made_before(path: Path, inputs: dict[str, Any], warn: bool = True) -> str | None:
    """The digest of a run that is there from these inputs, as it was written, else None."""
    if not manifests.matches(path, inputs):
        return None
    digest = manifests.content_digest(path)
    if (manifests.read(path) or {}).get("facts", {}).get("run_xxh3") == digest:
        return digest
    if warn:
        log.warning("%s is not as it was written; it is made again", path)
    return None
