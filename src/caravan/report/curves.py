"""The curves of a training, from the event files that TensorBoard reads, by its own reader."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

EVENT_FILES = "events.out.tfevents.*"
POINTS = 300
"""Of a curve that are drawn: more do not show."""

SHOWN = ("train/", "val/")
"""What is read of it; learning rates and epochs follow from the config."""


@dataclass(frozen=True)
class Curve:
    steps: list[int]
    values: list[float]


def read(run_dir: Path) -> dict[str, Curve]:
    """Scalars by tag, of all event files of a run: it may have been resumed.

    A step that was logged again, because the run went back to a checkpoint, counts as it was last.
    """
    folder = run_dir / "tensorboard"
    if not any(folder.glob(EVENT_FILES)):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # It tells of orphaned events, which are those that a resumed run has replaced.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(SHOWN):
            by_step = {event.step: event.value for event in events.Scalars(tag)}
            steps = _thinned(sorted(by_step))
            found[tag] = Curve(steps, [by_step[step] for step in steps])
    return found


def _thinned(steps: list[int]) -> list[int]:
    """At most so many, evenly taken, first and last among them."""
    if len(steps) <= POINTS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (POINTS - 1))] for i in range(POINTS)]
