"""An evaluation: retrieve, fuse, rerank, and score every stage.

    run_dir/config.yaml   the config; its manifest records the inputs of the evaluation
    run_dir/runs/         <stage>.<split>.trec, the run of each stage
    run_dir/metrics.json  metrics of the last stage, and of all stages

A stage has no measure that looks deeper than its run; the log says so.

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
from caravan.distributed import is_main_process, world_size
from caravan.errors import InputError, OccupiedError, is_termination, sentence
from caravan.files import claimed, replacing
from caravan.retrieval.metrics import (
    deepest,
    depth_of,
    mean_over_collections,
    score_run,
    spelled,
    too_deep,
)
from caravan.retrieval.stages import Ranking, Stages, is_finished

log = logging.getLogger(__name__)


class Evaluation:
    """The evaluation of one collection.

    Args:
        stages: computes the runs.
        measures: see `caravan.retrieval.metrics`.
        config: text of run_dir/config.yaml.

    Raises:
        OccupiedError: If run_dir contains a training run or another evaluation.
    """

    def __init__(self, stages: Stages, measures: Sequence[str], config: str = "") -> None:
        self.stages, self.systems = stages, stages.systems
        relevant_from = stages.collection.relevant_from.get(stages.split, 1)
        self.measures = spelled(measures, relevant_from)
        inputs = {
            "collection": stages.collection.digest,
            "split": stages.split,
            "ignore_identical_ids": stages.ignore_identical_ids,
            **self.systems.inputs(stages.models, stages.collection.name),
        }
        refuse_another(stages.run_dir, inputs)
        _write_config(stages.run_dir, config, inputs)
        self.rankings: list[Ranking] = []

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        """Run the stages in order; yields None after each, then the content of metrics.json."""
        for name, retriever in self.systems.searches.items():
            if retriever == "bm25":
                ranking = self.stages.bm25(name)
            elif Path(retriever).is_dir():
                ranking = self.stages.dense(name, Path(retriever))
            else:
                ranking = self.stages.given(name, Path(retriever))
            self.rankings.append(ranking)
            yield None
        if len(self.systems.retrievers) > 1:
            self.rankings.append(self.stages.fused(self.rankings))
            yield None
        if self.systems.reranker is not None:
            self.rankings.append(self.stages.reranked(self.systems.reranker, self.rankings[-1]))
            yield None
        yield self.score()

    def score(self) -> dict[str, Any]:
        """Score all stages and write metrics.json, or read it if the runs have not changed.

        Returns {} on all ranks but the main process.
        """
        if not is_main_process():
            return {}
        path = self.stages.run_dir / "metrics.json"
        inputs = {
            "stages": [{**ranking.inputs, "stage": ranking.name} for ranking in self.rankings],
            "runs": [ranking.digest for ranking in self.rankings],
            "measures": self.measures,
            "versions": manifests.versions(("ir_measures",)),
            "mean": "all judged queries",  # earlier versions excluded some
            "too_deep": "left out",  # earlier versions scored them
        }
        if is_finished(path, inputs, "xxh3"):
            return manifests.read_json(path)
        return _write_metrics(path, self._metrics(), inputs)

    def _metrics(self) -> dict[str, Any]:
        stages, collection, measures = self.stages, self.stages.collection, self.measures
        rows: list[dict[str, Any]] = []
        scored: dict[str, Any] = {}
        best: float | None = None
        for ranking in self.rankings:
            run = stages.read(ranking, depth=deepest(measures))
            depth = depth_of(run, ranking.depth)
            if dropped := too_deep(measures, depth, len(collection.corpus)):
                text = "%s on %s: the run has %d passages per query, so it has no %s"
                log.info(text, ranking.name, collection.name, depth, ", ".join(dropped))
            known = [name for name in measures if name not in dropped]
            scored = score_run(run, stages.qrels, *stages.texts, known)
            first = scored["overall"].get(measures[0])
            seconds = ranking.seconds("_query_s")
            rows.append(
                {
                    "stage": ranking.name,
                    "run": f"runs/{ranking.path.name}",
                    "run_xxh3": ranking.digest,
                    "depth": depth,
                    "overall": scored["overall"],
                    "seconds": ranking.seconds(),
                    "queries_per_second": len(stages.qrels.queries) / seconds if seconds else None,
                    "gain": None if first is None or best is None else first - best,
                }
            )
            if first is not None:
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
    *_, metrics = evaluation
    assert metrics is not None
    return metrics


def evaluate_suite(
    run_dir: Path,
    collections: Mapping[str, Callable[[], Evaluation]],
    groups: Mapping[str, str],
    config: str,
    report: Callable[[Evaluation, dict[str, Any]], None],
) -> dict[str, Any]:
    """Evaluate several collections stage by stage, so that each model is loaded once.

    Args:
        collections: folder below run_dir to a function that opens the evaluation there.
        groups: folder to group; a group counts once in the mean.
        config: text of run_dir/config.yaml.
        report: called with each finished evaluation and its metrics.

    Returns:
        The content of metrics.json: the mean (`caravan.retrieval.metrics`), and `failed`, the
        folder and error of each failed collection; {} on all ranks but the main process.
    """
    inputs = {"collections": dict(groups)}
    refuse_another(run_dir, inputs)
    evaluations: dict[str, Evaluation] = {}
    failed: dict[str, str] = {}
    records: dict[str, dict[str, Any]] = {}
    with ExitStack() as held:
        for folder, open_evaluation in collections.items():
            with _noting_failure(folder, failed):
                if is_main_process():
                    held.enter_context(claimed(run_dir / folder))
                evaluations[folder] = open_evaluation()
        _write_config(run_dir, config, inputs)
        stages = {folder: iter(evaluation) for folder, evaluation in evaluations.items()}
        while running := [one for one in evaluations if one not in {*failed, *records}]:
            for folder in running:
                with _noting_failure(folder, failed):
                    metrics = next(stages[folder])
                    if metrics is not None:
                        records[folder] = metrics
                        if is_main_process():
                            report(evaluations[folder], metrics)
        if not is_main_process():
            return {}
        mean = {**mean_over_collections(records, groups), "failed": failed}
        return _write_metrics(run_dir / "metrics.json", mean, mean["collection"])


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
    lines = sorted(manifests.differences(record, inputs), key=lambda line: "unset" in line)
    raise OccupiedError(
        "occupied-run-dir",
        f"{run_dir} holds another evaluation already (it differs in {'; '.join(lines[:3])});"
        " choose another name=, or remove the folder",
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
