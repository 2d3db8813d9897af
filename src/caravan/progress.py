"""One progress bar for every loop that a person waits for: count, rate, time (by tqdm).

On a terminal it is drawn on stderr. Without a terminal a loop that takes longer than a second logs
a line now and then, and one at its end.

    for record in track(records, "corpus", unit="passages"): ...

    with progress("encode", len(texts), unit="texts") as done:
        done(len(chunk))
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

DELAY_S = 1.0
"""A loop that ends sooner shows nothing."""
LOG_INTERVAL_S = 30.0

log = logging.getLogger(__name__)
tqdm.monitor_interval = 0  # no thread: data loaders fork
T = TypeVar("T")


class _Log(io.StringIO):
    """A stream whose lines go to the log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            log.info(line)
        return len(text)


def track(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "records",
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Yield items and show how many there were.

    Args:
        total: units in all, if known.
        size: how many units an item is, such as the passages of a block.
    """
    with progress(what, total, unit) as done:
        for item in items:
            yield item
            done(size(item))


@contextmanager
def progress(
    what: str, total: int | None = None, unit: str = "records"
) -> Iterator[Callable[[int], object]]:
    """Show how much of a job is done; yields a function that adds units."""
    started, terminal = time.monotonic(), sys.stderr.isatty()
    of = "" if total is None else f" of {total:,}"
    bar = tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        delay=DELAY_S,
        miniters=1,
        file=sys.stderr if terminal else _Log(),
        mininterval=0.1 if terminal else LOG_INTERVAL_S,
        bar_format=None if terminal else f"{{desc}}: {{n:,}}{of}{{unit}}, {{rate_noinv_fmt}}",
        leave=False,
    )
    with bar:
        yield bar.update
    seconds = time.monotonic() - started
    if seconds > DELAY_S:
        log.info("%s: %s %s in %.1f s", what, f"{bar.n:,}", unit, seconds)
