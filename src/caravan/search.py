"""Ask a collection: typed questions, answered by the stages that `evaluate.py` runs.

    python -m caravan.search model=runs/retriever/model reranker=runs/reranker/model
    python -m caravan.search experiment=quickstart/pipeline
    python -m caravan.search retriever=bm25 --ask "Which function splits a path?" --json

Questions are typed, come a line each from standard input, or stand after --ask. The corpus is
embedded once: a second start, or one after an evaluation, loads the model and what is on disk.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import sys
import textwrap
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caravan.cli.main import entry
from caravan.errors import CONTROLS, printable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from caravan.retrieval.interactive import Asker, Found

CONF = Path(__file__).resolve().parents[2] / "conf"
PROMPT = "question> "
log = logging.getLogger("caravan")
LINES = 3
"""Of a passage, on a screen."""


def main() -> None:
    """Answer questions as the command line says; settings are Hydra's, as in `evaluate.py`."""
    parser = ArgumentParser(
        prog="python -m caravan.search",
        usage="%(prog)s [key=value ...] [--ask QUESTION] [--json]; see --help",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--ask", action="append", type=_question)
    parser.add_argument("--json", action="store_true")
    options, settings = parser.parse_known_args()
    if {"-m", "--multirun"} & set(settings):
        parser.error("-m: a search has no jobs; leave it out, and see evaluate.py for sweeps")
    sys.argv[1:] = settings

    @entry("search", CONF, "-m caravan.search")
    def search(cfg: DictConfig) -> None:
        from caravan.retrieval.interactive import asker

        ask = asker(cfg)
        log.info("%d passages of %s", len(ask.collection.corpus), ask.collection.name)
        for question in questions(options.ask, options.json):
            tell = told if options.json else shown
            _write(tell(question, ask, cfg.show))

    search()


def _question(text: str) -> str:
    if not text.strip():
        raise ArgumentTypeError("it is empty; write a question after it, in quotes")
    return _readable(os.fsencode(text))


def questions(asked: list[str] | None, quiet: bool) -> Iterator[str]:
    """Those of the command line, else those that are typed, else the lines of standard input."""
    if asked is not None:
        yield from asked
    elif sys.stdin.isatty():
        yield from _typed(quiet)
    else:
        for number, line in enumerate(sys.stdin.buffer):
            if number == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if question := _readable(line):
                yield question


def _readable(text: bytes) -> str:
    """What is not UTF-8 is replaced: nothing else could be written out again."""
    return text.decode("utf-8", "replace").strip()


def _typed(quiet: bool) -> Iterator[str]:
    """Questions from a terminal, until Ctrl-D or Ctrl-C.

    Args:
        quiet: keep the prompt out of standard output, which a script reads.
    """
    import readline  # noqa: F401 (arrows and history in input())

    while True:
        try:
            if quiet:
                sys.stderr.write(PROMPT)
                sys.stderr.flush()
            line = input("" if quiet else PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            sys.stderr.write("\n")
            return
        if line:
            yield line


def answer(question: str, ask: Asker, show: int) -> dict[str, Any]:
    """One answer as plain data: the passages, with rank and score in every stage.

    Returns:
        `question`; `seconds` of each stage; `hits`, the best first, each with `rank`, `id`,
        `title`, `text`, and for each stage its rank and score there, None where the stage does not
        have the passage.
    """
    stages: list[Found] = ask(question)
    corpus = ask.collection.corpus
    rows = stages[-1].run.of(0)[0][:show]
    ranks = {stage.stage: stage.ranks() for stage in stages}
    return {
        "question": question,
        "seconds": {stage.stage: round(stage.seconds, 6) for stage in stages},
        "hits": [
            {
                "rank": rank,
                "id": name,
                "title": title,
                "text": text,
                "ranks": {stage: found.get(row, (None, None))[0] for stage, found in ranks.items()},
                "scores": {
                    stage: found.get(row, (None, None))[1] for stage, found in ranks.items()
                },
            }
            for rank, (row, name, (title, text)) in enumerate(
                zip(rows.tolist(), corpus.ids(rows), corpus.get(rows), strict=True), start=1
            )
        ],
    }


def told(question: str, ask: Asker, show: int) -> str:
    """An answer for a script, a line of JSON."""
    line = json.dumps(answer(question, ask, show), ensure_ascii=False)
    # A terminal may show it too: the same data, with such characters escaped as JSON has it.
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n"


def shown(question: str, ask: Asker, show: int) -> str:
    """An answer for a person: passages with their score and rank in each stage, then the times."""
    from rich.console import Console
    from rich.text import Text

    found = answer(question, ask, show)
    console = Console(highlight=False, soft_wrap=True)
    width = max(console.width - 4, 20)
    with console.capture() as captured:
        console.print()
        for hit in found["hits"]:
            head = printable(" ".join(part for part in (hit["id"], hit["title"]) if part))
            console.print(Text(f"{hit['rank']:>2}  ").append(head, style="bold"))
            scores = [
                f"{stage} -" if rank is None else f"{stage} {hit['scores'][stage]:.4g} ({rank})"
                for stage, rank in hit["ranks"].items()
            ]
            console.print(Text(f"    {'   '.join(scores)}", style="cyan"))
            lines = textwrap.wrap(
                printable(" ".join(hit["text"].split())), width, max_lines=LINES, placeholder=" ..."
            )
            console.print(Text("\n".join(f"    {line}" for line in lines)))
        if not found["hits"]:
            console.print("    nothing found")
        times = ", ".join(f"{stage} {_time(taken)}" for stage, taken in found["seconds"].items())
        console.print(Text(f"\n    score (rank) by stage; {times}\n", style="dim"))
    return captured.get()


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
