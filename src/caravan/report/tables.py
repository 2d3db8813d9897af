"""Tables as Markdown, LaTeX (booktabs) and terminal output, and the other blocks of a report.

The cells of a table are text: `Table.of` formats numbers.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from caravan.errors import printable
from caravan.files import replacing

MINUS, NONE = "\u2212", "\u2013"
"""A minus as wide as a plus, and the cell of a missing score (`-` in terminals)."""
SCORE = "{:.4f}"
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

    @classmethod
    def of(
        cls,
        name: str,
        caption: str,
        frame: pd.DataFrame,
        formats: Mapping[str, str] | None = None,
        labels: int = 1,
    ) -> Table:
        """The columns of a frame; a missing value is `NONE`.

        Numbers in a column without a format are scores: the best of the column is bold.
        """
        heads, formats = list(frame), formats or {}
        forms = ["{}"] * labels + [formats.get(head, SCORE) for head in heads[labels:]]
        rows = [
            [_cell(value, form) for value, form in zip(row, forms, strict=True)]
            for row in frame.itertuples(index=False, name=None)
        ]
        numeric = [j for j, dtype in enumerate(frame.dtypes) if dtype.kind in "fi" and j >= labels]
        scores = [j for j in numeric if heads[j] not in formats]
        strong = frozenset((i, scores[j]) for i, j in best(frame.iloc[:, scores]))
        return cls(name, caption, heads, rows, labels, strong)

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
        grid = [list(self.columns), *map(list, self.rows)]
        for i, row in enumerate(grid, -1):
            for j, cell in enumerate(row):
                mark = "*" if (i, j) in self.strong else " " * (j in marked)
                row[j] = printable("-" if cell == NONE else cell) + mark
        wide = [max(map(len, column)) for column in zip(*grid, strict=True)][: self.labels]
        labels = ["  ".join(map(str.ljust, row, wide)) for row in grid]
        heads, *rows = (row[self.labels :] for row in grid)
        frame = pd.DataFrame(rows, labels[1:], heads)
        frame.columns.name = labels[0]
        caption = printable(self.caption).replace("in bold", "marked *").replace(NONE, "-")
        caption = caption if width is None else textwrap.fill(caption, max(width, 20))
        return f"{caption}\n{frame.to_string(line_width=width)}\n"

    def write(self, folder: Path) -> None:
        """Write `<name>.md` and `<name>.tex`."""
        for suffix, text in (("md", self.markdown()), ("tex", self.latex())):
            with replacing(folder / f"{self.name}.{suffix}") as scratch:
                scratch.write_text(text, "utf-8")


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


def show(shown: Section | Table | str) -> None:
    """Print a table that fits the terminal, or text, without control characters.

    Of a section, its tables and texts are printed.
    """
    if isinstance(shown, Section):
        for block in shown.blocks:
            if isinstance(block, Table | str):
                show(block)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    text = shown.text(width) if isinstance(shown, Table) else printable(shown)
    sys.stdout.write(f"{text}\n")


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


def best(scores: pd.DataFrame) -> list[tuple[int, int]]:
    """(row, column) of the highest score of each column, ties included.

    A column whose scores are all equal has none.
    """
    strong = scores.eq(scores.max()) & (scores.max() > scores.min())
    return [(int(i), int(j)) for i, j in np.argwhere(strong.to_numpy())]


def _cell(value: Any, form: str) -> str:
    if isinstance(value, str):
        return value
    text = NONE if pd.isna(value) else form.format(value)
    return text if form == "{}" else text.replace("-", MINUS)


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[\]])", r"\\\1", " ".join(text.split()))


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))
