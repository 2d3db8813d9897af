"""One progress bar for every loop that a person waits for: count, rate, time.

On a terminal it is drawn (by rich, on stderr) once a second has passed; away from a terminal a loop
that takes longer than a second logs its start, its end, and between them how far it is, at
intervals that grow from ten seconds to five minutes.

    for record in track(records, "corpus", unit="passages"): ...

    with progress("encode", len(texts), unit="texts") as done:
        done(len(chunk))
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

DELAY_S = 1.0
"""A loop that ends sooner shows nothing."""

FIRST_LINE_S, LAST_LINE_S = 10.0, 300.0
"""The first and the longest interval between the lines of a log."""

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
    with progress(what, total, unit) as done:
        for item in items:
            yield item
            done(size(item))


@contextmanager
def progress(
    what: str, total: int | None = None, unit: str = "records"
) -> Iterator[Callable[[int], None]]:
    """Show how much of a job is done, by the function that this context gives: it adds units."""
    shown = _Shown(what, total, unit)
    try:
        yield shown.add
    finally:
        shown.end()


class _Shown:
    """The bar of one job on a terminal, else its lines in the log.

    A job within one that is shown stays silent: a terminal has room for one bar.
    """

    outermost: ClassVar[_Shown | None] = None

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.started = self.drawn = time.monotonic()
        self.interval = FIRST_LINE_S
        self.next_line = self.started + self.interval
        self.running = False
        self.bar: Progress | None = None

    def add(self, units: int) -> None:
        self.done += units
        now = time.monotonic()
        if now - self.started < DELAY_S or now - self.drawn < 0.1:
            return
        if _Shown.outermost not in (None, self):
            return
        self.drawn = now
        rate = f"{self.done / (now - self.started):,.0f}/s"
        if not self.running:
            self.running, _Shown.outermost = True, self
            if sys.stderr.isatty():
                self.bar = _bar(self.unit)
                self.task = self.bar.add_task(self.what, total=self.total, rate="")
                self.bar.start()
            log.info("%s: running", self.what)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, rate=rate)
        elif now >= self.next_line:
            self.next_line = now + self.interval
            self.interval = min(2 * self.interval, LAST_LINE_S)
            of = "" if self.total is None else f" of {self.total:,}"
            log.info("%s: %s %s, %s", self.what, f"{self.done:,}{of}", self.unit, rate)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
            self.bar.stop()
        if self.running:
            _Shown.outermost = None
            seconds = time.monotonic() - self.started
            log.info("%s: %d %s in %.1f s", self.what, self.done, self.unit, seconds)


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
