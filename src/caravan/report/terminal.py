"""What `python -m caravan.report compare` prints: tables, then queries with their texts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from caravan.errors import InputError
from caravan.report import compare as comparing
from caravan.report import systems
from caravan.report.examples import DEPTH, Example, examples
from caravan.report.tables import Screen

WIDTH = 160
"""Characters of a passage."""


def compare(
    paths: Sequence[Path],
    qrels: Path | None,
    measures: Sequence[str],
    test: str,
    count: int,
    html: Path | None,
) -> None:
    """Print the comparison of two systems or more, and write its page if asked for.

    Raises:
        InputError: a run, a measure or the qrels are wrong; says which and what to do.
    """
    if len(paths) < 2:
        raise InputError("compare needs two runs or more; name another one")
    if count < 0:
        raise InputError(f"--queries {count}: give 0 or more")
    if html is not None and html.suffix != ".html":
        raise InputError(f"--html {html}: a page ends in .html; put --html behind the runs")
    found = systems.told_apart([systems.system(path) for path in paths])
    judged = systems.judged(found, qrels)
    comparison = comparing.compared(found, judged, measures, test)
    screen = Screen()
    for table in comparing.tables(comparison):
        screen.table(table)
    last = len(found) - 1
    gained, lost = examples(comparison, 0, last, count)
    names = comparison.names
    for what, some in (("gain", gained), ("lose", lost)):
        if some:
            screen.rule(f"{names[0]} → {names[last]}: queries that {what} most")
            for one in some:
                _print(screen, one, comparison.measure)
    if html is not None:
        from caravan.report.page import of_comparison, save

        said = ["python", "-m", "caravan.report", "compare", *map(str, paths)]
        said += ["--qrels", str(qrels)] if qrels else []
        said += ["--measures", ",".join(measures)] if measures else []
        said += ["--test", test] if test != "t" else []
        said += ["--queries", str(count), "--html", str(html)]
        page = of_comparison(comparison, shlex.join(said), count)
        save(page, html)
        beside = html.with_suffix("")
        screen.line(f"page {html}, plots and tables {beside}")


def _print(screen: Screen, one: Example, measure: str) -> None:
    line = screen.line
    line(f"{one.text or one.id}   {measure} {one.before:.3f} → {one.after:.3f}", "bold")
    for passage in one.passages:
        ranks = " → ".join(str(rank or f">{DEPTH}") for rank in passage.ranks)
        what = "relevant" if passage.grade >= 1 else "not judged relevant"
        what += f" (grade {passage.grade})" if passage.grade > 1 else ""
        line(f"  {ranks}  {passage.id}, {what}")
        text = " ".join(filter(None, (passage.title, passage.text)))
        if text:
            line(f"     {text if len(text) <= WIDTH else text[: WIDTH - 1] + '…'}", "dim")
