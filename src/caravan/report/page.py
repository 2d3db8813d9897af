"""One HTML page for a run, for several, or for a sweep; it holds everything and opens offline.

    python -m caravan.report page runs/quickstart

Written as report.html into the folder; beside it report/ has each plot as png and svg with its
caption, and each table as Markdown and LaTeX. The page runs no script and asks for nothing over the
network (a policy in its head forbids both), and whatever a text holds is shown as text.
"""

from __future__ import annotations

import base64
import importlib.metadata
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.files import replacing
from caravan.report import (
    blocks,
    collections,
    curves,
    evaluations,
    jobs,
    plots,
    sweep,
    tables,
    trainings,
)
from caravan.report.blocks import Block, Facts, Note, Section
from caravan.report.compare import Comparison
from caravan.report.compare import tables as tables_of
from caravan.report.plots import DARK, LIGHT, Plot
from caravan.report.records import has_scores, read_metrics, refuse_partial

FILE = "report.html"
MOST_MEASURES = 6
FEW = 2
"""Queries that gained, and lost, of each pair where a page has several collections."""


@dataclass(frozen=True)
class Page:
    """Title, a line below it, and sections."""

    title: str
    line: str
    sections: Sequence[Section]
    command: str


def show(folder: Path) -> None:
    """Write the page and say where it lies."""
    path = write(folder)
    tables.Screen().line(f"page {path}, plots and tables {path.with_suffix('')}")


