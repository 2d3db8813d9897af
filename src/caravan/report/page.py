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
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from caravan.errors import InputError
from caravan.files import replacing
from caravan.report import jobs, plots, sweep, tables, verdict
from caravan.report.compare import Comparison
from caravan.report.evaluations import (
    comparison_sections,
    comparison_tables,
    evaluation_sections,
    means,
)
from caravan.report.plots import Line, Plot, lines
from caravan.report.records import has_scores, read_metrics
from caravan.report.summary import collect_suites, means_sentence, read_suites, suites_table
from caravan.report.tables import NONE, Code, Section, Table, slug

FILE = "report.html"
MOST_MEASURES = 6
"""Plots of a sweep."""
MOST = 12
"""Trainings, and configs, shown on a page."""
POINTS = 300
"""Drawn of a curve; more cannot be seen."""
TAGS = ("train/", "val/")
"""The curves that are read; learning rates and epochs follow from the config."""
SCORES = "Scores are those of ir_measures; a query that a run lacks counts 0."
FACTS = {
    "base_model": ("base model", "{}"),
    "collection": ("collection", "{}"),
    "monitored": ("monitored", "{}"),
    "best": ("best", "{:.4f}"),
    "updates": ("updates", "{:,}"),
    "trained_parameters": ("trained weights", "{:,}"),
    "memory_gib": ("GiB", "{:.1f}"),
    "train_seconds": ("seconds", "{:,.0f}"),
}
"""Values of a training's metrics.json: their columns, and their formats."""
TEXTS = ("base_model", "collection", "monitored")
"""The first of `FACTS`, which are no numbers."""
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
    tables.show(f"page {path}, plots and tables {path.with_suffix('')}")


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
    blocks = [block for section in page.sections for block in section.blocks]
    beside = path.with_suffix("")
    plots.write(beside, [block for block in blocks if isinstance(block, Plot)])
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
    sections = [Section("Results", "results", results), *sections]
    return Page("A comparison", line, sections, command, verdict.of_comparison(comparison))


def _of_runs(folder: Path) -> Page:
    """The page of one run directory, or of all those below a folder."""
    homes = [path.parent for path in sorted(folder.rglob("metrics.json"))]
    records = {home: read_metrics(home) or {} for home in homes}
    sections, counts, names = [], [], {}
    texts, of_sweep = [], None
    own, _ = jobs.read(folder)
    if own and folder not in own:
        found = sweep.collect(folder)
        sections.append(_of_sweep(found))
        of_sweep = found
        counts.append(f"a sweep over {verdict.listed(found.varied or ['nothing'])}")
        names = {str(home.relative_to(folder)): label for home, label in found.labels.items()}
        # Each job is one system: its last stage.
        for home, record in found.records.items():
            records[home] = {**record, "stages": record.get("stages", [])[-1:]}
    suites = {home: record for home, record in records.items() if "collections" in record}
    for home, record in suites.items():  # name the evaluation of a collection after its suite
        name = record.get("system", ".") if home == folder else str(home.relative_to(folder))
        inside = [home / member for member in record["collections"]]
        names |= {str(path.relative_to(folder)): name for path in inside}
    evaluations = [home for home, record in records.items() if has_scores(record) and record["run"]]
    trained = {home: record for home, record in records.items() if "updates" in record}
    if not evaluations and not trained and not sections:
        message = f"{folder} holds no run with metrics (metrics.json)"
        raise InputError("no-runs", f"{message}; make one with train.py or evaluate.py")
    if suites:
        section, text = _of_suites(suites)
        sections.append(section)
        texts += [text] if text else []
    of_evaluations, comparisons = evaluation_sections(folder, records, names)
    sections += of_evaluations
    if of_sweep and (sweep.SEED in of_sweep.varied or not comparisons):
        texts.insert(0, verdict.of_sweep(of_sweep))
    texts += [verdict.of_evaluations(comparisons)] if comparisons else []
    labels = {home: names.get(place := _name(home, folder), place) for home in trained}
    texts = texts or [verdict.of_trainings({labels[home]: of for home, of in trained.items()})]
    sections += training_sections(trained, labels)
    for number, noun in ((len(evaluations), "evaluation"), (len(trained), "training")):
        counts += [verdict.count(number, noun)] if number else []
    configs = sorted(folder.rglob("config.yaml"), key=lambda path: path.stat().st_mtime)
    sections += command_sections(folder, [path.parent for path in configs])
    times = [(home / "metrics.json").stat().st_mtime for home, record in records.items() if record]
    line = ", ".join(counts)
    line += f"; last metrics of {datetime.fromtimestamp(max(times)):%Y-%m-%d}" if times else ""
    command = shlex.join(["python", "-m", "caravan.report", "page", str(folder)])
    note = SCORES if comparisons else ""
    return Page(folder.resolve().name, line, sections, command, " ".join(texts), note)


