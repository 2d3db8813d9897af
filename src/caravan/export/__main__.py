"""`python -m caravan.export`: a model folder as a folder that other libraries load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from caravan.errors import InputError
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
    arguments = parser.parse_args()
    try:
        export(arguments.model, arguments.format, arguments.out)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"{error.filename}: {error.strerror}; give another place\n")
        return 2
    sys.stdout.write(f"{arguments.out} holds it; its README.md has code that loads it\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
