"""Shared by the benchmarks: options, tables, paired timing and peak memory. Imports only torch.

Machines are noisy, so two systems are timed in turn (A B A B), and the report has the median and
the range of the ratios of the pairs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results too")
    return parser


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
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *given).result()


def report(title: str, rows: list[dict[str, Any]], notes: list[str], save: bool) -> None:
    """Print a Markdown table with its command, commit and processor.

    Args:
        save: write it to benchmarks/results too, under the name of the script.
    """
    text = rendered(title, rows, notes)
    sys.stdout.write(text)
    if save:
        written(Path(sys.argv[0]).stem, text)


def rendered(title: str, rows: list[dict[str, Any]], notes: list[str]) -> str:
    """The page of a benchmark."""
    options = (text for text in sys.argv[1:] if text != "--save")
    # Paths are reduced to their last part.
    command = [Path(sys.argv[0]).name, *(Path(o).name if "/" in o else o for o in options)]
    made = f"`python benchmarks/{' '.join(command)}`, {commit()}, {machine()}"
    return "\n".join([f"# {title}", "", *table(rows), "", *notes, "", made, ""])


def written(name: str, text: str) -> None:
    """Write a page to benchmarks/results."""
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.md").write_text(text, "utf-8")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def commit() -> str:
    """The commit of the code, and whether the code has changed since."""
    try:
        head = _git("rev-parse", "--short", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", "src", "conf", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"
    return f"commit {head}{' with changes' if changed else ''}"


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def machine() -> str:
    """The processor, the number of threads, and the version of torch."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{torch.get_num_threads()} threads of {name}, torch {torch.__version__}"
