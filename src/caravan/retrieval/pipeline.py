"""An evaluation: retrieve, fuse, rerank, and score every stage.

    run_dir/config.yaml   the config; its manifest records the inputs of the evaluation
    run_dir/runs/         <stage>.<split>.trec, the run of each stage
    run_dir/metrics.json  metrics of the last stage, and of all stages

The inputs are data, systems and settings. With equal inputs, finished stages are reused and
interrupted ones resumed. An evaluation with other inputs in the same run_dir raises an error, so
results are never overwritten. To mine hard negatives, evaluate the training queries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from caravan import manifests
from caravan.data.collection import Collection
from caravan.distributed import is_main_process, world_size
from caravan.errors import InputError, OccupiedError, is_termination, sentence
from caravan.files import claimed, replacing
from caravan.retrieval.inference import Models
from caravan.retrieval.metrics import deepest, depth_of, mean_over_collections, score_run, spelled
from caravan.retrieval.stages import Ranking, Stages
from caravan.retrieval.store import Engine, Store
from caravan.retrieval.systems import Systems, is_model

log = logging.getLogger(__name__)


class Evaluation:
    """The evaluation of one collection.

    Args:
        collection, split: the collection and its judged queries.
        run_dir: where runs and metrics are written.
        store: folder for embeddings, BM25's index and reranker scores; evaluations may share it.
        models: opens the model folders; evaluations may share it.
        ignore_identical_ids: drop the passage that has the query's id from each result.
        config: text of run_dir/config.yaml.
        engine: computes embeddings, scores and parts of a search; None computes them here.

    Raises:
        OccupiedError: If run_dir contains a training run or another evaluation.
    """

    def __init__(
        self,
        collection: Collection,
        split: str,
        run_dir: Path,
        store: Path,
        systems: Systems,
        models: Models,
        measures: Sequence[str] = ("MRR@10", "nDCG@10", "R@100", "R@1000"),
        ignore_identical_ids: bool = False,
        config: str = "",
        engine: Engine | None = None,
    ) -> None:
        self.systems, self.measures = systems, list(measures)
        inputs = {
            "collection": collection.digest,
            "split": split,
            "ignore_identical_ids": ignore_identical_ids,
            **systems.inputs(models, collection.name),
        }
        refuse_another(run_dir, inputs)
        _write_config(run_dir, config, inputs)
        products = Store(store, engine=engine)
        self.stages = Stages(
            collection, split, run_dir, products, systems, models, ignore_identical_ids
        )
        self.rankings: list[Ranking] = []

    def __iter__(self) -> Iterator[None]:
        """Run the stages in order."""
        for name in self.systems.retrievers:
            self.rankings.append(self._retrieved(name))
            yield
        if len(self.systems.retrievers) > 1:
            self.rankings.append(self.stages.fused(self.rankings))
            yield
        if self.systems.reranker is not None:
            self.rankings.append(self.stages.reranked(self.systems.reranker, self.rankings[-1]))
            yield

    def _retrieved(self, name: str) -> Ranking:
        path = Path(name)
        if name == "bm25":
            return self.stages.bm25()
        if path.is_file() and not is_model(path):
            return self.stages.given(path)
        if path.exists():
            return self.stages.dense(path)
        raise InputError(
            "file-not-found", f"retriever={name}: no model folder or run file has this path"
        )

    def score(self) -> dict[str, Any]:
        """Score all stages and write metrics.json, or read it if the runs have not changed.

        Returns {} on all ranks but the main process.
        """
        if not is_main_process():
            return {}
        stages, path = self.stages, self.stages.run_dir / "metrics.json"
        measures = spelled(self.measures, stages.collection.relevant_from.get(stages.split, 1))
        inputs = {
            "stages": [{**ranking.inputs, "stage": ranking.name} for ranking in self.rankings],
            "runs": [ranking.digest for ranking in self.rankings],
            "measures": measures,
            "versions": manifests.versions(("ir_measures",)),
            "mean": "all judged queries",  # earlier versions excluded some
        }
        if manifests.matches(path, inputs):
            if manifests.facts(path).get("xxh3") == manifests.content_digest(path):
                return manifests.read_json(path)
            log.warning("%s has changed since it was written; the runs are scored again", path)
        return _write_metrics(path, self._metrics(measures), inputs)

    def _metrics(self, measures: list[str]) -> dict[str, Any]:
        stages, collection, rows = self.stages, self.stages.collection, []
        scored: dict[str, Any] = {}
        best = None
        for ranking in self.rankings:
            run = stages.read(ranking, depth=max(1, deepest(measures)))
            scored = score_run(run, stages.qrels, collection.queries, collection.corpus, measures)
            first = next(iter(scored["overall"].values()))
            seconds = ranking.seconds("_query_s")
            rows.append(
                {
                    "stage": ranking.name,
                    "run": f"runs/{ranking.path.name}",
                    "run_xxh3": ranking.digest,
                    "depth": depth_of(run, ranking.depth),
                    "overall": scored["overall"],
                    "seconds": ranking.seconds(),
                    "queries_per_second": len(stages.qrels.queries) / seconds if seconds else None,
                    "gain": None if best is None else first - best,
                }
            )
            best = first if best is None else max(best, first)
        return {
            "system": rows[-1]["stage"],
            "collection": {"name": collection.name, "digest": collection.digest},
            "split": stages.split,
            "passages": len(collection.corpus),
            "run": rows[-1]["run"],
            "seconds": sum(row["seconds"] for row in rows),
            "facts": self.rankings[-1].facts,
            "stages": rows,
            **scored,
        }


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Run all stages; returns the content of metrics.json."""
    for _ in evaluation:
        pass
    return evaluation.score()


