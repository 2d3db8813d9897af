"""What `python -m caravan.report compare` prints: tables, then queries with their texts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.report import compare as comparing
from caravan.report import systems
from caravan.report.examples import DEPTH, Example, examples

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
    from rich.console import Console

    if len(paths) < 2:
        raise InputError("compare needs two runs or more; name another one")
    if count < 0:
        raise InputError(f"--queries {count}: give 0 or more")
    if html is not None and html.suffix != ".html":
        raise InputError(f"--html {html}: a page ends in .html; put --html behind the runs")
    found = systems.told_apart([systems.system(path) for path in paths])
    judged = systems.judged(found, qrels)
    comparison = comparing.compared(found, judged, measures, test)
    console = Console(soft_wrap=True)
    for table in comparing.tables(comparison):
        console.print(table.rich(console.width))
    last = len(found) - 1
    gained, lost = examples(comparison, 0, last, count)
    names = comparison.names
    for what, some in (("gain", gained), ("lose", lost)):
        if some:
            console.rule(f"{names[0]} → {names[last]}: queries that {what} most", align="left")
            for one in some:
                _print(console, one, comparison.measure)
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
        console.print(f"page {html}, plots and tables {beside}", markup=False, highlight=False)


def _print(console: Any, one: Example, measure: str) -> None:
    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False)

    line(f"{one.text or one.id}   {measure} {one.before:.3f} → {one.after:.3f}", "bold")
    for passage in one.passages:
        ranks = " → ".join(str(rank or f">{DEPTH}") for rank in passage.ranks)
        what = "relevant" if passage.grade >= 1 else "not judged relevant"
        what += f" (grade {passage.grade})" if passage.grade > 1 else ""
        line(f"  {ranks}  {passage.id}, {what}")
        text = " ".join(filter(None, (passage.title, passage.text)))
        if text:
            line(f"     {text if len(text) <= WIDTH else text[: WIDTH - 1] + '…'}", "dim")
