"""The plot of README: what each system of the quickstart finds, drawn from its metrics.json.

    python docs/img/quickstart.py    # after make quickstart

Written by hand and not by a library, so that it is small, has a dark mode, and a changed metric
changes one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METRICS = HERE.parents[1] / "runs" / "quickstart" / "pipeline" / "metrics.json"
PANELS = (("MRR@10", "first", 0.5), ("R@100", "second", 1.0))  # measure, colour, end of the axis
LEFT, WIDTH, GAP, TOP, ROW = 90, 250, 70, 34, 26
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .name { text-anchor: end } .title { font-weight: 600 }
  .first { fill: #0072b2 } .second { fill: #d55e00 } .axis { stroke: #8c959f }
  @media (prefers-color-scheme: dark) {
    text { fill: #d1d7e0 } .first { fill: #56b4e9 } .second { fill: #e69f00 }
  }
"""


def plot(stages: list[dict[str, Any]]) -> str:
    """An SVG with a panel for each measure and a bar for each stage, the worst first."""
    summary = {stage["stage"]: stage["overall"] for stage in stages}
    summary = dict(sorted(summary.items(), key=lambda item: item[1][PANELS[0][0]]))
    height = TOP + ROW * len(summary) + 8
    width = LEFT + len(PANELS) * WIDTH + GAP + 50
    text = "; ".join(
        f"{name}: " + ", ".join(f"{measure} {of[measure]:.4f}" for measure, _, _ in PANELS)
        for name, of in summary.items()
    )
    parts = [f"<title>The systems of the quickstart. {text}</title>", f"<style>{STYLE}</style>"]
    for i, name in enumerate(summary):
        y = TOP + ROW * i + 15
        parts.append(f'<text class="name" x="{LEFT - 10}" y="{y}">{name}</text>')
    for panel, (measure, colour, end) in enumerate(PANELS):
        x = LEFT + panel * (WIDTH + GAP)
        parts.append(f'<text class="title" x="{x}" y="20">{measure}</text>')
        for i, of in enumerate(summary.values()):
            y, length = TOP + ROW * i, WIDTH * of[measure] / end
            bar = f'x="{x}" y="{y}" width="{length:.1f}" height="{ROW - 6}"'
            parts.append(f'<rect class="{colour}" {bar} rx="2"/>')
            parts.append(f'<text x="{x + length + 6:.1f}" y="{y + 15}">{of[measure]:.3f}</text>')
        parts.append(
            f'<line class="axis" x1="{x}" y1="{TOP - 4}" x2="{x}" y2="{TOP + ROW * len(summary)}"/>'
        )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return "\n".join([head, *parts, "</svg>\n"])


if __name__ == "__main__":
    metrics = json.loads(METRICS.read_text("utf-8"))
    (HERE / "quickstart.svg").write_text(plot(metrics["stages"]), "utf-8")
