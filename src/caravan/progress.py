"""One progress bar for every loop that a person waits for: count, rate, time.

On a terminal it is drawn (by rich, on stderr) once a second has gone by; away from a terminal
nothing is drawn, and a loop that takes longer than a second logs two lines: its start and its end.

    for record in track(records, "corpus", unit="passages"): ...
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

DELAY_S = 1.0
"""A loop that ends sooner shows nothing."""

log = logging.getLogger(__name__)
T = TypeVar("T")


def track(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "records",
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Pass items on and show how many there were; `total` (if known) gives a bar and an end.

    Args:
        size: how many units one item is, such as the passages of a block.
    """
    started = shown = time.monotonic()
    bar = None
    done = 0
    try:
        for item in items:
            yield item
            done += size(item)
            now = time.monotonic()
            if now - started < DELAY_S or now - shown < 0.1:
                continue
            shown = now
            if bar is None:
                bar = _bar(unit)
                task = bar.add_task(what, total=total, rate="")
                if sys.stderr.isatty():
                    bar.start()
                log.info("%s: running", what)
            bar.update(task, completed=done, rate=f"{done / (now - started):,.0f}/s")
    finally:
        if bar is not None:
            bar.update(task, completed=done)
            if sys.stderr.isatty():
                bar.stop()
            log.info("%s: %d %s in %.1f s", what, done, unit, time.monotonic() - started)


def _bar(unit: str) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
