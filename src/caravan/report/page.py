"""One HTML page for a run, several runs or a sweep; it contains everything and opens offline.

    python -m caravan.report page runs/quickstart

Written as report.html into the folder; report/ beside it has each plot as png and svg with its
caption, and each table as Markdown and LaTeX. The page runs no script and loads nothing over the
network (a policy in its head forbids both), and every text is escaped.
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

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from caravan.errors import InputError
from caravan.files import replacing
from caravan.report import sweep, verdict
from caravan.report.compare import Comparison
from caravan.report.evaluations import (
    comparison_sections,
    comparison_tables,
    evaluation_sections,
    means,
)
from caravan.report.plots import Line, Plot, lines
from caravan.report.records import Evaluation, Suite, Training, read_jobs, read_metrics
from caravan.report.summary import collect_suites, means_sentence, read_suites, suites_table
from caravan.report.tables import Code, Section, Table, slug
from caravan.report.tables import show as show_block

FILE = "report.html"
MOST_MEASURES = 6  # plots of a sweep
MOST = 12  # trainings, and configs, shown on a page
POINTS = 300  # drawn of a curve; more cannot be seen
TAGS = ("train/", "val/")
"""The curves that are read; learning rates and epochs follow from the config."""
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


def show(folder: Path) -> None:
    """Write the page and print its path."""
    path = write(folder)
    show_block(f"page {path}, plots and tables {path.with_suffix('')}")


def write(folder: Path) -> Path:
    """Write the page of a run directory, a folder of several, or a sweep; returns its path.

    Raises:
        InputError: If the folder holds no run.
    """
    return save(_of_runs(folder), folder / FILE)


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


def _of_runs(folder: Path) -> Page:
    """The page of one run directory, or of all those below a folder."""
    paths = sorted(folder.rglob("metrics.json"))
    records = {path.parent: read_metrics(path.parent) for path in paths}
    sections: list[Section] = []
    counts, texts = [], []
    names: dict[Path, str] = {}
    of_sweep = None
    own, _ = read_jobs(folder)
    if own and folder not in own:
        of_sweep = sweep.collect(folder)
        sections.append(_sweep_section(of_sweep))
        counts.append(f"a sweep over {verdict.listed(of_sweep.varied or ['nothing'])}")
        names |= of_sweep.labels
        for home, record in of_sweep.records.items():
            if isinstance(record, Evaluation):  # each job is one system: its last stage
                records[home] = record.model_copy(update={"stages": record.stages[-1:]})
    suites = {home: record for home, record in records.items() if isinstance(record, Suite)}
    for home, suite in suites.items():  # name the evaluation of a collection after its suite
        name = suite.system if home == folder else str(home.relative_to(folder))
        names |= {home / member: name for member in suite.collections}
    evaluations = {
        home: record
        for home, record in records.items()
        if isinstance(record, Evaluation) and home not in suites
    }
    trained = {home: record for home, record in records.items() if isinstance(record, Training)}
    if not records and not sections:
        message = f"{folder} holds no run with metrics (metrics.json)"
        raise InputError("no-runs", f"{message}; make one with train.py or evaluate.py")
    if suites:
        section, text = _suites_section(suites)
        sections.append(section)
        texts += [text] if text else []
    of_evaluations, comparisons = evaluation_sections(folder, evaluations, names)
    sections += of_evaluations
    if of_sweep and (sweep.SEED in of_sweep.varied or not comparisons):
        texts.insert(0, verdict.of_sweep(of_sweep))
    texts += [verdict.of_evaluations(comparisons)] if comparisons else []
    labelled = {names.get(home, _name(home, folder)): home for home in trained}
    trainings = {name: trained[home] for name, home in labelled.items()}
    texts = texts or [verdict.of_trainings(trainings)]
    if trained:
        sections.append(_trainings_section(trainings, labelled))
    for number, noun in ((len(evaluations), "evaluation"), (len(trained), "training")):
        counts += [verdict.count(number, noun)] if number else []
    sections += _commands_section(folder)
    line = ", ".join(counts)
    if paths:
        last = max(path.stat().st_mtime for path in paths)
        line += f"; last metrics of {datetime.fromtimestamp(last):%Y-%m-%d}"
    command = shlex.join(["python", "-m", "caravan.report", "page", str(folder)])
    note = SCORES if comparisons else ""
    return Page(folder.resolve().name, line, sections, command, " ".join(texts), note)


def _sweep_section(found: sweep.Sweep) -> Section:
    """The shortest tables of a sweep, plots, the other tables, and the jobs that failed."""
    made = sweep.tables(found)
    first = [table for table in made if table.name not in sweep.LONG] or made[-1:]
    rest = [table for table in made if table not in first]
    blocks: list[Any] = [*first, *sweep.plots(found)[:MOST_MEASURES], *rest]
    blocks += [f"Not finished: {job}: {reason}" for job, reason in found.failed]
    return Section("Sweep", "sweep", blocks)


def _suites_section(suites: Mapping[Path, Suite]) -> tuple[Section, str]:
    """The table of all suites with its sentence; if none is finished at all, the error says why."""
    sentence = ""
    try:
        finished = [home for home, suite in suites.items() if suite.collections]
        scores, notes = collect_suites(read_suites(finished or list(suites)))
        blocks: list[Any] = [suites_table(scores), *notes]
        sentence = means_sentence(scores)
    except InputError as error:
        blocks = [f"There is no table of all: {error}."]
    return Section("All collections", "overview", blocks), sentence


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
    every = {"scalars": 0}
    events = EventAccumulator(str(folder), size_guidance=every, purge_orphaned_data=False)
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(TAGS):
            logged = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
            by_step = {event.step: event.value for event in logged}
            steps = sorted(by_step)
            if len(steps) > POINTS:  # evenly, with the first and the last
                steps = [
                    steps[i] for i in np.linspace(0, len(steps) - 1, POINTS).round().astype(int)
                ]
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


def _commands_section(folder: Path) -> list[Section]:
    """The commands and resolved configs of runs, the oldest first."""
    commands: dict[str, None] = {}
    configs: list[Code] = []
    for path in sorted(folder.rglob("config.yaml"), key=lambda path: path.stat().st_mtime):
        text = path.read_text("utf-8", errors="replace")
        if text.startswith("# "):
            head, _, text = text.partition("\n")
            commands[head.removeprefix("# ")] = None
        configs.append(Code(f"{_name(path.parent, folder)}/config.yaml", text))
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
