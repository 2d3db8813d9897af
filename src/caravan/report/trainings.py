"""The sections of trainings on a page: facts, learning curves, and the commands and configs.

Curves are read from the event files of TensorBoard, with its own reader.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caravan.report.plots import Line, Plot, lines
from caravan.report.tables import Code, Facts, Section, slug

MOST_TRAININGS = 12
MOST_CONFIGS = 12
POINTS = 300
"""Drawn of a curve; more cannot be seen."""
TAGS = ("train/", "val/")
"""The curves that are read; learning rates and epochs follow from the config."""
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
    events = EventAccumulator(
        str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False
    )  # 0: all of them
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(TAGS):
            logged = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
            by_step = {event.step: event.value for event in logged}
            steps = sorted(by_step)
            if len(steps) > POINTS:  # evenly, with the first and the last
                last = len(steps) - 1
                steps = [steps[round(i * last / (POINTS - 1))] for i in range(POINTS)]
            found[tag] = (steps, [by_step[step] for step in steps])
    return found


def training_sections(
    folder: Path,
    trainings: Mapping[Path, dict[str, Any]],
    labels: Mapping[Path, str] | None = None,
) -> list[Section]:
    """Facts of each training below a folder, and the curves of all.

    Args:
        trainings: `metrics.json` by run directory.
        labels: of the jobs of a sweep, which have no facts: the table of the sweep has them.
    """
    names = labels or {home: _name(home, folder) for home in trainings}
    shown = dict(list(trainings.items())[:MOST_TRAININGS])
    blocks: list[Any] = []
    if labels is None:
        blocks += [_facts(names[home], record) for home, record in shown.items()]
    if len(trainings) > len(shown):
        more = len(trainings) - len(shown)
        blocks.append(f"{more} more trainings are not shown; each folder can have a page.")
    curves = {names[home]: read_curves(home) for home in shown}
    watched = [record["monitored"] for record in shown.values() if record.get("monitored")]
    for tag in dict.fromkeys(("train/loss", *watched)):
        if drawn := [Line(name, *of[tag]) for name, of in curves.items() if tag in of]:
            caption = f"{tag} over updates; at the end " + ", ".join(
                f"{line.label}: {line.y[-1]:.4f}" for line in drawn
            )
            blocks.append(Plot(f"curves-{slug(tag)}", f"{caption}.", lines(drawn, "updates", tag)))
    return [Section("Training", "training", blocks)] if blocks else []


def _facts(name: str, record: dict[str, Any]) -> Facts:
    """What metrics.json contains of a training; its config is at the end of the page."""
    kinds = {
        "base_model": "{}",
        "collection": "{}",
        "updates": "{:,}",
        "trained_parameters": "{:,}",
        "memory_gib": "{:.1f} GiB",
        "train_seconds": "{:,.0f}",
        "best": "{:.4f}",
    }
    names = {
        "trained_parameters": "trained weights",
        "memory_gib": "memory",
        "train_seconds": "seconds",
        "best": f"best {record.get('monitored')}",
    }
    return Facts(
        [
            (names.get(key, key.replace("_", " ")), kind.format(record[key]))
            for key, kind in kinds.items()
            if record.get(key) is not None
        ],
        name,
    )


def command_sections(folder: Path, homes: Sequence[Path]) -> list[Section]:
    """The commands and resolved configs of runs."""
    commands: dict[str, None] = {}
    configs: list[Code] = []
    for home in homes:
        path = home / "config.yaml"
        if not path.is_file():
            continue
        text = path.read_text("utf-8", errors="replace")
        head, _, rest = text.partition("\n")
        if head.startswith("# "):
            commands[head.removeprefix("# ")] = None
            text = rest
        configs.append(Code(f"{_name(home, folder)}/config.yaml", text))
    if not configs:
        return []
    blocks: list[Any] = ["These runs have no recorded command."]
    if commands:
        blocks = [Code("commands", "\n".join(commands), folded=False)]
    blocks += configs[:MOST_CONFIGS]
    if len(configs) > MOST_CONFIGS:
        more = len(configs) - MOST_CONFIGS
        blocks.append(f"The configs of {more} more runs are in their folders.")
    return [Section("Commands and configs", "made", blocks)]


def _name(home: Path, folder: Path) -> str:
    return str(home.relative_to(folder)) if home != folder else home.resolve().name
