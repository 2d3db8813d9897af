"""`python -m caravan.export`: a model folder as a folder that other libraries load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from caravan.errors import answering
from caravan.export.write import FORMATS, export


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m caravan.export",
        description=f"{__doc__} What it cannot express exactly it refuses.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:<23}{told}" for name, told in FORMATS.items()),
    )
    parser.add_argument("model", type=Path, help="a model folder, such as runs/mine/model")
    parser.add_argument("format", choices=FORMATS, help="what to write, see below")
    parser.add_argument("out", type=Path, help="a folder that is not there yet, or empty")
    given = parser.parse_args()

    def work() -> None:
        export(given.model, given.format, given.out)
        sys.stdout.write(f"{given.out} holds it; its README.md has code that loads it\n")

    return answering(work)


if __name__ == "__main__":
    sys.exit(main())
