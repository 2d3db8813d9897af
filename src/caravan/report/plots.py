"""Plots for a page and for a paper: one look, two themes, told apart without colour.

A plot is drawn by one function into matplotlib's axes; `Plot.svg` gives it in light or in dark for
a page, `write` leaves it as png and svg with its caption. Colours are those of Okabe and Ito, made
darker or lighter until they stand out from the ground (3:1), and every line has a mark and a dash
of its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from caravan.files import replacing

WIDTH, HEIGHT = 4.2, 2.8
"""Inches. Letters of 8 and 9 points fit a paper as they are, and can be read on a phone."""
STEPS = 400
"""Of a curve over all queries."""
FEW = 12
"""Points of a line that each get a mark."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


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


@dataclass(frozen=True)
class Plot:
    """A figure of a report.

    Args:
        name: the stem of its files, unique within a report.
        caption: fit for a paper: what is drawn, over what, and what bars stand for.
        alt: the same for those who do not see it, with the figures that count.
        draw: draws into a matplotlib figure that has a theme's colours.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[Any, Theme], None]
    height: float = HEIGHT

    def svg(self, theme: Theme, small: bool = False) -> str:
        """As text.

        Args:
            small: to be put into a page: letters stay text, in the reader's own font, where they
                would be outlines that look the same everywhere; no prologue, which names addresses.
        """
        text = self._drawn(theme, "svg", small).decode()
        if not small:
            return text
        return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)

    def png(self) -> bytes:
        return self._drawn(LIGHT, "png")

    def _drawn(self, theme: Theme, kind: str, small: bool = False) -> bytes:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with rc_context(_settings(theme, small)):
            figure = Figure(figsize=(WIDTH, self.height), layout="constrained")
            FigureCanvasAgg(figure)
            self.draw(figure, theme)
            out = io.BytesIO()
            # No date: the same figures give the same file.
            more: Any = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 200}
            figure.savefig(out, format=kind, **more)
        return out.getvalue()


def write(folder: Path, plots: Iterable[Plot]) -> None:
    """Each plot as `<name>.png` and `<name>.svg`, and the captions of all as `captions.md`."""
    captions = ["# Captions", ""]
    for plot in plots:
        with replacing(folder / f"{plot.name}.png") as scratch:
            scratch.write_bytes(plot.png())
        with replacing(folder / f"{plot.name}.svg") as scratch:
            scratch.write_text(plot.svg(LIGHT), "utf-8")
        captions += [f"**{plot.name}**: {plot.caption}", ""]
    with replacing(folder / "captions.md") as scratch:
        scratch.write_text("\n".join(captions), "utf-8")


@dataclass(frozen=True)
class Line:
    """Values over a number, with their spread."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None  # drawn as bars where one is not 0


def lines(
    drawn: Sequence[Line], x_label: str, y_label: str, ticks: bool = True
) -> Callable[[Any, Theme], None]:
    """One plot with a line each.

    Args:
        ticks: the values of x are few, and each has its tick; a logarithmic axis where they double.
            Else x are whole numbers, such as updates.
    """

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.add_subplot()
        few = max(len(line.x) for line in drawn) <= FEW
        _lines(axes, theme, drawn, x_label, y_label, marks=few)
        x = sorted({value for line in drawn for value in line.x})
        if ticks and len(x) <= FEW:
            if len(x) > 2 and x[0] > 0 and x[-1] / x[0] >= 8:
                axes.set_xscale("log")
                axes.minorticks_off()
            axes.set_xticks(x, [f"{value:g}" for value in x])
        elif not ticks:
            axes.xaxis.get_major_locator().set_params(integer=True)

    return draw


