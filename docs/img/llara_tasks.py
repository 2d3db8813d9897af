"""The plot of docs/adaptation.md: LLaRA's tasks one by one, from the table of `sweep=llara_tasks`.

    python docs/img/llara_tasks.py    # after the sweep

A dot for each seed and a line for their mean; by hand and not by a library, as quickstart.py.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "runs" / "sweeps" / "llara_tasks" / "sweep.csv"
LOW, HIGH, LEFT, WIDTH, TOP, ROW = 0.1, 0.5, 260, 360, 34, 26
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .name { text-anchor: end } .title { font-weight: 600 } .axis { stroke: #8c959f }
  .paper { fill: #0072b2 } .released { fill: #d55e00 } .none { fill: #57606a }
  .mean { stroke: #24292f; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #d1d7e0 } .mean { stroke: #d1d7e0 }
    .paper { fill: #56b4e9 } .released { fill: #e69f00 } .none { fill: #9198a1 }
  }
"""


def plot(figures: dict[str, list[float]]) -> str:
    """An SVG with a row for each way to begin, in the order of their means."""
    rows = sorted(figures, key=lambda name: -fmean(figures[name]))
    told = "; ".join(f"{name}: {fmean(figures[name]):.3f}" for name in rows)
    parts = [f"<title>MRR@10 by what the training began with. {told}</title>"]
    parts.append(f"<style>{STYLE}</style>")
    parts.append(f'<text class="title" x="{LEFT}" y="20">val/MRR@10, a dot for each seed</text>')
    bottom = TOP + ROW * len(rows)
    for tenth in range(round(LOW * 10), round(HIGH * 10) + 1):
        x = at(tenth / 10)
        parts.append(f'<line class="axis" x1="{x}" y1="{TOP - 4}" x2="{x}" y2="{bottom}"/>')
        parts.append(f'<text x="{x - 8}" y="{bottom + 16}">.{tenth}</text>')
    for i, name in enumerate(rows):
        y = TOP + ROW * i + 11
        kind = name.split()[0] if name.startswith(("paper", "released")) else "none"
        parts.append(f'<text class="name" x="{LEFT - 12}" y="{y + 4}">{name}</text>')
        for value in figures[name]:
            parts.append(f'<circle class="{kind}" cx="{at(value)}" cy="{y}" r="5"/>')
        x = at(fmean(figures[name]))
        parts.append(f'<line class="mean" x1="{x}" y1="{y - 9}" x2="{x}" y2="{y + 9}"/>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {bottom + 26}"'
        ' role="img">'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def at(value: float) -> float:
    return round(LEFT + WIDTH * (value - LOW) / (HIGH - LOW), 1)


def read(table: Path) -> dict[str, list[float]]:
    """The figures of each way to begin."""
    found: dict[str, list[float]] = defaultdict(list)
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            form, _, tasks = row["init_from"].partition("-")
            kind = "released" if form.endswith("released") else "paper"
            name = f"{kind} {tasks.upper()}" if tasks else "unadapted"
            more = "" if row["trainer.max_steps"] == "55" else ", twice the updates"
            found[name + more].append(float(row["val/MRR@10"]))
    return dict(found)


if __name__ == "__main__":
    (HERE / "llara_tasks.svg").write_text(plot(read(TABLE)), "utf-8")
