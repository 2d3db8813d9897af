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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from caravan.errors import InputError
from caravan.files import replacing
from caravan.report import jobs, plots, sweep, tables
from caravan.report.compare import Comparison
from caravan.report.evaluations import (
    comparison_sections,
    comparison_tables,
    evaluation_sections,
    means,
)
from caravan.report.records import has_scores, read_metrics
from caravan.report.suites import collect_suites, read_suites
from caravan.report.tables import Facts, Section, Table
from caravan.report.trainings import command_sections, training_sections

FILE = "report.html"
MOST_MEASURES = 6


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

    def breaks(text: str) -> Markup:
        """Lines may break within paths, after a slash."""
        return Markup("/<wbr>").join(escape(part) for part in text.split("/"))

    def source(plot: plots.Plot, theme: plots.Theme) -> str:
        svg = plot.svg(theme, small=True).encode()
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

    environment.filters |= {
        "breaks": breaks,
        "dark": partial(source, theme=plots.DARK),
        "kind": lambda block: type(block).__name__,
        "light": partial(source, theme=plots.LIGHT),
    }
    version = importlib.metadata.version("caravan-retrieval")
    text = environment.get_template("page.html").render(page=page, version=version)
    blocks = [block for section in page.sections for block in section.blocks]
    beside = path.with_suffix("")
    plots.write(beside, [block for block in blocks if isinstance(block, plots.Plot)])
    tables.write(beside, [block for block in blocks if isinstance(block, Table)])
    with replacing(path) as scratch:
        scratch.write_text(text, "utf-8")
    return path


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
    sections: list[Section] = []
    names: dict[str, str] = {}  # the evaluation of a collection of a suite is named after the suite
    suites = {home: record for home, record in records.items() if "collections" in record}
    for home, record in suites.items():
        name = record.get("system", ".") if home == folder else str(home.relative_to(folder))
        inside = [home / member for member in record["collections"]]
        names |= {str(path.relative_to(folder)): name for path in inside}
    if suites:
        try:
            # If none is finished at all, the error says why.
            finished = [home for home, record in suites.items() if record["collections"]]
            found = collect_suites(read_suites(finished or list(suites)))
            blocks = [found.table(), *found.notes]
        except InputError as error:
            blocks = [f"There is no table of all: {error}."]
        sections.append(Section("All collections", "overview", blocks))
    evaluated = evaluation_sections(folder, records, names)
    trained = {home: record for home, record in records.items() if "updates" in record}
    if not evaluated and not trained:
        message = f"{folder} holds no run with metrics (metrics.json)"
        raise InputError("no-runs", f"{message}; make one with train.py or evaluate.py")
    sections += [*evaluated, *training_sections(folder, trained)]
    number = sum(has_scores(record) and bool(record["run"]) for record in records.values())
    counts = {"evaluations": number, "trainings": len(trained)}
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
    sections += evaluation_sections(folder, records, names, against=0)
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
    """Add the facts that runs share, and their commands and configs."""
    facts: dict[str, dict[str, None]] = {}
    for record in records.values():
        of, made = record.get("collection"), record.get("facts", {})
        values = {
            "collection": f"{of['name']} ({of['digest'][:12]})" if isinstance(of, dict) else of,
            "split": record.get("split"),
            "device": made.get("device"),
            "precision": made.get("precision"),
            "base model": record.get("base_model"),
        }
        for name, value in values.items():
            if value is not None:
                facts.setdefault(name, {})[str(value)] = None
    first = Facts([(name, ", ".join(values)) for name, values in facts.items()])
    every = [Section("Facts", "facts", [first])] if facts else []
    every += [*sections, *command_sections(folder, configs)]
    times = [(home / "metrics.json").stat().st_mtime for home, r in records.items() if r]
    line += f"; last metrics of {datetime.fromtimestamp(max(times)):%Y-%m-%d}" if times else ""
    command = shlex.join(["python", "-m", "caravan.report", "page", str(folder)])
    return Page(folder.resolve().name, line, every, command)