def evaluate_suite(
    run_dir: Path,
    collections: Mapping[str, Callable[[], Evaluation]],
    groups: Mapping[str, str],
    config: str = "",
    scored: Callable[[Evaluation, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluate several collections stage by stage, so that each model is loaded once.

    Args:
        collections: folder below run_dir to a function that opens the evaluation there.
        groups: folder to group; a group counts once in the mean.
        config: text of run_dir/config.yaml.
        scored: called with each finished evaluation and its metrics.

    Returns:
        The content of metrics.json: the mean (`caravan.retrieval.metrics`), and `failed`, the
        folder and error of each failed collection; {} on all ranks but the main process.
    """
    inputs = {"collections": dict(groups)}
    refuse_another(run_dir, inputs)
    evaluations: dict[str, Evaluation] = {}
    failed: dict[str, str] = {}
    records = {}
    with ExitStack() as held:
        for folder, open_evaluation in collections.items():
            with _noting_failure(folder, failed):
                if is_main_process():
                    held.enter_context(claimed(run_dir / folder))
                evaluations[folder] = open_evaluation()
        _write_config(run_dir, config, inputs)
        stages = {folder: iter(evaluation) for folder, evaluation in evaluations.items()}
        for _ in range(max((len(one.systems) for one in evaluations.values()), default=0)):
            for folder, evaluation in evaluations.items():
                if folder in failed:
                    continue
                with _noting_failure(folder, failed):
                    next(stages[folder])
                    if len(evaluation.rankings) == len(evaluation.systems):
                        records[folder] = evaluation.score()
                        if scored is not None and is_main_process():
                            scored(evaluation, records[folder])
        if not is_main_process():
            return {}
        metrics = {**mean_over_collections(records, groups), "failed": failed}
        return _write_metrics(run_dir / "metrics.json", metrics, metrics["collection"])


@contextmanager
def _noting_failure(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Log an exception and record it in `failed` under the name.

    With several processes the exception is raised: the others would wait for missing shards.
    """
    try:
        yield
    except Exception as error:
        if world_size() > 1 or is_termination(error) or isinstance(error, OccupiedError):
            raise
        message = sentence(error)
        log.error("%s: %s", name, message or "evaluation failed", exc_info=message is None)
        reason = message or f"{type(error).__name__}: {error}"
        failed[name] = " ".join(reason.split())


def refuse_another(run_dir: Path, inputs: dict[str, Any]) -> None:
    """Refuse a run_dir that contains a training run or the metrics of another evaluation.

    One that failed or was interrupted before it wrote metrics may be restarted with other settings.
    """
    if (run_dir / "checkpoints").exists() or (run_dir / "model").exists():
        raise OccupiedError(
            "occupied-run-dir",
            f"{run_dir} holds a training run; choose another name= for the evaluation",
        )
    metrics, record = run_dir / "metrics.json", run_dir / "config.yaml"
    if not metrics.exists() or manifests.matches(record, inputs):
        return
    if "collections" in inputs and _is_incomplete(metrics):
        return
    differs = "its data, systems and settings are not recorded there"
    if manifests.read(record) is not None:
        lines = sorted(manifests.differences(record, inputs), key=lambda line: "unset" in line)
        differs = f"it differs in {'; '.join(lines[:3])}"
    raise OccupiedError(
        "occupied-run-dir",
        f"{run_dir} holds another evaluation already ({differs}); choose another name=, or remove"
        " the folder",
    )


def _is_incomplete(metrics: Path) -> bool:
    """Whether collections failed and are missing in the existing mean."""
    try:
        return bool(manifests.read_json(metrics).get("failed"))
    except InputError:
        return True


def _write_config(run_dir: Path, text: str, inputs: dict[str, Any]) -> None:
    if is_main_process():
        manifests.write(run_dir / "config.yaml", inputs)
        with replacing(run_dir / "config.yaml") as scratch:
            scratch.write_text(text, "utf-8")


def _write_metrics(path: Path, metrics: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Write metrics.json with its manifest; returns its content."""
    manifests.remove(path)
    manifests.write_json(path, metrics)
    manifests.write(path, inputs, {"xxh3": manifests.content_digest(path)})
    return manifests.read_json(path)
