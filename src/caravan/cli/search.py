"""`python -m caravan.search`: build the search that a config describes, and answer queries.

Queries come from --ask, from a terminal, or line by line from standard input.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from caravan.cli.evaluate import models_of, systems_of
from caravan.cli.schema import build
from caravan.errors import CONTROLS, printable
from caravan.retrieval.interactive import Searcher, open_searcher
from caravan.retrieval.store import Store

PROMPT = "question> "
LINES = 3
"""Lines of a passage on a screen."""
log = logging.getLogger("caravan")


def search(cfg: DictConfig, queries: list[str] | None, as_json: bool) -> None:
    """Answer queries on standard output.

    Args:
        cfg: composed and checked, of conf/search.yaml.
        queries: those of the command line; None reads them from standard input.
        as_json: one line of JSON per query, instead of text for a screen.
    """
    searcher = searcher_of(cfg)
    log.info("%d passages of %s", len(searcher.collection.corpus), searcher.collection.name)
    shown = json_line if as_json else page
    for query in read_queries(as_json) if queries is None else queries:
        try:
            sys.stdout.write(shown(answer(query, searcher, cfg.show)))
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None


def searcher_of(cfg: DictConfig) -> Searcher:
    """The search of a config, with all models loaded and the corpus indexed."""
    collection = build(cfg, "data").collection(Path(cfg.cache_dir))
    store = Store(Path(cfg.store), None if cfg.reuse is None else Path(cfg.reuse))
    return open_searcher(collection, systems_of(cfg), store, models_of(cfg))


def read_queries(quiet: bool) -> Iterator[str]:
    """Queries typed at a terminal, until Ctrl-D or Ctrl-C, or the lines of standard input.

    Args:
        quiet: print the prompt to standard error, because a script reads standard output.
    """
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            if query := text.decode("utf-8", "replace").strip():
                yield query
        return
    import readline  # noqa: F401 (arrows and history in input(); Windows has none)

    while True:
        try:
            if quiet:
                sys.stderr.write(PROMPT)
                sys.stderr.flush()
            query = input("" if quiet else PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            sys.stderr.write("\n")
            return
        if query:
            yield query


def answer(query: str, searcher: Searcher, show: int) -> dict[str, Any]:
    """One answer as plain data.

    Returns:
        `question`; `seconds` of each stage; `hits`, the best first, each with `rank`, `id`,
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
    return {"question": query, "seconds": seconds, "hits": hits}


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
