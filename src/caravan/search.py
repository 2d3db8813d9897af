"""Search a collection with typed queries, through the stages that `evaluate.py` runs.

    python -m caravan.search model=runs/retriever/model reranker=runs/reranker/model
    python -m caravan.search experiment=quickstart/pipeline
    python -m caravan.search retriever=bm25 --ask "Which function splits a path?" --json

Queries are typed, come line by line from standard input, or follow --ask. The corpus is embedded
once: a second start, or one after an evaluation, reads the embeddings from disk.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING

from caravan.cli.main import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).resolve().parents[2] / "conf"


def main() -> None:
    """Parse --ask and --json; all other arguments are Hydra's, as in `evaluate.py`."""
    parser = ArgumentParser(
        prog="python -m caravan.search",
        usage="%(prog)s [key=value ...] [--ask QUESTION] [--json]; see --help",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--ask", action="append", type=_query)
    parser.add_argument("--json", action="store_true")
    options, settings = parser.parse_known_args()
    if {"-m", "--multirun"} & set(settings):
        parser.error("-m: a search has no jobs; leave it out, and see evaluate.py for sweeps")
    sys.argv[1:] = settings

    @entry("search", CONF, "-m caravan.search")
    def run(cfg: DictConfig) -> None:
        from caravan.cli.search import search

        search(cfg, options.ask, options.json)

    run()


def _query(text: str) -> str:
    query = os.fsencode(text).decode("utf-8", "replace").strip()
    if not query:
        raise ArgumentTypeError("it is empty; write a question after it, in quotes")
    return query


if __name__ == "__main__":
    main()
