"""Plots for a page and for a paper: one look, two themes, readable without colour.

A plot is a function that draws into matplotlib's axes; `Plot.svg` renders it in light or dark for a
page, `write` saves it as png and svg with its caption. Colours are those of Okabe and Ito, darker
or lighter until they have a contrast of 3:1, and every line has its own mark and dash.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from caravan.files import replacing

STYLE = Path(__file__).parent / "templates/plots.mplstyle"
WIDTH, HEIGHT = 4.2, 2.8
"""Inches. Letters of 8 and 9 points fit a paper as they are, and can be read on a phone."""
STEPS = 400
"""Drawn of a curve over all queries, so that a file does not grow with them."""
FEW = 12
"""Lines with up to this many points have a mark at each."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
INK = (
    "axes.labelcolor", "axes.titlecolor", "legend.labelcolor", "text.color", "xtick.color",
    "ytick.color",
)  # fmt: skip
GROUND = ("axes.facecolor", "figure.facecolor", "savefig.facecolor")
"""matplotlib's names for what has the ink's colour, and the ground's."""


@dataclass(frozen=True)
class Theme:
    ground: str
    ink: str
    grid: str
    colours: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#22262b", "#d9dce0",
    ("#0072b2", "#d55e00", "#00875f", "#a8558a", "#8a6d00", "#3b88bd", "#5b6470", "#9c4221"),
)  # fmt: skip
DARK = Theme(
    "#15181c", "#dfe3e8", "#3a4048",
    ("#6cb6f0", "#ff9a5c", "#3fcb9f", "#e7a3c8", "#e8c34d", "#a5d8f3", "#aab4c0", "#e39a83"),
)  # fmt: skip
Draw = Callable[[Any, Theme], None]
"""Draws into matplotlib's axes, with the colours of a theme."""


@dataclass(frozen=True)
class Plot:
    """A plot of a report.

    Args:
        name: the stem of its files, unique within a report.
        caption: fit for a paper: what is drawn, over what, and what the bars stand for.
    """

    name: str
    caption: str
    draw: Draw
    height: float = HEIGHT

    def svg(self, theme: Theme, small: bool = False) -> str:
        """As text.

        Args:
            small: for a page: letters stay text in the reader's own font, instead of outlines that
                look the same everywhere; no prologue and metadata, which contain addresses.
        """
        # Without a date, equal plots are equal files.
        text = self._drawn(theme, small, format="svg", metadata={"Date": None}).decode()
        if not small:
            return text
        return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)

    def _drawn(self, theme: Theme, small: bool = False, **settings: Any) -> bytes:
        colours: Any = dict.fromkeys(INK, theme.ink) | dict.fromkeys(GROUND, theme.ground)
        colours |= {"axes.edgecolor": theme.grid, "grid.color": theme.grid}
        with rc_context({**colours, "svg.fonttype": "none" if small else "path"}, STYLE):
            figure = Figure(figsize=(WIDTH, self.height), layout="constrained")
            FigureCanvasAgg(figure)
            self.draw(figure.add_subplot(), theme)
            out = io.BytesIO()
            figure.savefig(out, **settings)
        return out.getvalue()

    def write(self, stem: Path) -> None:
        """Write `<stem>.png` (200 dpi) and `<stem>.svg`."""
        with replacing(stem.with_name(f"{stem.name}.png")) as scratch:
            scratch.write_bytes(self._drawn(LIGHT, format="png", dpi=200))
        with replacing(stem.with_name(f"{stem.name}.svg")) as scratch:
            scratch.write_text(self.svg(LIGHT), "utf-8")


def write(folder: Path, plots: Iterable[Plot]) -> None:
    """Write each plot as `<name>.png` and `<name>.svg`, and all captions as `captions.md`."""
    captions = ["# Captions", ""]
    for plot in plots:
        plot.write(folder / plot.name)
        captions += [f"**{plot.name}**: {plot.caption}", ""]
    with replacing(folder / "captions.md") as scratch:
        scratch.write_text("\n".join(captions), "utf-8")


@dataclass(frozen=True)
class Line:
    """Values over a number, with their spread."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None  # drawn as bars if one is not 0


def lines(
    drawn: Sequence[Line], x_label: str, y_label: str, ticks: Sequence[str] | None = None
) -> Draw:
    """Lines over numbers; if these are few and double, on a logarithmic axis.

    Args:
        ticks: names of x = 0, 1, ..., if x is not a number.
    """

    def draw(axes: Any, theme: Theme) -> None:
        x = sorted({value for line in drawn for value in line.x})
        few = len(x) <= FEW
        for i, line in enumerate(drawn):
            # With marks, a dash is new only when the colours repeat.
            dash = i // len(theme.colours) if few else i
            look = {
                "color": theme.colours[i % len(theme.colours)],
                "linestyle": DASHES[dash % len(DASHES)],
                "marker": MARKS[i % len(MARKS)] if few else None,
                "markersize": 5,
                "label": line.label or None,
            }
            spread = line.spread if any(line.spread or ()) else None
            axes.errorbar(line.x, line.y, yerr=spread, capsize=3, **look)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), ticks)
        elif few:
            if len(x) > 2 and x[0] > 0 and x[-1] / x[0] >= 8:
                axes.set_xscale("log")
                axes.minorticks_off()
            axes.set_xticks(x, [f"{value:g}" for value in x])
        if len(drawn) > 1:
            longest = max(len(line.label) for line in drawn)
            columns = max(1, min(len(drawn), 48 // (longest + 6)))
            axes.figure.legend(loc="outside lower center", ncols=columns)

    return draw


def bars(labels: Sequence[str], values: Sequence[float], spread: Sequence[float], x: str) -> Draw:
    """A dot for each name, with a bar for its spread."""

    def draw(axes: Any, theme: Theme) -> None:
        y = range(len(labels))
        look = {"fmt": "o", "markersize": 6, "capsize": 3, "color": theme.colours[0]}
        axes.errorbar(values, y, xerr=spread, **look)
        above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        for place, value in enumerate(values):
            axes.annotate(f"{value:.3f}", (value, place), **above)
        axes.set_yticks(list(y), labels)
        axes.set_ylim(len(labels) - 0.4, -0.7)
        axes.set_xlabel(x)
        axes.locator_params(axis="x", nbins=6)
        axes.margins(x=0.08)

    return draw


def changes(differences: Sequence[float], y_label: str) -> Draw:
    """What each query gained or lost, in that order."""

    def draw(axes: Any, theme: Theme) -> None:
        ordered = np.sort(differences)[::-1]
        steps = min(STEPS, len(ordered))
        edges = np.linspace(0, len(ordered), steps + 1).astype(int)
        for colour, part in enumerate((ordered.clip(min=0), ordered.clip(max=0))):
            axes.stairs(part[edges[:-1]], edges, fill=True, color=theme.colours[colour])
        axes.axhline(0, color=theme.ink, linewidth=0.8)
        axes.set_xlabel("queries, by what they gained")
        axes.set_ylabel(y_label)
        axes.margins(x=0.01)

    return draw