def panels(groups: Sequence[tuple[str, Sequence[Line]]], x_label: str) -> Callable[..., None]:
    """Plots side by side over the same whole numbers, such as loss and validation over updates."""

    def draw(figure: Any, theme: Theme) -> None:
        for axes, (name, drawn) in zip(
            figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True
        ):
            few = max(len(line.x) for line in drawn) <= FEW
            _lines(axes, theme, drawn, x_label, "", marks=few)
            axes.set_title(name)
            axes.xaxis.get_major_locator().set_params(integer=True)

    return draw


def bars(
    labels: Sequence[str], values: Sequence[float], spread: Sequence[float], x_label: str
) -> Any:
    """A dot for each name with a bar for its spread: figures need no ground to stand on."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.add_subplot()
        y = range(len(labels))
        axes.errorbar(
            values, y, xerr=spread, fmt="o", markersize=6, capsize=3, color=theme.colours[0]
        )
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:.3f}", (value, place), (0, 6), textcoords="offset points", ha="center",
                fontsize=8,
            )  # fmt: skip
        axes.set_yticks(list(y), labels)
        axes.set_ylim(len(labels) - 0.4, -0.7)
        axes.set_xlabel(x_label)
        axes.locator_params(axis="x", nbins=6)
        axes.margins(x=0.08)

    return draw


def stage_lines(drawn: Sequence[Line], names: Sequence[str]) -> Callable[[Any, Theme], None]:
    """Measures from stage to stage; the lines' x are places among the names."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.add_subplot()
        _lines(axes, theme, drawn, "stage", "", marks=True)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylim(0, 1)

    return draw


def changes(differences: Sequence[float], y_label: str) -> Callable[[Any, Theme], None]:
    """What each query gained or lost, in the order of it."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.add_subplot()
        ordered = sorted(differences, reverse=True)
        # As many steps as show: a file must not grow with the queries.
        places = [round(i * len(ordered) / STEPS) for i in range(STEPS)]
        kept = [i for i, _ in groupby(places if len(ordered) > STEPS else range(len(ordered)))]
        ends = [*kept, len(ordered)]
        for colour, sign in ((0, 1), (1, -1)):
            part = [max(ordered[i] * sign, 0) * sign for i in kept]
            axes.stairs(part, ends, fill=True, color=theme.colours[colour])
        axes.axhline(0, color=theme.ink, linewidth=0.8)
        axes.set_xlabel("queries, by what they gained")
        axes.set_ylabel(y_label)
        axes.margins(x=0.01)

    return draw


def _lines(
    axes: Any, theme: Theme, drawn: Sequence[Line], x_label: str, y_label: str, marks: bool
) -> None:
    for i, line in enumerate(drawn):
        look = {
            "color": theme.colours[i % len(theme.colours)],
            "linestyle": DASHES[i // len(theme.colours) % len(DASHES)] if marks else DASHES[i % 4],
            "marker": MARKS[i % len(MARKS)] if marks else None,
            "markersize": 5,
            "label": line.label or None,
        }
        if line.spread is not None and any(line.spread):
            axes.errorbar(line.x, line.y, yerr=line.spread, capsize=3, **look)
        else:
            axes.plot(line.x, line.y, **look)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if any(line.label for line in drawn) and len(drawn) > 1:
        longest = max(len(line.label) for line in drawn)
        axes.figure.legend(
            handles=axes.get_legend_handles_labels()[0],
            loc="outside lower center",
            ncols=max(1, min(len(drawn), 48 // (longest + 6))),
        )


def _settings(theme: Theme, small: bool) -> Any:
    return {
        "svg.fonttype": "none" if small else "path",
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.ground,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.labelcolor": theme.ink,
        "axes.labelsize": 9,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 9,
        "axes.titlecolor": theme.ink,
        "figure.facecolor": theme.ground,
        "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
        "font.size": 9,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "legend.fontsize": 8,
        "legend.handlelength": 1.8,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
        "lines.linewidth": 1.6,
        "savefig.facecolor": theme.ground,
        "svg.hashsalt": "caravan",
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "xtick.labelsize": 8,
        "ytick.color": theme.ink,
        "ytick.labelsize": 8,
    }
