"""One HTML page for a run, several runs or a sweep; it contains everything and opens offline.

    python -m caravan.report page runs/quickstart

Written as report.html into the folder; report/ beside it has each plot as png and svg with its
caption, and each table as Markdown and LaTeX. The page runs no script and loads nothing over the
network (a policy in its head forbids both), and every text is escaped.
"""

from __future__ import annotations

import base64
import importlib.metadata
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from caravan import manifests
from caravan.errors import InputError
from caravan.files import replacing
from caravan.report import jobs, plots, sweep, tables
from caravan.report.compare import Comparison
from caravan.report.evaluations import (
    SHOWN,
    comparison_sections,
    comparison_tables,
    evaluation_sections,
    means,
)
from caravan.report.records import distinct, has_scores, judged_on, read_metrics, refuse_partial
from caravan.report.summary import Records, collect_suites, read_suites, where
from caravan.report.tables import Facts, Section, Table, best, score
from caravan.report.trainings import command_sections, training_sections

FILE = "report.html"
MOST_MEASURES = 6
FEW = 2
"""Most improved and most degraded queries of each pair, on a page with several collections."""
NOT_OF_THE_SYSTEM = {
    "collection", "split", "candidates", "runs", "block", "token_budget", "versions"
}  # fmt: skip
"""Inputs of a stage that do not belong to its system: its data, batch sizes and versions."""


Groups = dict[tuple[str, str], Records]
"""Evaluations by folder, by the digest of the collection and the split."""


@dataclass(frozen=True)
class Page:
    """A title, a line below it, sections, and the command that makes the page again."""

    title: str
    line: str
    sections: Sequence[Section]
    command: str


def show(folder: Path) -> None:
    """Write the page and print its path."""
    path = write(folder)
    tables.Screen().line(f"page {path}, plots and tables {path.with_suffix('')}")


def write(folder: Path) -> Path:
    """Write the page of a run directory, a folder of several, or a sweep; returns its path.

    Raises:
        InputError: If the folder holds no run.
    """
    if not folder.is_dir():
        message = f"there is no folder {folder}; name a run directory, or one of several"
        raise InputError("folder-not-found", message)
    return save(_of_sweep(folder) if _is_sweep(folder) else _of_runs(folder), folder / FILE)


def _is_sweep(folder: Path) -> bool:
    """Whether a folder holds the jobs of one sweep and no other runs."""
    sweeps = jobs.by_sweep(folder)
    run_dirs = {run_dir for of in sweeps.values() for run_dir in of}
    if len(sweeps) != 1 or folder in run_dirs:
        return False
    homes = [path.parent for path in folder.rglob("metrics.json")]
    return all(run_dirs & {home, *home.parents} for home in homes)


