"""`python -m caravan.report`: tables, comparisons and pages from finished runs."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from caravan.errors import InputError, answering


def main() -> int:
    given = _parser().parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    return answering(lambda: _shown(given))


def _shown(given: argparse.Namespace) -> None:
    """Do what the command line asks for; each command imports its own."""
    folders = getattr(given, "folder", [])
    for folder in folders if isinstance(folders, list) else [folders]:
        if not folder.is_dir():
            raise InputError(
                f"there is no folder {folder}; give a run directory, or one of several"
            )
    if given.command == "table":
        from caravan.report.summary import show as show_table

        show_table(given.folder)
    elif given.command == "sweep":
        from caravan.report.sweep import show as show_sweep

        show_sweep(given.folder)
    elif given.command == "collections":
        from caravan.report.collections import show as show_collections

        show_collections(given.folder)
    elif given.command == "page":
        from caravan.report.page import show as show_page

        show_page(given.folder)
    else:
        from caravan.report.terminal import compare

        compare(
            given.systems,
            qrels=given.qrels,
            measures=given.measures.split(",") if given.measures else [],
            test=given.test,
            count=given.queries,
            html=given.html,
        )


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
    add(
        "systems",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directory of an evaluation, or a run file of any system; two or more",
    )
    add("--qrels", type=Path, metavar="FILE", help="judge by this file (TREC's or BEIR's)")
    add("--measures", metavar="M,M,...", help="such as MRR@10,nDCG@10; the first orders queries")
    add(
        "--test",
        default="t",
        choices=("t", "randomisation"),
        help="paired t-test (default), or randomisation test",
    )
    add("--queries", type=int, default=3, metavar="N", help="shown of those that gain, and lose")
    add(
        "--html",
        type=Path,
        nargs="?",
        const=Path("comparison.html"),
        metavar="FILE",
        help="write a page too (comparison.html), with plots and tables beside it",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
