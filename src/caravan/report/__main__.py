"""`python -m caravan.report`: tables, comparisons and pages from finished runs."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path

from caravan.errors import answering


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.command == "compare" and len(arguments.folders) < 2:
        parser.error("compare needs two runs or more")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    return answering(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    """Run a command, with imports that --help does not need."""
    if arguments.command == "compare":
        _compare(arguments)
        return
    from caravan.report.contents import read, show_table
    from caravan.report.page import show as show_page

    show = show_table if arguments.command == "table" else show_page
    show(read(arguments.folders))


def _compare(arguments: argparse.Namespace) -> None:
    """Print the comparison of two systems or more, and write its page with --html."""
    from caravan.report.compare import compare, examples
    from caravan.report.evaluations import comparison_tables
    from caravan.report.page import of_comparison, save
    from caravan.report.systems import read_judged, read_system, with_distinct_names
    from caravan.report.tables import show
    from caravan.report.verdict import of_comparison as of_verdict

    systems = with_distinct_names([read_system(path) for path in arguments.folders])
    measures = arguments.measures.split(",") if arguments.measures else []
    comparison = compare(systems, read_judged(systems, arguments.qrels), measures)
    for table in comparison_tables(comparison):
        show(table)
    for some in examples(comparison, 0, len(systems) - 1, arguments.queries):
        show(some.text())
    show(of_verdict(comparison))
    if (html := arguments.html) is not None:
        command = shlex.join(["python", "-m", "caravan.report", *sys.argv[1:]])
        save(of_comparison(comparison, command, arguments.queries), html)
        show(f"page {html}, plots and tables {html.with_suffix('')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m caravan.report", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in (
        ("table", "the evaluations below folders, or the jobs of a sweep, as tables"),
        ("page", "runs or a sweep as one HTML page, FOLDER/report.html"),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    help_ = "two systems or more side by side, tested query by query"
    add = commands.add_parser("compare", help=help_).add_argument
    run = "run directory of an evaluation, or a run file"
    add("folders", type=Path, nargs="+", metavar="RUN", help=run)
    add("--qrels", type=Path, metavar="FILE", help="judge by this file (TREC's or BEIR's)")
    add("--measures", metavar="M,M,...", help="such as MRR@10,nDCG@10; the first orders queries")
    add("--queries", type=_count, default=3, metavar="N", help="shown of those that gain, and lose")
    page = "write a page too (comparison.html), with plots and tables beside it"
    html = Path("comparison.html")
    add("--html", type=_html, nargs="?", const=html, metavar="FILE", help=page)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be 0 or more")
    return int(text)


def _html(text: str) -> Path:
    # `--html a.trec b.trec` would overwrite a run.
    if not text.endswith(".html"):
        raise argparse.ArgumentTypeError("a page ends in .html; put --html behind the runs")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
