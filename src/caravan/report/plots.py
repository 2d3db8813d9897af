"""Plots for a page and for a paper: one look, two themes, readable without colour.

A plot is a function that draws into matplotlib's axes. `Plot.svg` renders it for a page in a theme,
`write` saves it as png and svg with its caption. The look and the themes are style files of
matplotlib; colours are those of Okabe and Ito, adjusted to a contrast of 3:1, and every line has
its own mark and dash.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from caravan.files import replacing

STYLES = Path(__file__).parent / "templates"
THEMES = ("light", "dark")
WIDTH, HEIGHT = 4.2, 2.6
"""Inches, without a legend. Letters of 8 and 9 points fit a paper, and can be read on a phone."""
LETTERS = 52  # in a line of a legend; a label is half as wide
ROW, TEXT, GAP = 0.3, 0.14, 0.06
"""Inches of a row of `intervals`, of a line of text, and between labels."""
LETTER = 0.025  # width of a tick's letter, and of some space, as a share of the axis
FEW = 12  # lines with up to this many points have a mark at each
COLOURS = 8
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))

Draw = Callable[[Any], None]
"""Draws into matplotlib's axes."""


@dataclass(frozen=True)
class Plot:
    """A plot of a report.

    Args:
        name: the stem of its files, unique within a report.
        caption: fit for a paper: what is drawn, over what, and what the bars stand for.
        draw: may change the height of the figure.
    """

    name: str
    caption: str
    draw: Draw

    def svg(self, theme: str = "light", page: bool = False) -> str:
        """The plot as SVG; the same bytes for equal plots.

        Args:
            page: text stays text in the reader's own font instead of outlines, and there is no
                prologue and no metadata, which contain addresses.
        """
        text = self._drawn(theme, page, format="svg", metadata={"Date": None}).decode()
        if not page:
            return text
        return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)

    def _drawn(self, theme: str = "light", page: bool = False, **settings: Any) -> bytes:
        styles = [STYLES / "plots.mplstyle", STYLES / f"{theme}.mplstyle"]
        fonts = {"svg.fonttype": "none" if page else "path"}
        with matplotlib.style.context([*styles, fonts]):
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
            FigureCanvasAgg(figure)
            self.draw(figure.add_subplot())
            out = io.BytesIO()
            figure.savefig(out, **settings)
        return out.getvalue()

    def write(self, folder: Path) -> None:
        """Write `<name>.png` (200 dpi) and `<name>.svg`."""
        with replacing(folder / f"{self.name}.png") as scratch:
            scratch.write_bytes(self._drawn(format="png", dpi=200))
        with replacing(folder / f"{self.name}.svg") as scratch:
            scratch.write_text(self.svg(), "utf-8")


@dataclass(frozen=True)
class Line:
    """Values over a number, with their spread."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None  # drawn as bars if one is not 0
    like: int | None = None  # the line whose colour and mark it has, hollow


def _wrapped(label: str, letters: int) -> list[str]:
    """The lines of a label, which may also break after a slash or a comma."""
    marked = re.sub(r"(?<=[/,])(?=\S)", "\0 ", label)
    return [line.replace("\0 ", "").rstrip("\0") for line in wrap(marked, letters)]


def _ticks(x: Sequence[float], places: np.ndarray) -> list[str]:
    """The labels of ticks, without those too close to the one before.

    >>> _ticks([1, 250, 260, 500], np.array([1, 250, 260, 500]))
    ['1', '250', '', '500']
    """
    labels, last = [], -np.inf
    for value, place in zip(x, places / max(np.ptp(places), 1e-9), strict=True):
        near = place - last < LETTER * len(f"{value:g}")
        labels.append("" if near else f"{value:g}")
        last = last if near else place
    return labels


def lines(drawn: Sequence[Line], x_label: str, y_label: str, logarithmic: bool = False) -> Draw:
    """Lines over numbers, on a logarithmic axis if `logarithmic`, or if they are few and double."""

    def draw(axes: Any) -> None:
        x = sorted({value for line in drawn for value in line.x})
        few = len(x) <= FEW
        for number, line in enumerate(drawn):
            i = number if line.like is None else line.like
            # With marks, a dash is new only when the colours repeat.
            dash = DASHES[(i // COLOURS if few else i) % len(DASHES)]
            axes.errorbar(
                line.x,
                line.y,
                yerr=line.spread if any(line.spread or ()) else None,
                label="\n".join(_wrapped(line.label, LETTERS)) or None,
                capsize=3,
                color=f"C{i}",
                linestyle=dash if line.like is None else ":",
                marker=MARKS[i % len(MARKS)] if few or line.like is not None else None,
                markerfacecolor=None if line.like is None else "none",
            )
        doubled = len(x) > 2 and x[0] > 0 and x[-1] / x[0] >= 8
        log = logarithmic or (few and doubled)
        axes.set_xlabel(f"{x_label} (log scale)" if log else x_label)
        axes.set_ylabel(y_label)
        if log:
            axes.set_xscale("log")
        if few:
            axes.minorticks_off()
            axes.set_xticks(x, _ticks(x, np.log(x) if log else np.array(x)))
        if len(drawn) > 1:
            labels = [line.label for line in drawn if line.label]
            columns = max(1, min(len(labels), LETTERS // (max(map(len, labels)) + 5)))
            rows = [len(_wrapped(label, LETTERS)) for label in labels[::columns]]
            axes.figure.set_figheight(HEIGHT + TEXT * sum(rows) + GAP * len(rows))
            axes.figure.legend(loc="outside lower center", ncols=columns)

    return draw


def intervals(
    labels: Sequence[str], values: Sequence[float], spread: Sequence[float], x: str
) -> Draw:
    """A dot for each name, with a bar for its spread."""

    def draw(axes: Any) -> None:
        axes.errorbar(values, range(len(labels)), xerr=spread, fmt="o", markersize=6, capsize=3)
        above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        for place, value in enumerate(values):
            axes.annotate(f"{value:.3f}", (value, place), **above)
        wrapped = [_wrapped(label, LETTERS // 2) for label in labels]
        most = max(map(len, wrapped))
        axes.figure.set_figheight(0.8 + max(ROW, TEXT * most + GAP) * len(labels))
        axes.set_yticks(range(len(labels)), ["\n".join(parts) for parts in wrapped])
        axes.set_ylim(len(labels) - 0.4, -0.7)
        axes.set_xlabel(x)
        axes.locator_params(axis="x", nbins=6)
        axes.margins(x=0.08)

    return draw
