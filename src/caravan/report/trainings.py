"""The sections of trainings on a page: facts, learning curves, and the commands and configs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caravan.report.plots import Line, Plot, lines
from caravan.report.tables import Code, Facts, Section, slug

MOST = 12
"""Trainings, and configs, shown on a page."""
POINTS = 300
"""Drawn of a curve; more cannot be seen."""
TAGS = ("train/", "val/")
"""The curves that are read; learning rates and epochs follow from the config."""
FACTS = {
    "base_model": ("base model", "{}"),
    "collection": ("collection", "{}"),
    "updates": ("updates", "{:,}"),
    "trained_parameters": ("trained weights", "{:,}"),
    "memory_gib": ("memory", "{:.1f} GiB"),
    "train_seconds": ("seconds", "{:,.0f}"),
}
"""Values of a training's metrics.json: their names on the page, and their formats."""
Curves = dict[str, tuple[list[int], list[float]]]
"""(updates, values) of one training, by tag."""


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
    folder: Path,
    trainings: Mapping[Path, dict[str, Any]],
    labels: Mapping[str, str],
) -> list[Section]:
    """Facts of each training below a folder, and the curves of all.

    Args:
        trainings: `metrics.json` by run directory.
        labels: names of trainings by folder below `folder`, if they are not those of their folders.
    """
    places = {home: _name(home, folder) for home in trainings}
    names = {home: labels.get(place, place) for home, place in places.items()}
    shown = dict(list(trainings.items())[:MOST])
    blocks: list[Any] = [_facts(names[home], record) for home, record in shown.items()]
    if more := len(trainings) - len(shown):
        blocks.append(f"{more} more trainings are not shown; each folder can have a page.")
    curves = {names[home]: read_curves(home) for home in shown}
    watched = [record["monitored"] for record in shown.values() if record.get("monitored")]
    for tag in dict.fromkeys(("train/loss", *watched)):
        if drawn := [Line(name, *of[tag]) for name, of in curves.items() if tag in of]:
            ends = ", ".join(f"{line.label}: {line.y[-1]:.4f}" for line in drawn)
            caption = f"{tag} over updates; at the end {ends}."
            blocks.append(Plot(f"curves-{slug(tag)}", caption, lines(drawn, "updates", tag)))
    return [Section("Training", "training", blocks)] if blocks else []


def _facts(title: str, record: dict[str, Any]) -> Facts:
    shown = {**FACTS, "best": (f"best {record.get('monitored')}", "{:.4f}")}
    known = {key: of for key, of in shown.items() if record.get(key) is not None}
    return Facts([(name, form.format(record[key])) for key, (name, form) in known.items()], title)


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
