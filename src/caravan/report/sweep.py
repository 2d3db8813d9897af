"""The jobs of a sweep in one table and one plot.

    python -m caravan.report sweep runs/sweeps/rerank_depth

A row is a job: the settings that differ from job to job, then the figures of its `metrics.json`.
Written beside the jobs as sweep.txt, sweep.csv and sweep.png; a sweep over seeds also shows the
mean and the spread. `evaluate.py -m` and `train.py -m` end with it.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from caravan import jobs
from caravan.atomic import replacing
from caravan.errors import InputError

SEED = "seed"
READ = "read at"
"""The column of the length that a model was read at, where it was read at several."""

TRAIN = "train "
"""What stands before a measure of training queries."""
SIZES = {"trained_parameters": "trained", "memory_gib": "GiB"}
"""Names in a training's metrics.json, and their columns, which are shown where jobs differ."""

Row = dict[str, Any]


def collect(folder: Path) -> tuple[list[str], list[str], list[Row], list[tuple[str, str]]]:
    """The jobs below a folder.

    Returns:
        Settings that vary, measures, a row {setting or measure: value} for each finished job, and
        (job, reason) for each of the others.

    Raises:
        InputError: there is no job.
    """
    found = list(jobs.read(folder))
    if not found:
        raise InputError(f"{folder} holds no job of a sweep (job.json); start one with -m")
    names = dict.fromkeys(key for _, record in found for key in record["overrides"])
    varied = [
        name for name in names if len({record["overrides"].get(name) for _, record in found}) > 1
    ]
    short = {name: _without_common(found, name) for name in varied}
    rows: list[Row] = []
    failed = []
    for run_dir, record in found:
        if record["state"] != jobs.FINISHED:
            reason = record["error"] or "not finished"
            failed.append((str(run_dir.relative_to(folder)), str(reason)))
            continue
        given = record["overrides"]
        settings = {name: short[name][given.get(name)] for name in varied}
        rows += [{**settings, **figures} for figures in _figures(run_dir / "metrics.json")]
    if any(READ in row for row in rows):
        varied.append(READ)
    measures = list(dict.fromkeys(name for row in rows for name in row if name not in varied))
    sizes = {row[SIZES["trained_parameters"]] for row in rows if SIZES["trained_parameters"] in row}
    measures.sort(key=lambda name: name == "seconds" or name in SIZES.values())
    if len(sizes) < 2:
        measures = [name for name in measures if name not in SIZES.values()]
        rows = [{key: row[key] for key in row if key not in SIZES.values()} for row in rows]
    return varied, measures, rows, failed


def _figures(path: Path) -> Iterator[Row]:
    """Figures of one job; several where it read its model at several lengths."""
    if not path.is_file():  # a job may be there to make a folder and have no figures
        yield {}
        return
    record = json.loads(path.read_text("utf-8"))
    seconds = record.get("train_seconds", record.get("seconds"))
    watched = {record["monitored"]: record["best"]} if record.get("best") is not None else {}
    of_train = {f"{TRAIN}{name}": value for name, value in record.get("train", {}).items()}
    size = {SIZES[name]: record[name] for name in SIZES if name in record}
    figures = record.get("overall") or record.get("validation") or watched
    for length, read in (record.get("read") or {None: figures}).items():
        at = {} if length is None else {READ: int(length)}
        yield {
            **at,
            **read,
            **of_train,
            **({} if seconds is None else {"seconds": round(seconds, 1)}),
            **size,
        }


