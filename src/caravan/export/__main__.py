"""`python -m caravan.export`: export a model folder for another library, or write its model card.

An export computes the model folder's numbers in float32, or is refused.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from caravan.errors import answering


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m caravan.export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    helps = {
        "sentence-transformers": "SentenceTransformer(...) or CrossEncoder(...), prompts included",
        "transformers": "full weights for transformers' Auto classes; an adapter is merged",
        "card": "write README.md again, with the metrics of evaluations",
    }
    parsers = {name: commands.add_parser(name, help=text) for name, text in helps.items()}
    for name, command in parsers.items():
        command.add_argument("model", type=Path, help="a model folder, such as runs/mine/model")
        if name != "card":
            command.add_argument("out", type=Path, help="a folder that is new or empty")
            first = "keep the first N dimensions of an embedding"
            command.add_argument("--dim", type=int, metavar="N", help=first)
    parsers["transformers"].add_argument(
        "--classifier",
        action="store_true",
        help="a reranker scored by two tokens as AutoModelForSequenceClassification",
    )
    card = parsers["card"]
    card.epilog = "then: hf upload <user>/<name> <model folder>"
    card.add_argument(
        "evaluations", type=Path, nargs="*", help="folders of evaluate.py, such as runs/mine/test"
    )
    card.add_argument("--license", help="an identifier of the Hub, such as apache-2.0")
    card.add_argument("--language", action="append", help="a code such as en; may be repeated")
    card.add_argument(
        "--trust-remote-code", action="store_true", help="run the code in the tokenizer's folder"
    )
    settings = vars(parser.parse_args())
    return answering(lambda: _run(settings.pop("command"), **settings))


def _run(command: str, model: Path, **settings: Any) -> None:
    if command == "card":
        from caravan.export.model_card import write

        path = write(model, **settings)
        sys.stdout.write(f"wrote {path}; push it: hf upload <user>/<name> {model}\n")
        return
    library = importlib.import_module(f"caravan.export.{command.replace('-', '_')}")
    library.export(model, **settings)
    sys.stdout.write(f"wrote {settings['out']}; its README.md has code that loads it\n")


if __name__ == "__main__":
    sys.exit(main())
