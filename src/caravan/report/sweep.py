"""The jobs of a sweep in one table and one plot.

    python -m caravan.report sweep runs/sweeps/rerank_depth

A row is a job: the settings that differ from job to job, then the metrics of its `metrics.json`.
Written beside the jobs as sweep.txt, sweep.csv, sweep.png and sweep.svg; a sweep over seeds also
has the mean and the standard deviation. `evaluate.py -m` and `train.py -m` end with it.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from caravan.errors import InputError
from caravan.files import replacing
from caravan.report import jobs
from caravan.report.plots import Line, Plot, bars, lines
from caravan.report.records import read_metrics
from caravan.report.tables import NONE, Screen, Table, best, depth_note, slug

SEED = "seed"
READ = "read at"
"""The column of the length at which a model was evaluated, if there are several."""
TRAIN = "train "
"""The prefix of a measure over training queries."""
SECONDS = "seconds"
SIZES = {"trained_parameters": "trained", "memory_gib": "GiB"}
"""Names in a training's metrics.json, and their columns, which are shown if jobs differ."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """The jobs of a sweep."""

    name: str
    varied: list[str]  # settings that differ from job to job
    measures: list[str]  # the other columns
    rows: list[Row]  # {setting or measure: value} of the finished jobs, in order
    records: dict[Path, Row]  # their metrics.json
    labels: dict[Path, str]  # what sets them apart, such as `rerank.depth=5`
    failed: list[tuple[str, str]]  # (job, reason)

    @property
    def others(self) -> list[str]:
        """The settings that differ, without the seed."""
        return [name for name in self.varied if name != SEED]

    @property
    def scores(self) -> list[str]:
        """The measures of which more is better."""
        return [name for name in self.measures if name not in (SECONDS, *SIZES.values())]


def collect(folder: Path) -> Sweep:
    """The jobs below a folder.

    Raises:
        InputError: If there is no job, or there are several sweeps.
    """
    found = _jobs(folder)
    overrides = {run_dir: record["overrides"] for run_dir, record in found.items()}
    names = dict.fromkeys(key for of in overrides.values() for key in of)
    varied = [name for name in names if len({of.get(name) for of in overrides.values()}) > 1]
    short = {name: _shortened({of.get(name) for of in overrides.values()}) for name in varied}
    settings = {
        run_dir: {name: short[name][of.get(name)] for name in varied}
        for run_dir, of in overrides.items()
    }
    places = {run_dir: str(run_dir.relative_to(folder)) for run_dir in found}
    failed = [
        (places[run_dir], str(record["error"] or "not finished"))
        for run_dir, record in found.items()
        if record["state"] != jobs.FINISHED
    ]
    done = [run_dir for run_dir, record in found.items() if record["state"] == jobs.FINISHED]
    done.sort(key=lambda run_dir: [_order(settings[run_dir][name]) for name in varied])
    texts = [", ".join(f"{name}={value}" for name, value in settings[run].items()) for run in done]
    labels = {
        run: text if text and texts.count(text) == 1 else places[run]
        for run, text in zip(done, texts, strict=True)
    }
    records = {run_dir: read_metrics(run_dir) or {} for run_dir in done}
    rows = [{**settings[run], **row} for run in done for row in _metrics(records[run])]
    varied += [READ] if any(READ in row for row in rows) else []
    rows.sort(key=lambda row: [_order(row.get(name)) for name in varied])
    if len({row.get(SIZES["trained_parameters"]) for row in rows} - {None}) < 2:
        rows = [{key: row[key] for key in row if key not in SIZES.values()} for row in rows]
    measures = list(dict.fromkeys(name for row in rows for name in row if name not in varied))
    measures.sort(key=lambda name: name == SECONDS or name in SIZES.values())
    return Sweep(folder.name, varied, measures, rows, records, labels, failed)


def _jobs(folder: Path) -> dict[Path, Row]:
    """The jobs of the one sweep of a folder; two sweeps vary different settings."""
    sweeps = jobs.by_sweep(folder)
    if not sweeps:
        message = f"{folder} holds no job of a sweep (job.json); start one with -m"
        raise InputError("no-jobs", message)
    if len(sweeps) > 1 and not (folder in sweeps and jobs.is_sweep(folder)):
        names = ", ".join(str(one.relative_to(folder)) for one in sweeps if one != folder)
        message = f"{folder} holds several sweeps ({names}); give the folder of one"
        raise InputError("several-sweeps", message)
    own = sweeps.get(folder, next(iter(sweeps.values())))
    return {run_dir: record for run_dir, record in jobs.read(folder) if run_dir in own}


def _metrics(record: Row) -> Iterator[Row]:
    """The metrics of one job; several if its model was evaluated at several lengths."""
    seconds = record.get("train_seconds", record.get("seconds"))
    watched = {record["monitored"]: record["best"]} if {"monitored", "best"} <= set(record) else {}
    scores = record.get("overall") or record.get("validation") or watched
    common = {f"{TRAIN}{name}": value for name, value in record.get("train", {}).items()}
    common |= {} if seconds is None else {SECONDS: round(seconds, 1)}
    common |= {column: record[name] for name, column in SIZES.items() if name in record}
    for length, read in (record.get("read") or {None: scores}).items():
        yield {**({} if length is None else {READ: int(length)}), **read, **common}


