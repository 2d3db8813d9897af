"""One HTML page for a run, several runs or a sweep; it contains everything and opens offline.

    python -m caravan.report page runs/quickstart

Written as report.html into the folder, or the one that holds all of several; report/ beside it has
each plot as png and svg with its caption, and each table as Markdown and LaTeX. A sweep also gets
sweep.csv. The page runs no script and loads nothing over the network (a policy in its head forbids
both), and every text is escaped.
"""

from __future__ import annotations

import base64
import importlib.metadata
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from caravan.errors import InputError
from caravan.files import replacing
from caravan.report import jobs, sweep, verdict
from caravan.report.compare import Comparison
from caravan.report.contents import Contents
from caravan.report.evaluations import (
    comparison_sections,
    comparison_tables,
    evaluation_sections,
    means,
)
from caravan.report.plots import Line, Plot, lines
from caravan.report.records import Training
from caravan.report.summary import suites_section
from caravan.report.tables import Code, Section, Table, slug
from caravan.report.tables import show as show_block

FILE = "report.html"
MOST = 12  # trainings, and configs, shown on a page
POINTS = 300  # drawn of a curve; more cannot be seen
SCORES = "Scores are those of ir_measures; a query that a run lacks counts 0."
FACTS = {
    "base_model": "base model",
    "collection": "collection",
    "monitored": "monitored",
    "best": "best",
    "updates": "updates",
    "trained_parameters": "trained weights",
    "memory_gib": "GiB",
    "train_seconds": "seconds",
}
"""Values of a training's metrics.json, and their columns."""
TEXTS = ("base model", "collection", "monitored")  # columns
FORMATS = {"updates": "{:,}", "trained weights": "{:,}", "GiB": "{:.1f}", "seconds": "{:,.0f}"}
BREAKS = r"(?<=[/,_])|(?<=[a-z]\.)(?=[a-z])"
"""Where lines may break within paths and names, but not within numbers."""
Curves = dict[str, tuple[list[int], list[float]]]
"""(updates, values) of one training, by tag."""


@dataclass(frozen=True)
class Page:
    """A title, a line and the verdict below it, sections, and the command that makes it again."""

    title: str
    line: str
    sections: Sequence[Section]
    command: str
    verdict: str
    note: str = SCORES


def show(contents: Contents) -> None:
    """Write the page and print its path."""
    path = write(contents)
    show_block(f"page {path}, plots and tables {path.with_suffix('')}")


def write(contents: Contents) -> Path:
    """Write the page of a run, several runs or a sweep; returns its path."""
    if contents.sweep is not None:
        sweep.write(contents.sweep, contents.folder / jobs.TABLE)
    return save(_of_runs(contents), contents.folder / FILE)


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
        return Markup("<wbr>").join(escape(part) for part in re.split(BREAKS, text))

    def source(plot: Plot, theme: str) -> str:
        svg = plot.svg(theme, page=True).encode()
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

    environment.filters |= {
        "breaks": breaks,
        "kind": lambda block: type(block).__name__,
        "source": source,
    }
    version = importlib.metadata.version("caravan-retrieval")
    text = environment.get_template("page.html").render(page=page, version=version)
    beside, captions = path.with_suffix(""), ["# Captions", ""]
    for block in (block for section in page.sections for block in section.blocks):
        if isinstance(block, Plot | Table):
            block.write(beside)
        if isinstance(block, Plot):
            captions += [f"**{block.name}**: {block.caption}", ""]
    for file, content in ((beside / "captions.md", "\n".join(captions)), (path, text)):
        with replacing(file) as scratch:
            scratch.write_text(content, "utf-8")
    return path


def of_comparison(comparison: Comparison, command: str, count: int) -> Page:
    """The page of `compare`, with the `count` most improved and degraded queries of a pair."""
    last = len(comparison.systems) - 1
    couples = [(i, last) for i in range(last)][:4]
    results = [comparison_tables(comparison)[0], *means(comparison)]
    sections = comparison_sections(comparison, couples, count)
    line = f"{' · '.join(comparison.names)}, on {comparison.queries:,} queries"
    sections = [Section("Results", "results", results), *sections]
    return Page("A comparison", line, sections, command, verdict.of_comparison(comparison))


