"""One table of all evaluations below a folder, and the same as summary.json.

    python -m caravan.report table runs/quickstart

A row is a `metrics.json` with overall figures; its name is the folder it lies in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.manifest import write_json
from caravan.report.records import listed, read_metrics

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
            if not record["overall"]:
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
        raise InputError(f"{folder} mixes collections or splits: {told}; give a folder of one")
    systems = rows(records)
    order = sorted(systems, key=lambda name: next(iter(systems[name]["overall"].values())))
    summary = {
        name: {**systems[name]["overall"], "seconds": round(systems[name]["seconds"], 1)}
        for name in order
    }
    return summary, systems


def rows(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A record {overall, seconds, run, folder, ...} for each row of the table."""
    alone = {name: r for name, r in records.items() if len(r.get("stages", ())) <= 1}
    # A run directory by itself has no folder to be named after.
    named = {
        name: record.get("system", name) if name == "." else name for name, record in alone.items()
    }
    systems = {named[name]: {**record, "folder": name} for name, record in alone.items()}
    shown = {stage["run_xxh3"] for record in alone.values() for stage in record.get("stages", ())}
    stages = [
        (folder, {**record, **stage, "folder": folder})
        for folder, record in records.items()
        if folder not in alone
        for stage in record["stages"]
        if stage["run_xxh3"] not in shown
    ]
    names = [record["stage"] for _, record in stages] + list(systems)
    for folder, record in stages:
        name = record["stage"]
        systems[name if names.count(name) == 1 else f"{folder}/{name}"] = record
    return systems


def show_stages(metrics: dict[str, Any]) -> None:
    """Print the stages of one evaluation: figures, queries a second, gain over the best before."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    measures = list(metrics["overall"])
    table = Table(
        title=Text(
            f"{metrics['collection']['name']} {metrics['split']}: {metrics['queries']:,} queries"
        ),
        caption=f"gain: in {measures[0]}, over the best stage before; queries/s: without what is"
        " done once for a collection",
    )
    table.add_column("stage")
    for measure in [*measures, "gain", "queries/s"]:
        table.add_column(measure, justify="right")
    for stage in metrics["stages"]:
        speed, gain = stage["queries_per_second"], stage["gain"]
        table.add_row(
            Text(stage["stage"]),
            *(f"{stage['overall'][measure]:.4f}" for measure in measures),
            "-" if gain is None else f"{gain:+.4f}",
            "-" if speed is None else f"{speed:,.1f}",
        )
    Console(soft_wrap=True).print(table)


def show(folder: Path) -> None:
    """Print the table and where everything lies; write `summary.json`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    summary, records = collect(folder)
    write_json(folder / "summary.json", summary)
    first = next(iter(records.values()))
    # Evaluations may have been asked for different measures: all of them, in the order met.
    measures = list(dict.fromkeys(name for row in summary.values() for name in row))
    measures.append(measures.pop(measures.index("seconds")))
    table = Table(
        title=Text(
            f"{first['collection']['name']} {first['split']}: {first['queries']:,} queries, "
            f"{first['passages']:,} passages"
        ),
        caption="seconds: embed or index the corpus, and search; or rerank",
    )
    table.add_column("system")
    for measure in measures:
        table.add_column(measure, justify="right")
    for system, figures in summary.items():
        table.add_row(Text(system), *(_cell(measure, figures.get(measure)) for measure in measures))
    console = Console(soft_wrap=True, markup=False)
    console.print(table)
    for system in summary:
        record = records[system]
        console.print(f"run   {system:<12} {folder / record['folder'] / record['run']}")
    for model in sorted(folder.rglob("model/caravan.json")):
        console.print(f"model {model.parent.parent.name:<12} {model.parent}")
    console.print(f"table              {folder / 'summary.json'}")
    console.print(f"curves             tensorboard --logdir {folder}")


def _cell(measure: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if measure == "seconds" else f"{value:.4f}"