def averaged(sweep: Sweep) -> list[Row]:
    """A row for each setting but the seed: {measure: (mean, standard deviation, seeds)}."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sweep.rows:
        groups.setdefault(tuple(row.get(name) for name in sweep.others), []).append(row)
    means = []
    for key, members in groups.items():
        merged: Row = dict(zip(sweep.others, key, strict=True))
        for measure in sweep.measures:
            values = [member[measure] for member in members if measure in member]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                merged[measure] = (statistics.fmean(values), spread, len(values))
        means.append(merged)
    return means


def tables(sweep: Sweep) -> list[Table]:
    """The jobs, and their means over seeds if there are several seeds."""
    note = depth_note({sweep.labels[run]: record for run, record in sweep.records.items()})
    scores = [
        [row.get(name) if name in sweep.scores else None for name in sweep.measures]
        for row in sweep.rows
    ]
    made = [
        Table(
            "sweep",
            f"{sweep.name}, a row for each job{'.' if note else ''}{note}",
            [*sweep.varied, *sweep.measures],
            [_cells(sweep.varied, sweep.measures, row) for row in sweep.rows],
            max(1, len(sweep.varied)),
            best(scores, len(sweep.varied)),
        )
    ]
    if SEED in sweep.varied:
        made.append(
            Table(
                "sweep-seeds",
                f"{sweep.name}, mean and standard deviation over seeds",
                [*sweep.others, *sweep.measures],
                [_cells(sweep.others, sweep.measures, row) for row in averaged(sweep)],
                max(1, len(sweep.others)),
            )
        )
    return made


def show(folder: Path) -> list[tuple[str, str]]:
    """Print the table, write it beside the jobs as text, csv and plot; returns the failed jobs."""
    sweep = collect(folder)
    made = tables(sweep)
    screen = Screen()
    for table in made:
        screen.table(table)
    with replacing(folder / "sweep.txt") as path, path.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=200)
        for table in made:
            console.print(table.rich(console.width))
    with replacing(folder / "sweep.csv") as path:
        frame = pd.DataFrame(sweep.rows, columns=[*sweep.varied, *sweep.measures], dtype=object)
        frame.to_csv(path, index=False)
    written = ["sweep.txt", "sweep.csv"]
    for plot in plots(sweep)[:1]:
        plot.write(folder / "sweep")
        written += ["sweep.png", "sweep.svg"]
    screen.line(f"table {', '.join(str(folder / name) for name in written)}")
    for job, reason in sweep.failed:
        screen.line(f"failed: {job}: {reason}")
    return sweep.failed


def plots(sweep: Sweep) -> list[Plot]:
    """A plot for each measure that varies, or of the first measure if none does."""
    values = {name: [row[name] for row in sweep.rows if name in row] for name in sweep.scores}
    vary = [name for name, of in values.items() if len(set(of)) > 1]
    known = [name for name, of in values.items() if of]
    means = averaged(sweep)
    return [_plot(sweep, name, means) for name in vary or known[:1]]


def _plot(sweep: Sweep, measure: str, means: list[Row]) -> Plot:
    """A line over the numeric setting with the most values, one for each of the other settings.

    Dots if no setting is numeric.
    """
    means, others = [row for row in means if measure in row], sweep.others
    numeric = [name for name in others if all(isinstance(row[name], int | float) for row in means)]
    seeds = max(row[measure][2] for row in means)
    spread = f" Mean and standard deviation over {seeds} seeds." if seeds > 1 else ""
    across = max(numeric, key=lambda name: len({row[name] for row in means}), default=None)
    beside = [name for name in others if name != across]
    curves: dict[str, list[Row]] = {}
    for row in sorted(means, key=lambda row: [_order(row[name]) for name in others]):
        label = ", ".join(f"{name}={row[name]}" for name in beside)
        curves.setdefault(label, []).append(row)
    name, title = f"sweep-{slug(measure)}", f"{sweep.name}: {measure}"
    if across is None:
        labels = [label or sweep.name for label in curves]
        values = [members[0][measure] for members in curves.values()]
        draw = bars(labels, [of[0] for of in values], [of[1] for of in values], measure)
        return Plot(name, f"{title} of each setting.{spread}", draw, 0.8 + 0.3 * len(labels))
    drawn = []
    for label, members in curves.items():
        values = [row[measure] for row in members]
        x = [row[across] for row in members]
        drawn.append(Line(label, x, [of[0] for of in values], [of[1] for of in values]))
    each = f", a line for each {', '.join(beside)}" if beside else ""
    return Plot(name, f"{title} over {across}{each}.{spread}", lines(drawn, across, measure))


def _shortened(values: set[str | None]) -> dict[Any, Any]:
    """The values of a setting as they are shown: numbers as such, paths from where they differ."""
    paths = [value for value in values if value and re.fullmatch(r"[^\[\]]+/.+", value)]
    short: dict[str | None, str] = {}
    if len(paths) > 1 and len({os.path.isabs(path) for path in paths}) == 1:
        above = os.path.commonpath([os.path.dirname(path) for path in paths])
        short = {path: os.path.relpath(path, above) for path in paths}
    if not values.isdisjoint(short.values()):
        short = {}  # a shortened name would be that of another value
    return {value: short.get(value, _number(value)) for value in values}


def _number(text: str | None) -> Any:
    """A number if the text is one."""
    if text is None or "_" in text:
        return text  # Python would read 1_1 as 11
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _cells(settings: list[str], measures: list[str], row: Row) -> list[str]:
    labels = [str(row.get(name, NONE)) for name in settings]
    return [*labels, *(_cell(name, row.get(name)) for name in measures)]


def _cell(measure: str, value: float | tuple[float, float, int] | None) -> str:
    """A value, or the mean and standard deviation of several."""
    if value is None:
        return NONE
    if isinstance(value, tuple):
        return f"{_cell(measure, value[0])} ± {_cell(measure, value[1])}"
    if measure == SIZES["trained_parameters"]:
        return f"{value:,.0f}"
    return f"{value:.1f}" if measure in (SECONDS, SIZES["memory_gib"]) else f"{value:.4f}"
