"""The figures of a card: what was measured, of this very model, and nothing else.

The best checkpoint's validation stands in the folder's facts. Figures of an evaluation are taken
from its metrics.json for those stages whose manifest names the folder's digest, so that no card has
the figures of another model, or of this one before it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan import manifests
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.export.card_page import cell
from caravan.models.digests import folder_digest
from caravan.report.records import read_metrics, refuse_partial


@dataclass(frozen=True)
class Figures:
    """Figures over the queries of a split."""

    collection: str
    split: str
    how: str  # what was searched or reranked
    values: dict[str, float]  # by measure, such as MRR@10


def validated(facts: dict[str, Any]) -> Iterator[Figures]:
    """The figure by which the best checkpoint was chosen, if it was."""
    measure, best, over = (facts.get(name) for name in ("monitored", "best", "validation"))
    if not (isinstance(measure, str) and isinstance(best, float) and isinstance(over, dict)):
        return
    what = f"{over['queries']:,} queries, their candidates from a run put into order"
    if over.get("passages") is not None:
        what = f"{over['queries']:,} queries over {over['passages']:,} passages"
    how = f"{what}; while training: the checkpoint was chosen by it"
    yield Figures(over["collection"], over["split"], how, {measure.removeprefix("val/"): best})


def evaluated(folder: Path, evaluation: Path) -> list[Figures]:
    """The figures of the stages of an evaluation that this model has computed.

    Of an evaluation of several collections, those on each of them that has finished.

    Args:
        folder: the model folder.
        evaluation: the folder of a run of `evaluate.py`.

    Raises:
        InputError: it is no evaluation, or none of its stages is of this model.
    """
    path = evaluation / "metrics.json"
    try:
        metrics = read_metrics(evaluation) or {}
        stages, parts = metrics["stages"], metrics.get("collections")
    except (OSError, KeyError) as error:
        raise InputError(
            f"{path}: no figures of an evaluation ({type(error).__name__}); give the folder of a"
            " run of evaluate.py"
        ) from None
    if not parts:
        refuse_partial(evaluation, metrics)
    if parts:
        return [one for name in parts for one in evaluated(folder, evaluation / name)]
    digest, found = folder_digest(folder), []
    for number, stage in enumerate(stages):
        made = manifests.read(evaluation / stage["run"]) or {}
        inputs, facts = made.get("inputs", {}), made.get("facts", {})
        if inputs.get("model") != digest or facts.get("run_xxh3") != stage["run_xxh3"]:
            continue
        how = f"{metrics['queries']:,} queries over {metrics['passages']:,} passages"
        if "depth" in inputs:
            how += f"; the top {inputs['depth']} of {stages[number - 1]['stage']} reranked"
            if inputs.get("weight", 1) != 1:
                how += f" with a weight of {inputs['weight']}"
        for name in ("query_length", "passage_length"):
            if inputs.get(name) is not None:
                how += f"; read with {name}={inputs[name]}"
        found.append(
            Figures(metrics["collection"]["name"], metrics["split"], how, stage["overall"])
        )
    if not found:
        raise InputError(
            f"{path}: none of its stages was computed by {folder} as it is now; evaluate it again"
        )
    return found


def results(encoding: Encoding, figures: list[Figures]) -> list[Any]:
    """The figures as huggingface_hub's EvalResult, for the metadata's model-index."""
    from huggingface_hub import EvalResult

    task = ("information-retrieval", "Information Retrieval")
    if encoding.kind == "reranker":
        task = ("text-ranking", "Reranking")
    return [
        EvalResult(
            task_type=task[0],
            task_name=task[1],
            dataset_type=one.collection,
            dataset_name=f"{one.collection} {one.split} ({one.how})",
            dataset_split=one.split,
            metric_type=name.lower().replace("@", "_at_"),
            metric_name=name,
            metric_value=value,
        )
        for one in figures
        for name, value in one.values.items()
    ]


def table(figures: list[Figures]) -> str:
    """All figures, a row for what was measured together."""
    measures = list(dict.fromkeys(name for one in figures for name in one.values))
    lines = [
        f"| collection | measured | {' | '.join(measures)} |",
        "|---|---|" + "---|" * len(measures),
    ]
    for one in figures:
        cells = [f"{one.values[name]:.4f}" if name in one.values else "" for name in measures]
        lines.append(f"| {cell(one.collection)} {one.split} | {one.how} | {' | '.join(cells)} |")
    return "\n".join(lines)
