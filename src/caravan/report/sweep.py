"""The jobs of a sweep in one table and one plot.

    python -m caravan.report sweep runs/sweeps/rerank_depth

A row is a job: the settings that differ from job to job, then the figures of its `metrics.json`.
Written beside the jobs as sweep.txt, sweep.csv, sweep.png and sweep.svg; a sweep over seeds also
shows the mean and the spread. `evaluate.py -m` and `train.py -m` end with it, and with the page.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.files import replacing
from caravan.report import jobs
from caravan.report.plots import LIGHT, Line, Plot, bars, lines
from caravan.report.records import read_metrics
from caravan.report.tables import NONE, Screen, Table, best, depth_note

SEED = "seed"
READ = "read at"
"""The column of the length that a model was read at, where it was read at several."""

TRAIN = "train "
"""What stands before a measure of training queries."""
SIZES = {"trained_parameters": "trained", "memory_gib": "GiB"}
"""Names in a training's metrics.json, and their columns, which are shown where jobs differ."""

MOST_TOLD = 24
"""Points of a plot that its text in words names."""

Row = dict[str, Any]


def collect(folder: Path) -> tuple[list[str], list[str], list[Row], list[tuple[str, str]]]:
    """The jobs below a folder.

    Returns:
        Settings that vary, measures, a row {setting or measure: value} for each finished job, and
        (job, reason) for each of the others.

    Raises:
        InputError: there is no job, or there are several sweeps.
    """
    found = _jobs(folder)
    varied, settings = _settings(found)
    rows: list[Row] = []
    failed = []
    for run_dir, record in found:
        if record["state"] != jobs.FINISHED:
            reason = record["error"] or "not finished"
            failed.append((str(run_dir.relative_to(folder)), str(reason)))
            continue
        rows += [{**settings[run_dir], **one} for one in _figures(run_dir)]
    if any(READ in row for row in rows):
        varied.append(READ)
    measures = list(dict.fromkeys(name for row in rows for name in row if name not in varied))
    sizes = {row[SIZES["trained_parameters"]] for row in rows if SIZES["trained_parameters"] in row}
    measures.sort(key=lambda name: name == "seconds" or name in SIZES.values())
    if len(sizes) < 2:
        measures = [name for name in measures if name not in SIZES.values()]
        rows = [{key: row[key] for key in row if key not in SIZES.values()} for row in rows]
    return varied, measures, rows, failed


def _jobs(folder: Path) -> list[tuple[Path, Row]]:
    """The jobs of the one sweep of a folder; two sweeps vary different things."""
    sweeps = jobs.by_sweep(folder)
    if not sweeps:
        raise InputError(f"{folder} holds no job of a sweep (job.json); start one with -m")
    own = sweeps.get(folder, next(iter(sweeps.values())))
    if len(sweeps) > 1 and not (folder in sweeps and jobs.is_sweep(folder)):
        names = ", ".join(str(one.relative_to(folder)) for one in sweeps if one != folder)
        raise InputError(
            f"{folder} holds several sweeps ({names}), which one table must not mix; give the"
            " folder of one"
        )
    return [(place, one) for place, one in jobs.read(folder) if place in own]


def labelled(folder: Path) -> dict[Path, str]:
    """Each finished job by what sets it apart, such as `rerank.depth=5`, in the table's order.

    Jobs that no setting sets apart are called by their folders.
    """
    found = [(place, one) for place, one in _jobs(folder) if one["state"] == jobs.FINISHED]
    varied, settings = _settings(found)
    order = sorted(settings, key=lambda run: [_order(settings[run][name]) for name in varied])
    told = [", ".join(f"{name}={settings[run][name]}" for name in varied) for run in order]
    return {
        run: label if label and told.count(label) == 1 else str(run.relative_to(folder))
        for run, label in zip(order, told, strict=True)
    }


def _settings(found: list[tuple[Path, Row]]) -> tuple[list[str], dict[Path, Row]]:
    """The settings that differ from job to job, and those of each job as they are shown."""
    names = dict.fromkeys(key for _, record in found for key in record["overrides"])
    varied = [
        name for name in names if len({record["overrides"].get(name) for _, record in found}) > 1
    ]
    short = {name: _without_common(found, name) for name in varied}
    return varied, {
        run_dir: {name: short[name][record["overrides"].get(name)] for name in varied}
        for run_dir, record in found
    }


def _figures(run_dir: Path) -> Iterator[Row]:
    """Figures of one job; several where it read its model at several lengths."""
    record = read_metrics(run_dir)
    if record is None:  # a job may be there to make a folder and have no figures
        yield {}
        return
    seconds = record.get("train_seconds", record.get("seconds"))
    watched = {record["monitored"]: record["best"]} if {"monitored", "best"} <= set(record) else {}
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


def tables(folder: Path) -> list[Table]:
    """The jobs, and their means over seeds if there are several seeds."""
    varied, measures, rows, _ = _collected(folder)
    figures = [[row.get(name) for name in measures] for row in rows]
    strong = frozenset(
        (i, j) for i, j in best(figures, len(varied)) if _is_figure(measures[j - len(varied)])
    )
    title = f"{folder.name}, a row for each job"
    note = depth_note(
        {label: record for run, label in labelled(folder).items() if (record := read_metrics(run))}
    )
    title += f".{note}" if note else ""
    made = [_table("sweep", title, varied, measures, rows, _cell, strong)]
    if SEED in varied:
        means = averaged(varied, measures, rows)
        title = f"{folder.name}, mean and standard deviation over seeds"
        others = [name for name in varied if name != SEED]
        made.append(_table("sweep-seeds", title, others, measures, means, _mean_cell))
    return made


