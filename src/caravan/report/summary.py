"""One table of all evaluations below a folder, and the same as summary.json.

    python -m caravan.report table runs/quickstart

A row is a `metrics.json` with overall figures; its name is the folder it lies in.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.manifests import write_json
from caravan.report.curves import EVENT_FILES
from caravan.report.records import listed, read_metrics, refuse_partial
from caravan.report.tables import NONE, Screen, Table, depth_note

Summary = dict[str, dict[str, float]]


def collect(folder: Path) -> tuple[Summary, dict[str, dict[str, Any]]]:
    """Figures of every evaluation below `folder`: {system: {measure: value, "seconds": s}}.

    An evaluation of several stages gives a row for each, by the stage's name if no other row has
    it; the same run is shown once, by the evaluation that has it alone.

    Returns:
        The summary, worst system first by its first measure, and each system's record.

    Raises:
        InputError: there is no evaluation, one without figures, or evaluations of different
            collections or splits, which one table must not mix.
    """
    records = {}
    for path in sorted(folder.rglob("metrics.json")):
        record = read_metrics(path.parent) or {}
        if "overall" in record:
            if not record["overall"] and not record["too_deep"]:
                why, remedy = "its evaluation was asked for no measures", " with measures=[MRR@10]"
                if record.get("failed"):
                    why, remedy = "each of its collections failed", ""
                raise InputError(
                    f"{path} has no figures, {why}; run evaluate.py again{remedy}, or remove the"
                    " file"
                )
            records[str(path.parent.relative_to(folder))] = record
    # A suite's row is its mean; what it is the mean of has tables of its own.
    means = [name for name, record in records.items() if "collections" in record]
    for name in means:
        records = {
            other: record
            for other, record in records.items()
            if other == name or not Path(folder, other).is_relative_to(folder / name)
        }
    for name, record in records.items():
        refuse_partial(folder / name, record)
    if not records:
        raise InputError(f"{folder} holds no evaluation (metrics.json); make one with evaluate.py")
    asked = {name: (r["collection"]["digest"], r["split"]) for name, r in records.items()}
    if len(set(asked.values())) > 1:
        told = listed(
            [
                (name, records[name]["collection"]["name"], digest, split)
                for name, (digest, split) in asked.items()
            ]
        )
        raise InputError(
            f"{folder} mixes collections or splits: {told}; give a folder of one, or see all by"
            f" python -m caravan.report page {folder}"
        )
    systems = rows(records)
    (first, *_) = measures_of(systems.values()) or [""]
    order = sorted(systems, key=lambda name: systems[name]["overall"].get(first, 0.0))
    summary = {
        name: {**systems[name]["overall"], "seconds": round(systems[name]["seconds"], 1)}
        for name in order
    }
    return summary, systems


def measures_of(scored: Iterable[dict[str, Any]]) -> list[str]:
    """The measures of several systems or stages, each once, in the order met."""
    return list(dict.fromkeys(measure for one in scored for measure in one["overall"]))


def rows(
    records: dict[str, dict[str, Any]], names: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """A record {overall, seconds, run, folder, ...} for each row of the table, by its name.

    Args:
        names: what evaluations are called, by folder, where it is not the folder.
    """
    names = names or {}
    alone = {name: r for name, r in records.items() if len(r.get("stages", ())) <= 1}
    found: list[tuple[list[str], dict[str, Any]]] = []
    for folder, record in alone.items():
        called = [folder]
        if folder == ".":  # a run directory by itself has no folder to be named after
            system = record.get("system", folder)
            called = [system, f"./{system}"]
        called = [names[folder], *called] if folder in names else called
        found.append((called, {**record, "folder": folder}))
    shown = {stage["run_xxh3"] for record in alone.values() for stage in record.get("stages", ())}
    for folder, record in records.items():
        for stage in () if folder in alone else record["stages"]:
            if stage["run_xxh3"] not in shown:
                name = stage["stage"]
                longer = f"{names.get(folder, folder)}/{name}"
                called = [name, longer, f"{name} of {folder}"]
                found.append((called, {**record, **stage, "folder": folder}))
    told = _told_apart([called for called, _ in found])
    return {name: record for name, (_, record) in zip(told, found, strict=True)}


def _told_apart(called: list[list[str]]) -> list[str]:
    """A name for each that no other has: the first of its own, or a longer one of those after.

    >>> _told_apart([["bm25"], ["bm25", "a/bm25"], ["bm25", "b/bm25"], ["fused", "b/fused"]])
    ['bm25', 'a/bm25', 'b/bm25', 'fused']
    """
    at = [0] * len(called)
    while True:
        names = [of[i] for of, i in zip(called, at, strict=True)]
        again = [
            n for n, of in enumerate(called) if names.count(names[n]) > 1 and at[n] + 1 < len(of)
        ]
        if not again:
            return names
        for n in again:
            at[n] += 1


def show_stages(metrics: dict[str, Any]) -> None:
    """Print the stages of one evaluation: scores, queries a second, gain over the best before.

    Args:
        metrics: of `caravan.report.records.to_depth`.
    """
    measures = measures_of(metrics["stages"])
    if not measures:
        return  # no run is deep enough for any of them
    Screen().table(
        Table(
            "stages",
            f"{metrics['collection']['name']} {metrics['split']}: {metrics['queries']:,} queries."
            f" Gain: in {measures[0]}, over the best stage before; queries/s: without what is done"
            f" once for a collection.{depth_note({s['stage']: s for s in metrics['stages']})}",
            ["stage", *measures, "gain", "queries/s"],
            [
                [
                    one["stage"],
                    *(_cell(measure, one["overall"].get(measure)) for measure in measures),
                    NONE if one.get("gain") is None else f"{one['gain']:+.4f}",
                    NONE
                    if one.get("queries_per_second") is None
                    else f"{one['queries_per_second']:,.1f}",
                ]
                for one in metrics["stages"]
            ],
        )
    )


def show(folder: Path) -> None:
    """Print the table and where everything lies; write `summary.json`."""
    summary, records = collect(folder)
    write_json(folder / "summary.json", summary)
    first = next(iter(records.values()))
    measures = [*measures_of(records.values()), "seconds"]
    screen = Screen()
    screen.table(
        Table(
            "results",
            f"{first['collection']['name']} {first['split']}: {first['queries']:,} queries,"
            f" {first['passages']:,} passages. Seconds: embed or index the corpus, and search; or"
            f" rerank.{depth_note(records)}",
            ["system", *measures],
            [
                [system, *(_cell(measure, figures.get(measure)) for measure in measures)]
                for system, figures in summary.items()
            ],
        )
    )
    for system in summary:
        record = records[system]
        screen.line(f"run   {system:<12} {folder / record['folder'] / record['run']}")
    for model in sorted(folder.rglob("model/caravan.json")):
        screen.line(f"model {model.parent.parent.name:<12} {model.parent}")
    screen.line(f"table              {folder / 'summary.json'}")
    if any(folder.rglob(EVENT_FILES)):
        screen.line(f"curves             tensorboard --logdir {folder}")


def _cell(measure: str, value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.1f}" if measure == "seconds" else f"{value:.4f}"
