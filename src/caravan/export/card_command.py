"""`python -m caravan.export.card_command`: write the card of a model folder anew, with metrics."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from caravan.errors import answering


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m caravan.export.card_command",
        description=f"{__doc__} Figures of another model are refused.",
        epilog="then: hf upload <user>/<name> <model folder>",
    )
    parser.add_argument("model", type=Path, help="a model folder, such as runs/mine/model")
    parser.add_argument(
        "evaluations", type=Path, nargs="*", help="folders of evaluate.py, such as runs/mine/test"
    )
    parser.add_argument("--license", help="of the Hub's list, such as apache-2.0")
    parser.add_argument("--language", action="append", help="a code such as en; may be repeated")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the tokenizer brings along"
    )
    given = parser.parse_args()

    def work() -> None:
        from caravan.export.model_card import write

        told = (given.license, given.language, given.trust_remote_code)
        path = write(given.model, given.evaluations, *told)
        sys.stdout.write(f"{path} is written; hf upload <user>/<name> {given.model} pushes it\n")

    return answering(work)


if __name__ == "__main__":
    sys.exit(main())