def save(page: Page, path: Path) -> Path:
    """Write a page, and its plots and tables into the folder of its name without `.html`."""
    environment = Environment(
        loader=PackageLoader("caravan.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["breaks"] = _breakable
    environment.filters["light"] = partial(_source, theme=plots.LIGHT)
    environment.filters["dark"] = partial(_source, theme=plots.DARK)
    version = importlib.metadata.version("caravan-retrieval")
    text = environment.get_template("page.html").render(page=page, version=version)
    blocks = [block for section in page.sections for block in section.blocks]
    beside = path.with_suffix("")
    plots.write(beside, [block for block in blocks if isinstance(block, plots.Plot)])
    tables.write(beside, [block for block in blocks if isinstance(block, Table)])
    with replacing(path) as scratch:
        scratch.write_text(text, "utf-8")
    return path


def _breakable(text: str) -> Markup:
    """A text whose lines may break within paths, after a slash."""
    return Markup("/<wbr>").join(escape(part) for part in text.split("/"))


def _source(plot: plots.Plot, theme: plots.Theme) -> str:
    svg = plot.svg(theme, small=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def of_comparison(comparison: Comparison, command: str, count: int) -> Page:
    """The page of `compare`.

    Args:
        count: most improved and most degraded queries shown of each pair.
    """
    last = len(comparison.systems) - 1
    couples = [(i, last) for i in range(last)][:4]
    results = [comparison_tables(comparison)[0], *means(comparison)]
    sections = comparison_sections(comparison, couples, count=count)
    line = f"{' · '.join(comparison.names)}, on {comparison.queries:,} queries"
    return Page("A comparison", line, [Section("Results", "results", results), *sections], command)


def _of_runs(folder: Path) -> Page:
    """The page of one run directory, or of all those below a folder."""
    homes = [path.parent for path in sorted(folder.rglob("metrics.json"))]
    records = {home: read_metrics(home) or {} for home in homes}
    groups = _evaluated(folder, records)
    trained = {home: record for home, record in records.items() if "updates" in record}
    if not groups and not trained:
        message = f"{folder} holds no run with metrics (metrics.json)"
        raise InputError("no-runs", f"{message}; make one with train.py or evaluate.py")
    sections = []
    names: dict[str, str] = {}  # the evaluation of a collection of a suite is named after the suite
    if suites := [home for home, record in records.items() if "collections" in record]:
        sections.append(_suites(suites, records))
        for home in suites:
            name = str(home.relative_to(folder))
            name = records[home].get("system", ".") if name == "." else name
            inside = [home / member for member in records[home]["collections"]]
            names |= {str(path.relative_to(folder)): name for path in inside}
    elif len(groups) > 1:
        sections.append(_overview(folder, groups))
    sections += _evaluations(folder, groups, names)
    sections += training_sections(folder, trained)
    counts = {"evaluations": sum(map(len, groups.values())), "trainings": len(trained)}
    line = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    configs = sorted(folder.rglob("config.yaml"), key=lambda path: path.stat().st_mtime)
    return _page(folder, line, records, sections, [path.parent for path in configs])


def _of_sweep(folder: Path) -> Page:
    """The page of a sweep: its table, plots over what it varies, tests, curves and configs."""
    found = sweep.collect(folder)
    blocks: list[Any] = [f"Not finished: {job}: {reason}" for job, reason in found.failed]
    if found.rows and found.measures:
        blocks = [*sweep.tables(found), *sweep.plots(found)[:MOST_MEASURES], *blocks]
    # Each job is one system: its last stage.
    records = {home: {**r, "stages": r.get("stages", [])[-1:]} for home, r in found.records.items()}
    names = {str(home.relative_to(folder)): label for home, label in found.labels.items()}
    sections = [Section("Sweep", "sweep", blocks)]
    sections += _evaluations(folder, _evaluated(folder, records), names, against=0)
    sections += training_sections(folder, found.records, found.labels)
    line = f"a sweep over {', '.join(found.varied) or 'nothing'}: {len(found.labels)} jobs finished"
    line += f", {len(found.failed)} not" if found.failed else ""
    return _page(folder, line, records, sections, list(found.labels))


def _page(
    folder: Path,
    line: str,
    records: Mapping[Path, dict[str, Any]],
    sections: Sequence[Section],
    configs: Sequence[Path],
) -> Page:
    times = [(home / "metrics.json").stat().st_mtime for home, r in records.items() if r]
    line += f"; last metrics of {datetime.fromtimestamp(max(times)):%Y-%m-%d}" if times else ""
    command = shlex.join(["python", "-m", "caravan.report", "page", str(folder)])
    every = [*_facts(list(records.values())), *sections, *command_sections(folder, configs)]
    return Page(folder.resolve().name, line, every, command)


def _evaluated(folder: Path, records: Mapping[Path, dict[str, Any]]) -> Groups:
    """The records of evaluations, by collection and split, and by folder."""
    groups: Groups = {}
    for home, record in records.items():
        if has_scores(record) and record["run"]:
            refuse_partial(home, record)
            _, digest, split = judged_on(record)
            groups.setdefault((digest, split), {})[str(home.relative_to(folder))] = record
    return groups


def _evaluations(
    folder: Path, groups: Groups, names: dict[str, str], against: int = -2
) -> Iterator[Section]:
    count = FEW if len(groups) > 1 else SHOWN
    for number, records in enumerate(groups.values(), 1):
        prefix = f"{number}-" if len(groups) > 1 else ""
        yield from evaluation_sections(folder, records, names, prefix, count, against)


def _facts(records: Sequence[dict[str, Any]]) -> list[Section]:
    """The collection, hardware and model of runs; no section if the records have none of them."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        of, facts = record.get("collection"), record.get("facts", {})
        values = {
            "collection": f"{of['name']} ({of['digest'][:12]})" if isinstance(of, dict) else of,
            "split": record.get("split"),
            "device": facts.get("device"),
            "precision": facts.get("precision"),
            "base model": record.get("base_model"),
        }
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    items = [(name, ", ".join(values)) for name, values in found.items()]
    return [Section("Facts", "facts", [Facts(items)])] if items else []


# --- several collections --------------------------------------------------------------------------


def _suites(homes: list[Path], records: Mapping[Path, dict[str, Any]]) -> Section:
    """Evaluations of many collections, as `caravan.report collections` shows them."""
    try:
        # If none is finished at all, the error says why.
        finished = [home for home in homes if records[home]["collections"]]
        suites = collect_suites(read_suites(finished or homes))
        blocks = [suites.table(), *suites.notes]
    except InputError as error:
        blocks = [f"There is no table of all: {error}."]
    return Section("All collections", "overview", blocks)


def _overview(folder: Path, groups: Groups) -> Section:
    """All collections in one table: the first measure of each system, and its mean.

    A row is the evaluations of equal models and settings; a run file is a system of its own.
    """
    titles = [where(next(iter(records.values()))) for records in groups.values()]
    columns = distinct([[t, f"{t} ({d[:8]})"] for t, (d, _) in zip(titles, groups, strict=True)])
    measure = ""
    scores: dict[str, dict[str, float]] = {}
    names: dict[str, list[str]] = {}
    for column, records in zip(columns, groups.values(), strict=True):
        for home, record in records.items():
            measure = measure or next(iter(record["overall"]), "")
            if measure in record["overall"]:
                system = _system_digest(folder / home) or home
                system = home if column in scores.get(system, {}) else system
                scores.setdefault(system, {})[column] = record["overall"][measure]
                called = [record.get("system", home), str(Path(home).parent), home]
                names.setdefault(system, called)
    rows: list[list[float | None]] = []
    cells = []
    for name, of in zip(distinct(list(names.values())), scores.values(), strict=True):
        whole, row = len(of) == len(columns), [of.get(column) for column in columns]
        mean, some = fmean(of.values()), "" if whole else f" ({len(of)} of {len(columns)})"
        rows.append([*row, mean if whole else None])
        cells.append([name, *map(score, row), f"{mean:.4f}{some}"])
    caption = (
        f"{measure} on {len(columns)} collections, and the mean. A mean over some of them has their"
        " number behind it, and is not comparable with the others."
    )
    table = Table("overview", caption, ["system", *columns, "mean"], cells, strong=best(rows))
    return Section("All collections", "overview", [table])


def _system_digest(home: Path) -> str | None:
    """A digest of the models and settings of an evaluation, whatever its collection.

    None if they are unknown: metrics.json has no manifest, or a stage is a run file.
    """
    inputs = (manifests.read(home / "metrics.json") or {}).get("inputs")
    stages = inputs.get("stages") if isinstance(inputs, dict) else None
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return None
    if not stages or any("given" in stage for stage in stages):
        return None
    own = [{key: stage[key] for key in stage if key not in NOT_OF_THE_SYSTEM} for stage in stages]
    return manifests.digest(own)
