"""One table of all evaluations below a folder, and the same as summary.json.

    python -m caravan.report table runs/quickstart

A row is a `metrics.json` with overall figures; its name is the folder it lies in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.manifest import write_json

Summary = dict[str, dict[str, float]]


def collect(folder: Path) -> tuple[Summary, dict[str, dict[str, Any]]]:
    """Figures of every evaluation below `folder`: {system: {measure: value, "seconds": s}}.

    Returns:
        The summary, worst system first by its first measure, and each system's whole record.

    Raises:
        InputError: there is no evaluation, one without figures, or evaluations of different
            collections or splits, which one table must not mix.
    """
    records = {}
    for path in sorted(folder.rglob("metrics.json")):
        record = json.loads(path.read_text("utf-8"))
        if "overall" in record:
            if not record["overall"]:
                raise InputError(
                    f"{path} has no figures, its evaluation was asked for no measures; run"
                    " evaluate.py again with measures=[MRR@10], or remove the file"
                )
            records[str(path.parent.relative_to(folder))] = record
    if not records:
        raise InputError(f"{folder} holds no evaluation (metrics.json); make one with evaluate.py")
    asked = {name: (r["collection"]["digest"], r["split"]) for name, r in records.items()}
    if len(set(asked.values())) > 1:
        told = ", ".join(
            f"{name} ({records[name]['collection']['name']} {split})"
            for name, (_, split) in asked.items()
        )
        raise InputError(f"{folder} mixes collections or splits: {told}; give a folder of one")
    order = sorted(records, key=lambda name: next(iter(records[name]["overall"].values())))
    summary = {
        name: {**records[name]["overall"], "seconds": round(records[name]["seconds"], 1)}
        for name in order
    }
    return summary, records


def show(folder: Path) -> None:
    """Print the table and where everything lies; write `summary.json`."""
    from rich.console import Console
    from rich.table import Table

    summary, records = collect(folder)
    write_json(folder / "summary.json", summary)
    first = next(iter(records.values()))
    # Evaluations may have been asked for different measures: all of them, in the order met.
    measures = list(dict.fromkeys(name for row in summary.values() for name in row))
    measures.append(measures.pop(measures.index("seconds")))
    table = Table(
        title=f"{first['collection']['name']} {first['split']}: {first['queries']:,} queries, "
        f"{first['passages']:,} passages",
        caption="seconds: embed or index the corpus, and search",
    )
    table.add_column("system")
    for measure in measures:
        table.add_column(measure, justify="right")
    for system, figures in summary.items():
        table.add_row(system, *(_cell(measure, figures.get(measure)) for measure in measures))
    console = Console(soft_wrap=True)
    console.print(table)
    for system in summary:
        console.print(f"run   {system:<12} {folder / system / records[system]['run']}")
    for model in sorted(folder.rglob("model/caravan.json")):
        console.print(f"model {model.parent.parent.name:<12} {model.parent}")
    console.print(f"table              {folder / 'summary.json'}")
    console.print(f"curves             tensorboard --logdir {folder}")


def _cell(measure: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if measure == "seconds" else f"{value:.4f}"