def _of_runs(contents: Contents) -> Page:
    """The page of all runs below folders."""
    folder, names, of_sweep = contents.folder, contents.names, contents.sweep
    sections: list[Section] = []
    counts, texts = [], []
    if of_sweep is not None:
        sections.append(sweep.section(of_sweep))
        counts.append(f"a sweep over {verdict.listed(of_sweep.varied or ['nothing'])}")
    if contents.suites:
        try:
            section, text = suites_section(contents.suites)
        except InputError as error:
            section, text = Section("All collections", "overview", [f"No table: {error}."]), ""
        sections.append(section)
        texts += [text] if text else []
    of_evaluations, comparisons = evaluation_sections(folder, contents.evaluations, names)
    sections += of_evaluations
    if of_sweep and (sweep.SEED in of_sweep.varied or not comparisons):
        texts.insert(0, verdict.of_sweep(of_sweep))
    texts += [verdict.of_evaluations(comparisons)] if comparisons else []
    labelled = {names.get(home, _name(home, folder)): home for home in contents.trainings}
    trainings = {name: contents.trainings[home] for name, home in labelled.items()}
    texts = texts or [verdict.of_trainings(trainings)]
    if trainings:
        sections.append(_trainings_section(trainings, labelled))
    for number, noun in ((len(contents.evaluations), "evaluation"), (len(trainings), "training")):
        counts += [verdict.count(number, noun)] if number else []
    sections += _commands_section(contents)
    line = ", ".join(counts)
    homes = [*contents.suites, *contents.evaluations, *contents.trainings]
    if homes:
        last = max((home / "metrics.json").stat().st_mtime for home in homes)
        line += f"; last metrics of {datetime.fromtimestamp(last):%Y-%m-%d}"
    command = shlex.join(["python", "-m", "caravan.report", "page", *map(str, contents.folders)])
    note = SCORES if comparisons else ""
    return Page(folder.resolve().name, line, sections, command, " ".join(texts), note)


def read_curves(run_dir: Path) -> Curves:
    """The scalars of all event files of a run, which may have been resumed.

    A step that was logged twice, because the run resumed from a checkpoint, has its last value.
    """
    folder = run_dir / "tensorboard"
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    # Files of the same second are read in an arbitrary order, so replaced steps are found by time.
    events = EventAccumulator(str(folder), {"scalars": POINTS}, purge_orphaned_data=False)
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        logged = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
        by_step = {event.step: event.value for event in logged}
        steps = sorted(by_step)
        found[tag] = (steps, [by_step[step] for step in steps])
    return found


def _trainings_section(trainings: Mapping[str, Training], homes: Mapping[str, Path]) -> Section:
    """Trainings by name, and their curves."""
    shown = dict(list(trainings.items())[:MOST])
    blocks: list[Any] = [_trainings_table(shown)]
    if more := len(trainings) - len(shown):
        blocks.append(f"{more} more trainings are not shown; each folder can have a page.")
    curves = {name: read_curves(homes[name]) for name in shown}
    watched = [one.monitored for one in shown.values() if one.monitored]
    for tag in dict.fromkeys(("train/loss", *watched)):
        drawn = [Line(name, *of[tag]) for name, of in curves.items() if tag in of]
        if any(len(line.x) > 1 for line in drawn):  # a dot is no curve
            ends = ", ".join(f"{line.label}: {line.y[-1]:.4f}" for line in drawn)
            caption = f"{tag} over updates; at the end {ends}."
            blocks.append(Plot(f"curves-{slug(tag)}", caption, lines(drawn, "updates", tag)))
    return Section("Training", "training", blocks)


def _trainings_table(trainings: Mapping[str, Training]) -> Table:
    """What metrics.json has of each training; what all share is in the caption."""
    caption = "Trainings, with the best validation of each. GiB: peak memory"
    facts = {head: [getattr(one, key) for one in trainings.values()] for key, head in FACTS.items()}
    for head in TEXTS:
        if len(found := set(facts[head])) == 1 and (text := found.pop()):
            caption += f"; {head}: {text}"
            del facts[head]
    frame = pd.DataFrame({"training": list(trainings), **facts}, dtype=object)
    labels = 1 + sum(head in facts for head in TEXTS)
    return Table.of("trainings", f"{caption}.", frame, FORMATS, labels)


def _commands_section(contents: Contents) -> list[Section]:
    """The commands and resolved configs of runs, the oldest first."""
    commands: dict[str, None] = {}
    configs: list[Code] = []
    paths = [path for folder in contents.folders for path in folder.rglob("config.yaml")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        text = path.read_text("utf-8", errors="replace")
        if text.startswith("# "):
            head, _, text = text.partition("\n")
            commands[head.removeprefix("# ")] = None
        configs.append(Code(f"{_name(path.parent, contents.folder)}/config.yaml", text))
    if not configs:
        return []
    blocks: list[Any] = ["These runs have no recorded command."]
    if commands:
        blocks = [Code("commands", "\n".join(commands), folded=False)]
    blocks += configs[:MOST]
    if more := len(configs[MOST:]):
        blocks.append(f"The configs of {more} more runs are in their folders.")
    return [Section("Commands and configs", "made", blocks)]


def _name(home: Path, folder: Path) -> str:
    return str(home.relative_to(folder)) if home != folder else home.resolve().name