def write(folder: Path) -> Path:
    """Write the page of a run directory, a folder of several, or a sweep; returns its path.

    Raises:
        InputError: the folder holds no run.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give a run directory, or one of several")
    made = of_sweep(folder) if _is_sweep(folder) else of_runs(folder)
    return save(made, folder / FILE)


def _is_sweep(folder: Path) -> bool:
    """Whether a folder holds the jobs of one sweep and no runs besides."""
    sweeps = jobs.by_sweep(folder)
    of_jobs = {job for of in sweeps.values() for job in of}
    if len(sweeps) != 1 or folder in of_jobs:
        return False
    homes = [path.parent for path in folder.rglob("metrics.json")]
    return all(of_jobs & {home, *home.parents} for home in homes)


def save(page: Page, path: Path) -> Path:
    """Write a page, and its plots and tables into the folder of its name without `.html`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("caravan.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["breaks"] = _breaks
    environment.filters["light"] = partial(_source, theme=LIGHT)
    environment.filters["dark"] = partial(_source, theme=DARK)
    version = importlib.metadata.version("caravan-retrieval")
    text = environment.get_template("page.html").render(page=page, version=version)
    beside = path.with_suffix("")
    plots.write(beside, blocks.plots(page.sections))
    tables.write(beside, blocks.tables(page.sections))
    with replacing(path) as scratch:
        scratch.write_text(text, "utf-8")
    return path


def of_runs(folder: Path) -> Page:
    """The page of one run directory, or of all those below a folder."""
    homes = [path.parent for path in sorted(folder.rglob("metrics.json"))]
    records = {home: read_metrics(home) or {} for home in homes}
    evaluated = _evaluated(records)
    suites = [home for home, record in records.items() if "collections" in record]
    trained = [home for home, record in records.items() if "updates" in record]
    if not evaluated and not trained:
        raise InputError(
            f"{folder} holds no run with figures (metrics.json); make one with train.py or"
            " evaluate.py"
        )
    found: list[Section] = []
    groups: dict[tuple[str, str], evaluations.Records] = {}
    for home, record in evaluated.items():
        key = (record["collection"]["digest"], record["split"])
        groups.setdefault(key, {})[str(home.relative_to(folder))] = record
    several = len(groups) > 1
    names = {}  # a collection's evaluation in a suite is the suite's system on it
    if suites:
        found.append(_suites(suites, records))
        names = {
            str((home / name).relative_to(folder)): _system(home, folder, records[home])
            for home in suites
            for name in records[home]["collections"]
        }
    elif several:
        found.append(_overview(folder, groups))
    for number, of_group in enumerate(groups.values(), 1):
        prefix = f"{number}-" if several else ""
        read = evaluations.gathered(folder, of_group, prefix, names)
        found += evaluations.evaluations(read, FEW if several else evaluations.SHOWN)
    found += trainings.trainings(folder, trained)
    configs = [path.parent for path in sorted(folder.rglob("config.yaml"), key=_time)]
    found += trainings.made_by(folder, configs)
    counted = [(len(evaluated), "evaluation"), (len(trained), "training")]
    line = ", ".join(f"{n} {what}{'s' * (n > 1)}" for n, what in counted if n)
    line += f"; last figures of {_date(homes)}"
    first = _facts(list(evaluated.values()))
    return Page(_title(folder), line, [*first, *found], _command(folder))


def _evaluated(records: dict[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Those of the records that are of an evaluation of one collection."""
    found = {h: r for h, r in records.items() if has_scores(r) and r["run"]}
    for home, record in found.items():
        refuse_partial(home, record)
    return found


def _system(home: Path, folder: Path, record: dict[str, Any]) -> str:
    """What the system of a suite is called on a page of `folder`."""
    return record.get("system", ".") if home == folder else str(home.relative_to(folder))


def of_sweep(folder: Path) -> Page:
    """The page of a sweep: its table, curves over what it varies, and its jobs."""
    varied, measures, rows, failed = sweep.collect(folder)
    labels = sweep.labelled(folder)
    records = {home: read_metrics(home) or {} for home in labels}
    results: list[Block] = []
    if rows and measures:
        results += [*sweep.tables(folder), *sweep.plots(folder)[:MOST_MEASURES]]
    for job, reason in failed:
        results.append(Note(f"Not finished: {job}: {reason}"))
    found = [Section("Results", "results", results)]
    evaluated = _evaluated(records)
    asked = {(r["collection"]["digest"], r["split"]) for r in evaluated.values()}
    if len(asked) == 1:
        # Each job is one system: its last stage.
        alone = {
            str(home.relative_to(folder)): {**record, "stages": record.get("stages", [])[-1:]}
            for home, record in evaluated.items()
        }
        names = {str(home.relative_to(folder)): labels[home] for home in evaluated}
        of = evaluations.gathered(folder, alone, names=names)
        results += evaluations.by_query(of)
        if of.comparison is not None and len(of.order) > 1:
            last = len(of.comparison.systems) - 1
            found += evaluations.comparisons(of.comparison, [(0, last)])
    read = {label: curves.read(home) for home, label in labels.items()}
    watched = next((r["monitored"] for r in records.values() if r.get("monitored")), None)
    drawn = [
        trainings.overlaid(read, tag, "curves")
        for tag in ("train/loss", watched)
        if tag is not None
    ]
    if some := [plot for plot in drawn if plot is not None]:
        found.append(Section("Training", "training", some))
    found += trainings.made_by(folder, list(labels))
    line = f"a sweep over {', '.join(varied) or 'nothing'}: {len(labels)} jobs finished"
    line += f", {len(failed)} not" if failed else ""
    line += f"; last figures of {_date(list(labels))}" if labels else ""
    first = _facts(list(records.values()))
    return Page(_title(folder), line, [*first, *found], _command(folder))


def of_comparison(comparison: Comparison, command: str, count: int) -> Page:
    """The page of `compare`."""
    last = len(comparison.systems) - 1
    (results, *_) = tables_of(comparison)
    found = [
        Section("Results", "results", [results, *evaluations.means(comparison)]),
        *evaluations.comparisons(comparison, [(i, last) for i in range(last)][:4], count=count),
    ]
    line = f"{' · '.join(comparison.names)}, on {comparison.queries:,} queries"
    return Page("A comparison", line, found, command)


def _suites(homes: list[Path], records: dict[Path, dict[str, Any]]) -> Section:
    """Evaluations of many collections: what `caravan.report.collections` shows of them."""
    try:
        # Where none is finished at all, its mistake is told.
        wheres, columns, told = collections.collect(
            [home for home in homes if records[home]["collections"]] or homes
        )
    except InputError as error:
        return Section("All collections", "overview", [Note(f"There is no table of all: {error}.")])
    labels = list(dict.fromkeys(label for label, _ in columns))
    first = next(measure for _, measure in columns)
    several = len(labels) > 1
    shown = [one for one in columns if not several or one[1] == first]
    figures = [[columns[one].get(where) for one in shown] for where in wheres]
    made = tables.Table(
        "overview",
        f"{first if several else labels[0]} on each collection; all of them weigh the same in the"
        " mean.",
        ["collection", *(label if several else measure for label, measure in shown)],
        [
            [where, *(tables.NONE if v is None else f"{v:.4f}" for v in row)]
            for where, row in zip(wheres, figures, strict=True)
        ],
    )
    return Section("All collections", "overview", [made, *map(Note, told)])


def _overview(folder: Path, groups: dict[tuple[str, str], evaluations.Records]) -> Section:
    """Every collection in one table: the first measure of each system, and its mean."""
    names = [
        f"{first['collection']['name']} {first['split']}"
        for first in (next(iter(records.values())) for records in groups.values())
    ]
    wheres = [
        name if names.count(name) == 1 else f"{name} ({digest[:8]})"
        for name, (digest, _) in zip(names, groups, strict=True)
    ]
    called, measure = _called(folder, groups), ""
    by_system: dict[str, dict[str, float]] = {}
    for where, records in zip(wheres, groups.values(), strict=True):
        for home, record in records.items():
            measure = measure or next(iter(record["overall"]), "")
            if measure in record["overall"]:
                by_system.setdefault(called[home], {})[where] = record["overall"][measure]
    rows = [[of.get(where) for where in wheres] for of in by_system.values()]
    means = [_mean(row) for row in rows]
    told = tables.Table(
        "overview",
        f"{measure} on {len(wheres)} collections, and the mean; where a system lacks some, over how"
        " many it is stands behind it, and it does not compare with the others.",
        ["system", *wheres, "mean"],
        [
            [name, *(tables.NONE if v is None else f"{v:.4f}" for v in row), mean]
            for name, row, (mean, _) in zip(by_system, rows, means, strict=True)
        ],
        strong=tables.best([[*row, whole] for row, (_, whole) in zip(rows, means, strict=True)]),
    )
    return Section("All collections", "overview", [told])


def _mean(row: Sequence[float | None]) -> tuple[str, float | None]:
    """The mean of what there is, as it is shown, and the mean itself if nothing is missing."""
    known = [value for value in row if value is not None]
    mean = sum(known) / len(known)
    if len(known) == len(row):
        return f"{mean:.4f}", mean
    return f"{mean:.4f} ({len(known)} of {len(row)})", None


def _called(folder: Path, groups: dict[tuple[str, str], evaluations.Records]) -> dict[str, str]:
    """What systems are called in the table of all collections, by the folder of an evaluation.

    By the last stage, where what was evaluated is the same on all collections: same models, same
    settings. Else by the folder above the evaluations, or by each evaluation's own: two systems
    never share a row.
    """
    of_stage: dict[str, dict[str, tuple[str, str]]] = {}
    for where, records in groups.items():
        for home, record in records.items():
            of_stage.setdefault(record.get("system", home), {})[home] = where
    rows = {
        (stage, home): name
        for stage, homes in of_stage.items()
        for home, name in _rows_of_stage(folder, stage, homes).items()
    }
    if len({(stage, name) for (stage, _), name in rows.items()}) > len(set(rows.values())):
        return {home: home for _, home in rows}
    return {home: name for (_, home), name in rows.items()}


def _rows_of_stage(folder: Path, stage: str, homes: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Names of the evaluations whose last stage is called alike.

    Args:
        homes: collection and split of each.
    """
    made = {home: evaluations.made_from(folder / home) for home in homes}
    if len(set(homes.values())) == len(homes) and (
        len(homes) == 1 or (None not in made.values() and len(set(made.values())) == 1)
    ):
        return dict.fromkeys(homes, stage)
    above: dict[str, list[str]] = {}
    for home in homes:
        above.setdefault(str(Path(home).parent), []).append(home)
    one_each = all(
        len({homes[home] for home in of}) == len(of)  # no collection twice
        and len({made[home] for home in of} - {None}) < 2
        for of in above.values()
    )
    if one_each and "." not in above and len(above) < len(homes):
        return {home: name for name, of in above.items() for home in of}
    return {home: home for home in homes}


def _facts(records: list[dict[str, Any]]) -> list[Section]:
    """What runs have been made on and with; no section where they say nothing of it."""
    found: dict[str, list[str]] = {}
    collections = {one["digest"] for r in records if isinstance(one := r.get("collection"), dict)}

    def add(name: str, value: Any) -> None:
        if value is not None and str(value) not in found.setdefault(name, []):
            found[name].append(str(value))

    for record in records:
        of = record.get("collection")
        if isinstance(of, dict):
            add("collection", f"{of['name']} ({of['digest'][:12]})")
        else:
            add("collection", of)
        add("split", record.get("split"))
        for name in ("queries", "passages") if len(collections) < 2 else ():  # else in its section
            add(name, f"{record[name]:,}" if isinstance(record.get(name), int) else None)
        facts = record.get("facts", {})
        add("device", facts.get("device"))
        add("precision", facts.get("precision"))
        add("base model", record.get("base_model"))
    items = [(name, ", ".join(values)) for name, values in found.items() if values]
    return [Section("Facts", "facts", [Facts(items)])] if items else []


def _breaks(text: str) -> Any:
    """A text whose lines may break within paths, after a slash."""
    from markupsafe import Markup, escape

    return Markup("/<wbr>").join(escape(part) for part in text.split("/"))


def _source(plot: Plot, theme: plots.Theme) -> str:
    svg = plot.svg(theme, small=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _title(folder: Path) -> str:
    return folder.resolve().name


def _command(folder: Path) -> str:
    return shlex.join(["python", "-m", "caravan.report", "page", str(folder)])


def _time(path: Path) -> float:
    return path.stat().st_mtime


def _date(homes: list[Path]) -> str:
    times = [_time(home / "metrics.json") for home in homes if (home / "metrics.json").is_file()]
    return datetime.fromtimestamp(max(times)).strftime("%Y-%m-%d") if times else "no date"
