"""The stages of an evaluation: encode, index, search, score; each a file with a manifest.

    python evaluate.py retriever=<model folder>|bm25 data=beir data.path=<folder> run_dir=<dir>

    run_dir/config.yaml what was asked, resolved
    run_dir/store/      embeddings, or BM25's index
    run_dir/runs/       <system>.<split>.trec, the run
    run_dir/metrics.json

A stage is skipped only when the digests of model, collection and settings are those it was made
from. Mining hard negatives is this over the training queries (`data.split=train`).
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifest
from caravan.config import build
from caravan.contract import folder_digest, read_contract
from caravan.data.collection import Collection, Qrels
from caravan.data.runs import Run, canonical, read_run, write_run
from caravan.errors import InputError

log = logging.getLogger(__name__)


class Evaluation:
    """One system on one split of a collection.

    Args:
        collection, split: what is searched, and the judged queries that are asked.
        run_dir: where run and figures go.
        store: where embeddings or BM25's index lie; another evaluation's may be given.
        k: depth of the run.
        measures: names such as "nDCG@10".
    """

    def __init__(
        self,
        collection: Collection,
        split: str,
        run_dir: Path,
        store: Path,
        k: int,
        measures: list[str],
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
        self.measures = measures

    def bm25(self, bm25: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Search with BM25.

        Args:
            bm25: `caravan.retrieval.lexical.BM25`.
            settings: what it was made with, for the manifest.
        """
        built_from = {"collection": self.collection.digest, "bm25": settings}

        def search() -> tuple[Run, dict[str, Any]]:
            folder = self.store / "bm25"
            started = time.monotonic()
            if not manifest.matches(folder, built_from):
                manifest.remove(folder)
                bm25.build(self.collection.corpus, folder)
                manifest.write(folder, built_from)
            else:
                bm25.open(self.collection.corpus, folder)
            built = time.monotonic()
            queries = self.qrels.queries
            texts = [text for _, text in self.collection.queries.get(queries)]
            run = bm25.search(texts, queries, self.k)
            return run, {"index_s": built - started, "search_s": time.monotonic() - built}

        return self._finish("bm25", built_from, search)

    def dense(
        self,
        model: Path,
        index: Any,
        index_settings: dict[str, Any],
        precision: str,
        lengths: dict[str, int],
        token_budget: int | None,
        block: int,
        num_workers: int,
    ) -> dict[str, Any]:
        """Embed corpus and queries with a model folder, index, and search.

        Args:
            index: `caravan.retrieval.index.Faiss` or `Exact`, of `index_settings`.
            precision: "auto", "bf16" or "float32".
            lengths: query_length and passage_length that replace the contract's.
            token_budget: padded tokens a chunk.
            block: passages a shard.
        """
        contract, _ = read_contract(model)
        encoded_from = {
            "model": folder_digest(model),
            "collection": self.collection.digest,
            "precision": precision,
            "token_budget": token_budget,
            "block": block,
            **lengths,
        }

        def search() -> tuple[Run, dict[str, Any]]:
            from caravan.retrieval.encode import Encoder

            started = time.monotonic()
            encoder = Encoder(model, precision, lengths, token_budget, block, num_workers)
            passages = encoder.encode(
                self.collection.corpus,
                np.arange(len(self.collection.corpus)),
                "passage",
                self.store / "passages",
                encoded_from,
            )
            queries = encoder.encode(
                self.collection.queries,
                self.qrels.queries,
                "query",
                self.store / f"queries.{self.split}",
                {**encoded_from, "split": self.split},
            ).read()
            encoded = time.monotonic()
            index.build(passages)
            built = time.monotonic()
            scores, rows = index.search(queries, min(self.k, passages.rows))
            facts = {
                "encode_s": encoded - started,
                "index_s": built - encoded,
                "search_s": time.monotonic() - built,
                "device": str(encoder.device),
                "precision": encoder.precision,
            }
            if index.approximate:
                from caravan.retrieval.index import measured_recall

                facts["recall_against_exact"] = measured_recall(rows, queries, passages)
                log.info("recall against exact search: %.4f", facts["recall_against_exact"])
            return Run.from_topk(self.qrels.queries, scores, rows), facts

        made_from = {**encoded_from, "index": index_settings}
        return self._finish(contract.kind, made_from, search)

    def _finish(self, system: str, made_from: dict[str, Any], search: Any) -> dict[str, Any]:
        """Write the run, unless it is there from the same inputs, and score it."""
        path = self.run_dir / "runs" / f"{system}.{self.split}.trec"
        inputs = {**made_from, "split": self.split, "k": self.k}
        digest = self._made_before(path, inputs)
        if digest is not None:
            log.info("%s is there already, from the same model, collection and settings", path)
        else:
            manifest.remove(path)
            run, facts = search()
            run = canonical(run, self.collection.corpus)
            write_run(path, run, self.collection.queries, self.collection.corpus)
            digest = manifest.content_digest(path)
            manifest.write(path, inputs, {**facts, "run_xxh3": digest})
        metrics = self.run_dir / "metrics.json"
        scored_from = {
            **inputs,
            "run": str(path.name),
            "run_xxh3": digest,
            "measures": self.measures,
        }
        if not manifest.matches(metrics, scored_from):
            manifest.remove(metrics)
            manifest.write_json(metrics, self._score(system, path))
            manifest.write(metrics, scored_from)
        return json.loads(metrics.read_text("utf-8"))

    def _made_before(self, path: Path, inputs: dict[str, Any]) -> str | None:
        """The digest of a run that is there from these inputs, as it was written, else None."""
        if not manifest.matches(path, inputs):
            return None
        digest = manifest.content_digest(path)
        if (manifest.read(path) or {})["facts"].get("run_xxh3") == digest:
            return digest
        log.warning("%s is not as it was written; it is made again", path)
        return None

    def _score(self, system: str, path: Path) -> dict[str, Any]:
        from caravan.retrieval.metrics import deepest, score_run

        queries, corpus = self.collection.queries, self.collection.corpus
        if path.stat().st_size:
            run = read_run(path, queries, corpus, depth=max(1, deepest(self.measures)))
        else:  # no query has a hit, which is a result and no mistake
            run = Run.from_topk(
                self.qrels.queries, *np.full((2, len(self.qrels.queries), 1), -1, dtype=np.int64)
            )
        facts = (manifest.read(path) or {}).get("facts", {})
        return {
            "system": system,
            "collection": {"name": self.collection.name, "digest": self.collection.digest},
            "split": self.split,
            "passages": len(self.collection.corpus),
            "run": f"runs/{path.name}",
            "seconds": sum(value for key, value in facts.items() if key.endswith("_s")),
            "facts": facts,
            **score_run(run, self.qrels, queries, corpus, self.measures),
        }


