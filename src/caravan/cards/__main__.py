"""`python -m caravan.cards`: a model folder's card anew, with the figures of evaluations."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from caravan.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m caravan.cards",
        description=f"{__doc__} Figures of another model are refused.",
        epilog="then: hf upload <user>/<name> <model folder>",
    )
    parser.add_argument("model", type=Path, help="a model folder, such as runs/mine/model")
    parser.add_argument(
        "evaluations", type=Path, nargs="*", help="folders of evaluate.py, such as runs/mine/test"
    )
    parser.add_argument("--license", help="of the Hub's list, such as apache-2.0")
    parser.add_argument("--language", action="append", help="a code such as en; may be repeated")
    given = parser.parse_args()
    try:
        from caravan.cards.folder import write

        path = write(given.model, given.evaluations, given.license, given.language)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"{error.filename}: {error.strerror}; give another place\n")
        return 2
    sys.stdout.write(f"{path} is written; hf upload <user>/<name> {given.model} pushes it\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