def averaged(varied: list[str], measures: list[str], rows: list[Row]) -> list[Row]:
    """A row for each setting but the seed: {measure: (mean, standard deviation, seeds)}."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    others = [name for name in varied if name != SEED]
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in others), []).append(row)
    result = []
    for key, members in groups.items():
        merged: Row = dict(zip(others, key, strict=True))
        for measure in measures:
            values = [member[measure] for member in members if measure in member]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                merged[measure] = (statistics.fmean(values), spread, len(values))
        result.append(merged)
    return result


def show(folder: Path) -> list[tuple[str, str]]:
    """Print the table, write it beside the jobs as text, csv and plot; returns the failed jobs."""
    from rich.console import Console

    varied, measures, rows, failed = collect(folder)
    rows.sort(key=lambda row: [_order(row.get(name)) for name in varied])
    tables = [_table(folder.name, varied, measures, rows, _cell)]
    if SEED in varied:
        means = averaged(varied, measures, rows)
        title = f"{folder.name}, mean and standard deviation over seeds"
        others = [name for name in varied if name != SEED]
        tables.append(_table(title, others, measures, means, _mean_cell))
    console = Console(soft_wrap=True)
    for table in tables:
        console.print(table)
    with replacing(folder / "sweep.txt") as path:
        _write_text(path, tables)
    with replacing(folder / "sweep.csv") as path:
        _write_csv(path, varied + measures, rows)
    written = ["sweep.txt", "sweep.csv"]
    if rows and measures:
        means = averaged(varied, measures[:1], rows)
        with replacing(folder / "sweep.png") as path:
            plot(path, folder.name, varied, measures[0], means)
        written.append("sweep.png")
    console.print(f"table {', '.join(str(folder / name) for name in written)}", markup=False)
    for job, reason in failed:
        console.print(f"failed: {job}: {reason}", highlight=False, markup=False)
    return failed


def plot(path: Path, title: str, varied: list[str], measure: str, means: list[Row]) -> None:
    """A curve over the numeric setting with the most values, one for each of the other settings.

    Bars stand for it where no setting is numeric. Spreads are over seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    means = [row for row in means if measure in row]
    others = [name for name in varied if name != SEED]
    numeric = [name for name in others if all(isinstance(row[name], int | float) for row in means)]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if numeric:
        across = max(numeric, key=lambda name: len({row[name] for row in means}))
        curves: dict[str, list[Row]] = {}
        for row in means:
            label = ", ".join(f"{name}={row[name]}" for name in others if name != across)
            curves.setdefault(label, []).append(row)
        for label, members in curves.items():
            members.sort(key=lambda row: float(row[across]))
            x = [row[across] for row in members]
            y, spread = zip(*((row[measure][0], row[measure][1]) for row in members), strict=True)
            axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=label or None)
        axes.set_xlabel(across)
        axes.set_xticks(sorted({row[across] for row in means}))
        axes.set_ylabel(measure)
        if len(curves) > 1:
            axes.legend(fontsize="small")
    else:
        labels = [", ".join(f"{name}={row[name]}" for name in others) for row in means]
        values, spread = zip(*((row[measure][0], row[measure][1]) for row in means), strict=True)
        axes.barh(labels, values, xerr=spread, capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel(measure)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)


def _table(title: str, settings: list[str], measures: list[str], rows: list[Row], cell: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    # A Text is shown as it is; of a plain string rich would take [...] for markup.
    table = Table(title=Text(title))
    for name in settings:
        table.add_column(Text(name), overflow="fold")
    for name in measures:
        table.add_column(Text(name), justify="right")
    for row in rows:
        table.add_row(
            *(Text(str(row.get(name, "-"))) for name in settings),
            *(cell(name, row.get(name)) for name in measures),
        )
    return table


def _write_text(path: Path, tables: list[Any]) -> None:
    from rich.console import Console

    with path.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=200)
        for table in tables:
            console.print(table)


def _write_csv(path: Path, columns: list[str], rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _without_common(found: list[tuple[Path, dict[str, Any]]], name: str) -> dict[Any, Any]:
    """The values of a setting; folders without the parts of their paths that all of them share."""
    values = {record["overrides"].get(name) for _, record in found}
    paths = [value.split("/") for value in values if value and re.fullmatch(r"[^\[\]]+/.+", value)]
    if len(paths) < 2:
        return {value: _number(value) for value in values}
    shortest = min(map(len, paths))  # of which something must be left
    begin = min(_same(paths), shortest - 1)
    end = min(_same([path[::-1] for path in paths]), shortest - begin - 1)
    short = {"/".join(path): "/".join(path[begin : len(path) - end]) for path in paths}
    return {value: short.get(value, _number(value)) for value in values}


def _same(paths: list[list[str]]) -> int:
    """How many parts all paths have in common, from the beginning."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def _number(text: Any) -> Any:
    """A number where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _cell(measure: str, value: float | None) -> str:
    if value is None:
        return "-"
    if measure == SIZES["trained_parameters"]:
        return f"{value:,.0f}"
    return f"{value:.1f}" if measure in ("seconds", SIZES["memory_gib"]) else f"{value:.4f}"


def _mean_cell(measure: str, value: tuple[float, float, int] | None) -> str:
    if value is None:
        return "-"
    return f"{_cell(measure, value[0])} ± {_cell(measure, value[1])}"