def plots(folder: Path) -> list[Plot]:
    """A plot for each measure that varies, at least for the first."""
    varied, measures, rows, _ = _collected(folder)
    figures = [name for name in measures if _is_figure(name) and any(name in r for r in rows)]
    vary = [name for name in figures if len({row[name] for row in rows if name in row}) > 1]
    return [
        plot(folder.name, varied, name, averaged(varied, [name], rows))
        for name in vary or figures[:1]
    ]


def show(folder: Path) -> list[tuple[str, str]]:
    """Print the table, write it beside the jobs as text, csv and plot; returns the failed jobs."""
    varied, measures, rows, failed = _collected(folder)
    made = tables(folder)
    screen = Screen()
    for table in made:
        screen.table(table)
    with replacing(folder / "sweep.txt") as path:
        _write_text(path, made)
    with replacing(folder / "sweep.csv") as path:
        _write_csv(path, varied + measures, rows)
    written = ["sweep.txt", "sweep.csv"]
    for drawn in plots(folder)[:1]:
        with replacing(folder / "sweep.png") as path:
            path.write_bytes(drawn.png())
        with replacing(folder / "sweep.svg") as path:
            path.write_text(drawn.svg(LIGHT), "utf-8")
        written += ["sweep.png", "sweep.svg"]
    screen.line(f"table {', '.join(str(folder / name) for name in written)}")
    for job, reason in failed:
        screen.line(f"failed: {job}: {reason}")
    return failed


def plot(title: str, varied: list[str], measure: str, means: list[Row]) -> Plot:
    """A curve over the numeric setting with the most values, one for each of the other settings.

    Dots stand for it where no setting is numeric. Spreads are over seeds.
    """
    means = [row for row in means if measure in row]
    others = [name for name in varied if name != SEED]
    numeric = [name for name in others if all(isinstance(row[name], int | float) for row in means)]
    seeds = max(row[measure][2] for row in means)
    spread = f" Mean and standard deviation over {seeds} seeds." if seeds > 1 else ""
    name = f"sweep-{re.sub(r'[^a-zA-Z0-9]+', '-', measure).strip('-')}"
    told = "; ".join(
        f"{', '.join(f'{name} {row[name]}' for name in others)}: {row[measure][0]:.4f}"
        for row in means[:MOST_TOLD]
    )
    if not numeric:
        labels = [", ".join(f"{name}={row[name]}" for name in others) or title for row in means]
        return Plot(
            name,
            f"{title}: {measure} of each setting.{spread}",
            f"{measure} of {len(means)} settings. {told}.",
            bars(labels, *_columns(means, measure), measure),
            height=0.8 + 0.3 * len(means),
        )
    across = max(numeric, key=lambda name: len({row[name] for row in means}))
    curves: dict[str, list[Row]] = {}
    for row in sorted(means, key=lambda row: [_order(row[name]) for name in others]):
        label = ", ".join(f"{name}={row[name]}" for name in others if name != across)
        curves.setdefault(label, []).append(row)
    drawn = [
        Line(label, [row[across] for row in members], *_columns(members, measure))
        for label, members in curves.items()
    ]
    beside = ", ".join(name for name in others if name != across)
    return Plot(
        name,
        f"{title}: {measure} over {across}{beside and f', a line for each {beside}'}.{spread}",
        f"{measure} over {across}. {told}.",
        lines(drawn, across, measure),
    )


def _columns(rows: list[Row], measure: str) -> tuple[list[float], list[float]]:
    """Means and spreads."""
    return [row[measure][0] for row in rows], [row[measure][1] for row in rows]


def _collected(folder: Path) -> tuple[list[str], list[str], list[Row], list[tuple[str, str]]]:
    """`collect`, with the rows in order."""
    varied, measures, rows, failed = collect(folder)
    rows.sort(key=lambda row: [_order(row.get(name)) for name in varied])
    return varied, measures, rows, failed


def _is_figure(name: str) -> bool:
    """Whether a column holds figures of retrieval, of which more is better."""
    return name != "seconds" and name not in SIZES.values()


def _table(
    name: str,
    caption: str,
    settings: list[str],
    measures: list[str],
    rows: list[Row],
    cell: Any,
    strong: frozenset[tuple[int, int]] = frozenset(),
) -> Table:
    cells = [
        [
            *(str(row.get(name, NONE)) for name in settings),
            *(cell(name, row.get(name)) for name in measures),
        ]
        for row in rows
    ]
    return Table(name, caption, [*settings, *measures], cells, max(1, len(settings)), strong)


def _write_text(path: Path, tables: list[Table]) -> None:
    from rich.console import Console

    with path.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=200)
        for table in tables:
            console.print(table.rich(console.width))


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
    if not values.isdisjoint(short.values()):
        short = {}  # then one of them would be called as another one is
    return {value: short.get(value, _number(value)) for value in values}


def _same(paths: list[list[str]]) -> int:
    """How many parts all paths have in common, from the beginning."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def _number(text: Any) -> Any:
    """A number where the text is one."""
    if "_" in str(text):
        return text  # Python would read 1_1 as 11
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
        return NONE
    if measure == SIZES["trained_parameters"]:
        return f"{value:,.0f}"
    return f"{value:.1f}" if measure in ("seconds", SIZES["memory_gib"]) else f"{value:.4f}"


def _mean_cell(measure: str, value: tuple[float, float, int] | None) -> str:
    if value is None:
        return NONE
    return f"{_cell(measure, value[0])} ± {_cell(measure, value[1])}"