def _of_sweep(found: sweep.Sweep) -> Section:
    """The shortest tables of a sweep, plots, the other tables, and the jobs that failed."""
    made = sweep.tables(found)
    first = [table for table in made if table.name not in sweep.LONG] or made[-1:]
    rest = [table for table in made if table not in first]
    blocks: list[Any] = [*first, *sweep.plots(found)[:MOST_MEASURES], *rest]
    blocks += [f"Not finished: {job}: {reason}" for job, reason in found.failed]
    return Section("Sweep", "sweep", blocks)


def _of_suites(suites: Mapping[Path, dict[str, Any]]) -> tuple[Section, str]:
    """The table of all suites with its sentence; if none is finished at all, the error says why."""
    sentence = ""
    try:
        finished = [home for home, record in suites.items() if record["collections"]]
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


def training_sections(
    trainings: Mapping[Path, dict[str, Any]], names: Mapping[Path, str]
) -> list[Section]:
    """Trainings, and their curves.

    Args:
        trainings: `metrics.json` by run directory; names: by run directory.
    """
    shown = dict(list(trainings.items())[:MOST])
    if not shown:
        return []
    blocks: list[Any] = [_trainings_table({names[home]: of for home, of in shown.items()})]
    if more := len(trainings) - len(shown):
        blocks.append(f"{more} more trainings are not shown; each folder can have a page.")
    curves = {names[home]: read_curves(home) for home in shown}
    watched = [record["monitored"] for record in shown.values() if record.get("monitored")]
    for tag in dict.fromkeys(("train/loss", *watched)):
        drawn = [Line(name, *of[tag]) for name, of in curves.items() if tag in of]
        if any(len(line.x) > 1 for line in drawn):  # a dot is no curve
            ends = ", ".join(f"{line.label}: {line.y[-1]:.4f}" for line in drawn)
            caption = f"{tag} over updates; at the end {ends}."
            blocks.append(Plot(f"curves-{slug(tag)}", caption, lines(drawn, "updates", tag)))
    return [Section("Training", "training", blocks)]


def _trainings_table(trainings: Mapping[str, dict[str, Any]]) -> Table:
    """What metrics.json has of each training, by name."""
    facts, caption = dict(FACTS), "Trainings, with the best validation of each. GiB: peak memory"
    for key in TEXTS:  # what all share
        found = {of.get(key) for of in trainings.values()}
        if len(found) == 1 and (text := found.pop()):
            head, _ = facts.pop(key)
            if key == "monitored":
                facts["best"] = (f"best {text}", FACTS["best"][1])
            else:
                caption += f"; {head}: {text}"
    cells = [
        [
            name,
            *(
                NONE if of.get(key) is None else form.format(of[key])
                for key, (_, form) in facts.items()
            ),
        ]
        for name, of in trainings.items()
    ]
    heads = ["training", *(name for name, _ in facts.values())]
    labels = 1 + sum(key in facts for key in TEXTS)
    return Table("trainings", f"{caption}.", heads, cells, labels)


def command_sections(folder: Path, homes: Sequence[Path]) -> list[Section]:
    """The commands and resolved configs of runs."""
    commands: dict[str, None] = {}
    configs: list[Code] = []
    for home in homes:
        path = home / "config.yaml"
        if not path.is_file():
            continue
        text = path.read_text("utf-8", errors="replace")
        if text.startswith("# "):
            head, _, text = text.partition("\n")
            commands[head.removeprefix("# ")] = None
        configs.append(Code(f"{_name(home, folder)}/config.yaml", text))
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
