"""Tables as Markdown, LaTeX (booktabs) and terminal output, and the other blocks of a report.

The cells of a table are text: the caller decides how many digits a score has.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from caravan.errors import printable
from caravan.files import replacing

MINUS, NONE = "\u2212", "\u2013"
"""A minus as wide as a plus, and the cell of a missing score (`-` in terminals)."""
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"$<$", ">": r"$>$", "|": r"$|$", "±": r"$\pm$", "\u2212": r"$-$", "→": r"$\to$",
    "\u2013": "--",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption.

    Args:
        name: the stem of its files, unique within a report.
        caption: one or more sentences, fit for a paper.
        labels: the number of text columns at the left; the others hold numbers.
        strong: (row, column) of the cells in bold, such as the best of a column.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    strong: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def markdown(self) -> str:
        """GitHub's pipe table, below the caption."""
        rule = ["---"] * self.labels + ["---:"] * (len(self.columns) - self.labels)
        head = [_markdown(name) for name in self.columns]
        rows = [head, rule, *self._cells(_markdown, "**{}**")]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([_markdown(self.caption), "", *lines, ""])

    def latex(self) -> str:
        """A floating table; the document needs `\\usepackage{booktabs}`."""
        cells = self._cells(_latex, r"\textbf{{{}}}")
        frame = pd.DataFrame(cells, columns=[_latex(name) for name in self.columns])
        return frame.style.hide(axis="index").to_latex(
            hrules=True,
            caption=_latex(self.caption),
            label=f"tab:{self.name}",
            column_format="l" * self.labels + "r" * (len(self.columns) - self.labels),
            position="t",
            position_float="centering",
        )

    def _cells(self, escape: Callable[[str], str], bold: str) -> list[list[str]]:
        return [
            [
                bold.format(escape(cell)) if (i, j) in self.strong else escape(cell)
                for j, cell in enumerate(row)
            ]
            for i, row in enumerate(self.rows)
        ]

    def text(self, width: int | None = None) -> str:
        """Aligned columns for a terminal; `*` marks strong cells.

        Args:
            width: of the terminal; wider tables are split into blocks of columns. None for files.
        """
        marked = {j for _, j in self.strong}

        def cell(i: int, j: int, text: str) -> str:
            mark = "*" if (i, j) in self.strong else " " if j in marked else ""
            return f"{printable('-' if text == NONE else text)}{mark}"

        every = enumerate([self.columns, *self.rows], -1)
        grid = [[cell(i, j, text) for j, text in enumerate(row)] for i, row in every]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)][: self.labels]
        labels = [
            "  ".join(f"{text:<{wide}}" for text, wide in zip(row, widths, strict=False))
            for row in grid
        ]
        heads, *rows = (row[self.labels :] for row in grid)
        frame = pd.DataFrame(rows, labels[1:], heads)
        frame.columns.name = labels[0]
        caption = printable(self.caption).replace("in bold", "marked *").replace(NONE, "-")
        caption = caption if width is None else textwrap.fill(caption, max(width, 20))
        return f"{caption}\n{frame.to_string(line_width=width)}\n"


@dataclass(frozen=True)
class Code:
    """A config or commands."""

    title: str
    text: str
    folded: bool = True


@dataclass(frozen=True)
class Section:
    """A heading, its anchor, and blocks below it.

    A block is a str, Code, a Table, a `plots.Plot` or `compare.Examples`.
    """

    title: str
    anchor: str
    blocks: Sequence[Any]


def show(shown: Table | str) -> None:
    """Print a table that fits the terminal, or a line, without control characters."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    text = shown.text(width) if isinstance(shown, Table) else printable(shown)
    sys.stdout.write(f"{text}\n")


def score(value: float | None) -> str:
    """A score with four digits, or the cell of a missing one."""
    return NONE if value is None or pd.isna(value) else f"{value:.4f}"


def signed(value: float) -> str:
    """A difference with its sign, with a minus and not a hyphen.

    >>> signed(0.0048), signed(-0.1), signed(-0.00001)
    ('+0.0048', '\\u22120.1000', '+0.0000')
    """
    text = f"{value:+.4f}"
    return "+0.0000" if text == "-0.0000" else text.replace("-", MINUS)


def p_value(p: float) -> str:
    """A p-value as papers print it.

    >>> p_value(0.0184), p_value(0.00001), p_value(1.0)
    ('.018', '<.001', '1.000')
    """
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def slug(text: str) -> str:
    """A text as part of a file name or an anchor.

    >>> slug("MRR(rel=2)@10")
    'MRR-rel-2-10'
    """
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def depth_note(scored: Mapping[str, Mapping[str, Any]]) -> str:
    """Why some systems or stages have no score: a sentence, empty if all of them have one.

    Args:
        scored: by name, with `depth` and `too_deep` of `caravan.report.records.to_depth`.
    """
    short = [f"{name} is {of['depth']:,} deep" for name, of in scored.items() if of.get("too_deep")]
    if not short:
        return ""
    return f" Not scored ({NONE}): the measure looks deeper than the run ({', '.join(short)})."


def best(rows: Sequence[Sequence[float | None]], labels: int = 1) -> frozenset[tuple[int, int]]:
    """(row, column) of the highest score of each column, ties included.

    A column whose scores are all equal has none.

    Args:
        rows: scores alone; None where one is missing.
        labels: the number of columns before the scores.
    """
    frame = pd.DataFrame(rows, dtype=float)
    strong = frame.eq(frame.max()) & (frame.max() > frame.min())
    return frozenset((i, j + labels) for i, j in np.argwhere(strong.to_numpy()).tolist())


def write(folder: Path, tables: Iterable[Table]) -> None:
    """Write each table as `<name>.md` and `<name>.tex`."""
    for table in tables:
        for suffix, text in (("md", table.markdown()), ("tex", table.latex())):
            with replacing(folder / f"{table.name}.{suffix}") as scratch:
                scratch.write_text(text, "utf-8")


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[\]])", r"\\\1", " ".join(text.split()))


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))
