"""`python -m caravan.report`: tables and pages from finished runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from caravan.errors import InputError
from caravan.report import collections, sweep, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m caravan.report", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in (
        ("table", "one table of all evaluations below a folder"),
        ("sweep", "the jobs of a sweep as a table and a plot"),
    ):
        commands.add_parser(name, help=help_).add_argument("folder", type=Path)
    several = commands.add_parser("collections", help="evaluations of several collections, by one")
    several.add_argument("folder", type=Path, nargs="+")
    arguments = parser.parse_args()
    try:
        if arguments.command == "collections":
            collections.show(arguments.folder)
        else:
            {"table": table.show, "sweep": sweep.show}[arguments.command](arguments.folder)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