def evaluate(cfg: Any) -> dict[str, Any]:
    """Run `evaluate.py` for a composed and checked config; returns what metrics.json holds."""
    from omegaconf import OmegaConf

    parts = build(cfg, "data", "index", "bm25")
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), "utf-8")
    evaluation = Evaluation(
        collection=parts["data"].collection(Path(cfg.cache_dir)),
        split=parts["data"].split,
        run_dir=run_dir,
        store=Path(cfg.store),
        k=parts["index"].k,
        measures=settings["measures"],
    )
    if cfg.retriever == "bm25":
        metrics = evaluation.bm25(parts["bm25"], settings["bm25"])
    else:
        lengths = ("query_length", "passage_length")
        metrics = evaluation.dense(
            Path(cfg.retriever),
            parts["index"],
            settings["index"],
            precision=cfg.precision,
            lengths={name: cfg[name] for name in lengths if cfg[name] is not None},
            token_budget=cfg.token_budget,
            block=cfg.block,
            num_workers=cfg.num_workers,
        )
    overall = "  ".join(f"{name} {value:.4f}" for name, value in metrics["overall"].items())
    log.info("%s on %s %s: %s", metrics["system"], *_place(metrics), overall)
    log.info("run %s, figures %s", run_dir / metrics["run"], run_dir / "metrics.json")
    return metrics


def _place(metrics: dict[str, Any]) -> tuple[str, str]:
    return metrics["collection"]["name"], metrics["split"]
