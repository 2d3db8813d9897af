"""Search a collection with typed queries, through the stages that `evaluate.py` runs.

    python -m caravan.search retriever=runs/retriever/model reranker=runs/reranker/model
    python -m caravan.search experiment=quickstart/pipeline
    python -m caravan.search retriever=bm25 --ask "Which function splits a path?" --json

Settings (key=value) and experiments are those of evaluate.py. Queries are typed, come line by line
from standard input, or follow --ask. The corpus is embedded once: a second start, or one after an
evaluation, reads the embeddings from disk.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caravan.cli.main import prepare_process
from caravan.errors import CONTROLS, answering, printable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from caravan.retrieval.interactive import Searcher

LINES = 3
"""Lines of a passage on a screen."""
log = logging.getLogger("caravan")


def main() -> int:
    parser = _parser()
    options, settings = parser.parse_known_args()
    if flags := [text for text in settings if text.startswith("-")]:
        parser.error(f"{flags[0]}: unknown option; settings are key=value, as for evaluate.py")
    if former := [text for text in settings if text.startswith("model=")]:
        parser.error(f"{former[0]}: write retriever{former[0].removeprefix('model')}")
    prepare_process()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    return answering(lambda: _run(options, settings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m caravan.search",
        usage="%(prog)s [key=value ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    ask = "answer this query and exit; may be repeated"
    add("--ask", action="append", type=_query, metavar="QUERY", help=ask)
    add("--json", action="store_true", help="print each answer as a line of JSON")
    add("--show", type=_count, default=5, metavar="N", help="passages per answer (5)")
    reuse = "use embeddings and indexes of the evaluations in this folder (runs)"
    add("--reuse", type=Path, default=Path("runs"), metavar="FOLDER", help=reuse)
    return parser


def _run(options: argparse.Namespace, settings: list[str]) -> None:
    from caravan.cli.evaluate import searcher_of  # imports torch

    searcher = searcher_of(config_of(settings), options.reuse)
    log.info("%d passages of %s", len(searcher.collection.corpus), searcher.collection.name)
    shown = json_line if options.json else page
    for query in options.ask or read_queries(options.json or not sys.stdout.isatty()):
        sys.stdout.write(shown(answer(query, searcher, options.show)))
        sys.stdout.flush()


def config_of(settings: list[str]) -> DictConfig:
    """The config of a search: that of an evaluation, by default in `runs/search`."""
    from caravan.cli.compose import CONF, compose

    # A search computes no measures, so any depth (index.k) is enough for it.
    return compose(CONF, "evaluate", ["name=search", "measures=[R@1]", *settings])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def _query(text: str) -> str:
    query = os.fsencode(text).decode("utf-8", "replace").strip()
    if not query:
        raise argparse.ArgumentTypeError("it is empty; write a query after it, in quotes")
    return query


def read_queries(to_stderr: bool) -> Iterator[str]:
    """Queries typed at a terminal, until Ctrl-D or Ctrl-C, or the lines of standard input.

    Args:
        to_stderr: print the prompt to standard error, because a script reads standard output.
    """
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")  # type: ignore[union-attr]
        yield from filter(None, map(str.strip, sys.stdin))
        return
    import readline  # noqa: F401 (arrows and history in input(); Windows has none)

    while True:
        try:
            if to_stderr:
                sys.stderr.write("query> ")
                sys.stderr.flush()
            query = input("" if to_stderr else "query> ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stderr.write("\n")
            return
        if query:
            yield query


def answer(query: str, searcher: Searcher, show: int) -> dict[str, Any]:
    """One answer as plain data.

    Returns:
        `query`; `seconds` of each stage; `hits`, the best first, each with `rank`, `id`,
        `title`, `text`, and its rank and score in each stage, None where the stage lacks it.
    """
    results = searcher(query)
    corpus = searcher.collection.corpus
    rows = results[-1].run.of(0)[0][:show]
    found = {result.stage: result.ranks() for result in results}
    texts = zip(rows.tolist(), corpus.ids(rows), corpus.get(rows), strict=True)
    hits = []
    for rank, (row, name, (title, text)) in enumerate(texts, start=1):
        places = {stage: ranks.get(row, (None, None)) for stage, ranks in found.items()}
        ranks = {stage: place[0] for stage, place in places.items()}
        scores = {stage: place[1] for stage, place in places.items()}
        hit = {"rank": rank, "id": name, "title": title, "text": text}
        hits.append({**hit, "ranks": ranks, "scores": scores})
    seconds = {result.stage: round(result.seconds, 6) for result in results}
    return {"query": query, "seconds": seconds, "hits": hits}


def json_line(found: dict[str, Any]) -> str:
    """An answer for a script; control characters are escaped, because a terminal may show it."""
    line = json.dumps(found, ensure_ascii=False)
    return CONTROLS.sub(lambda control: f"\\u{ord(control[0]):04x}", line) + "\n"


def page(found: dict[str, Any]) -> str:
    """An answer for a screen: passages with score and rank in each stage, then the times."""
    width = max(shutil.get_terminal_size().columns - 4, 20)
    lines = [""]
    for hit in found["hits"]:
        head = " ".join(part for part in (hit["id"], hit["title"]) if part)
        scores = [
            f"{stage} -" if rank is None else f"{stage} {hit['scores'][stage]:.4g} ({rank})"
            for stage, rank in hit["ranks"].items()
        ]
        text = printable(" ".join(hit["text"].split()))
        lines += [f"{hit['rank']:>2}  {printable(head)}", f"    {'   '.join(scores)}"]
        wrapped = textwrap.wrap(text, width, max_lines=LINES, placeholder=" ...")
        lines += [f"    {line}" for line in wrapped]
    if not found["hits"]:
        lines.append("    nothing found")
    times = ", ".join(f"{stage} {1000 * taken:.1f} ms" for stage, taken in found["seconds"].items())
    return "\n".join([*lines, "", f"    score (rank) by stage; {times}", "", ""])


if __name__ == "__main__":
    sys.exit(main())
