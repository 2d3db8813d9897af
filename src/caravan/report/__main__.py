"""`python -m caravan.report`: tables, comparisons and pages from finished runs."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from caravan.errors import InputError, answering

if TYPE_CHECKING:
    from caravan.report.compare import Query
    from caravan.report.tables import Screen

WIDTH = 160
"""Characters shown of a passage."""


def main() -> int:
    arguments = _parser().parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    return answering(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    """Run a command; each imports only what it needs."""
    if arguments.command == "compare":
        _compare(arguments)
        return
    folder = arguments.folder
    for one in folder if isinstance(folder, list) else [folder]:
        if not one.is_dir():
            raise InputError(
                "folder-not-found",
                f"there is no folder {one}; name a run directory, or a folder of several",
            )
    if arguments.command == "table":
        from caravan.report.summary import show as show_table

        show_table(folder)
    elif arguments.command == "collections":
        from caravan.report.summary import read_suites, show_suites

        show_suites(read_suites(folder), folder[0] if len(folder) == 1 else None)
    elif arguments.command == "sweep":
        from caravan.report.sweep import show as show_sweep

        show_sweep(folder)
    else:
        from caravan.report.page import show as show_page

        show_page(folder)


def _compare(arguments: argparse.Namespace) -> None:
    """Print the comparison of two systems or more, and write its page with --html.

    Raises:
        InputError: If an option, a run, a measure or the qrels are wrong.
    """
    from caravan.report.compare import compare, examples
    from caravan.report.evaluations import comparison_tables
    from caravan.report.page import of_comparison, save
    from caravan.report.systems import read_judged, read_system, with_distinct_names
    from caravan.report.tables import Screen

    html, count = arguments.html, arguments.queries
    if len(arguments.systems) < 2:
        raise InputError("one-run", "compare needs two runs or more; name another one")
    if count < 0:
        raise InputError("negative-count", f"--queries {count}: must be 0 or more")
    if html is not None and html.suffix != ".html":
        raise InputError(
            "not-html", f"--html {html}: a page ends in .html; put --html behind the runs"
        )
    systems = with_distinct_names([read_system(path) for path in arguments.systems])
    measures = arguments.measures.split(",") if arguments.measures else []
    judged = read_judged(systems, arguments.qrels)
    comparison = compare(systems, judged, measures, arguments.test)
    screen = Screen()
    for table in comparison_tables(comparison):
        screen.table(table)
    for some in examples(comparison, 0, len(systems) - 1, count):
        screen.rule(some.title)
        for query in some.queries:
            _print(screen, query, some.measure)
    if html is not None:
        save(of_comparison(comparison, _command(arguments), count), html)
        screen.line(f"page {html}, plots and tables {html.with_suffix('')}")


def _command(arguments: argparse.Namespace) -> str:
    """The command line of a comparison, for its page."""
    words = ["python", "-m", "caravan.report", "compare", *map(str, arguments.systems)]
    words += ["--qrels", str(arguments.qrels)] if arguments.qrels else []
    words += ["--measures", arguments.measures] if arguments.measures else []
    words += ["--test", arguments.test] if arguments.test != "t" else []
    return shlex.join([*words, "--queries", str(arguments.queries), "--html", str(arguments.html)])


def _print(screen: Screen, query: Query, measure: str) -> None:
    """Print a query and its passages, with their ranks in both rankings."""
    from caravan.report.compare import DEPTH

    text = query.text or query.id
    screen.line(f"{text}   {measure} {query.before:.3f} → {query.after:.3f}", "bold")
    for passage in query.passages:
        ranks = " → ".join(str(rank or f">{DEPTH}") for rank in passage.ranks)
        relevance = "relevant" if passage.grade >= 1 else "not judged relevant"
        relevance += f" (grade {passage.grade})" if passage.grade > 1 else ""
        screen.line(f"  {ranks}  {passage.id}, {relevance}")
        text = f"{passage.title} {passage.text}".strip()
        if text:
            screen.line(f"     {text if len(text) <= WIDTH else text[: WIDTH - 1] + '…'}", "dim")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m caravan.report", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in (
        ("table", "one table of all evaluations below a folder"),
        ("sweep", "the jobs of a sweep as a table and a plot"),
        ("page", "a run, several runs or a sweep as one HTML page, FOLDER/report.html"),
    ):
        commands.add_parser(name, help=help_).add_argument("folder", type=Path)
    several = commands.add_parser("collections", help="evaluations of several collections, by one")
    several.add_argument("folder", type=Path, nargs="+")
    compare = commands.add_parser("compare", help="systems side by side, tested query by query")
    add = compare.add_argument
    runs = "run directory of an evaluation, or a run file of any system; two or more"
    add("systems", nargs="+", type=Path, metavar="RUN", help=runs)
    add("--qrels", type=Path, metavar="FILE", help="judge by this file (TREC's or BEIR's)")
    add("--measures", metavar="M,M,...", help="such as MRR@10,nDCG@10; the first orders queries")
    test = "paired t-test (default), or randomisation test"
    add("--test", default="t", choices=("t", "randomisation"), help=test)
    add("--queries", type=int, default=3, metavar="N", help="shown of those that gain, and lose")
    page = "write a page too (comparison.html), with plots and tables beside it"
    html = Path("comparison.html")
    add("--html", type=Path, nargs="?", const=html, metavar="FILE", help=page)
    return parser


if __name__ == "__main__":
    sys.exit(main())
