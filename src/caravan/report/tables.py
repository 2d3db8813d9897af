"""Tables as Markdown, LaTeX (booktabs) and terminal output, and the other blocks of a report.

The cells of a table are text: the caller decides how many digits a score has.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from caravan.errors import printable
from caravan.files import replacing

MINUS, NONE = "\u2212", "\u2013"
"""A minus as wide as a plus, and the cell of a missing score (`-` in terminals)."""
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"$<$", ">": r"$>$", "|": r"$|$", "±": r"$\pm$", "\u2212": r"$-$", "→": r"$\to$",
    "\u2013": "--", "≥": r"$\geq$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption.

    Args:
        name: the stem of its files, unique within a report.
        caption: one or more sentences, fit for a paper.
        labels: the number of text columns at the left; the others hold numbers.
        strong: (row, column) of the cells in bold, such as the best of a column.
        folded: on a page, closed until the reader opens it.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    strong: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    folded: bool = False

    def markdown(self) -> str:
        """GitHub's pipe table, below the caption."""
        rule = ["---"] * self.labels + ["---:"] * (len(self.columns) - self.labels)
        head = [_markdown(name) for name in self.columns]
        lines = [
            f"| {' | '.join(row)} |" for row in (head, rule, *self._cells(_markdown, "**{}**"))
        ]
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

    def _cells(self, escape: Any, bold: str) -> list[list[str]]:
        return [
            [
                bold.format(escape(cell)) if (i, j) in self.strong else escape(cell)
                for j, cell in enumerate(row)
            ]
            for i, row in enumerate(self.rows)
        ]

    def rich(self, width: int, wrap: bool = False) -> Group:
        """For a terminal. `*` marks strong cells, because some terminals do not show bold.

        Names and scores are never cut: if a row is too long, its labels go on a separate line.

        Args:
            width: of the terminal, in characters.
            wrap: wrap the caption; in a file it stays one line, so that a search finds it.
        """
        marked = {j for _, j in self.strong}

        def cell(i: int, j: int, text: str) -> Text:
            # A Text is printed as it is; rich would read [...] in a plain string as markup.
            strong = (i, j) in self.strong
            text = "-" if text == NONE else printable(text)
            pad = "*" if strong else " " if j in marked else ""
            return Text(f"{text}{pad}", "bold" if strong else "")

        heads, *rows = (
            [cell(i, j, text) for j, text in enumerate(row)]
            for i, row in enumerate([self.columns, *self.rows], -1)
        )
        widths = [max(one.cell_len for one in column) for column in zip(heads, *rows, strict=True)]
        caption = printable(self.caption).replace("in bold", "marked *").replace(NONE, "-")
        title = Text(textwrap.fill(caption, max(width, 20)) if wrap else caption, "italic")
        if sum(widths) + 2 * len(widths) + 1 > width:
            return Group(title, self._stacked([heads, *rows], widths))
        drawn = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for j, head in enumerate(heads):
            drawn.add_column(head, justify="left" if j < self.labels else "right", no_wrap=True)
        for row in rows:
            drawn.add_row(*row)
        return Group(title, drawn)

    def _stacked(self, rows: list[list[Text]], widths: list[int]) -> Text:
        """Two lines for each row: the labels, and below them the numbers."""
        lines = []
        for row in rows:
            for number, width in zip(row[self.labels :], widths[self.labels :], strict=True):
                number.pad_left(2 + width - number.cell_len)
            labels = Text(" | ").join(row[: self.labels])
            numbers = Text("  ").append_text(Text().join(row[self.labels :]))
            lines += [Text(" ").append_text(labels), numbers]
        rule = "\u2500" * (1 + sum(2 + width for width in widths[self.labels :]))
        return Text("\n").join([*lines[:2], Text(f" {rule}"), *lines[2:], Text()])


@dataclass(frozen=True)
class Facts:
    """Names and values; with a title if a section has several of them."""

    items: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True)
class Code:
    """A config or commands."""

    title: str
    text: str
    folded: bool = True


@dataclass(frozen=True)
class Section:
    """A heading, its anchor, and blocks below it.

    A block is a str, Facts, Code, a Table, a `plots.Plot` or `compare.Examples`.
    """

    title: str
    anchor: str
    blocks: Sequence[Any]


class Screen:
    """Prints reports: tables that fit the terminal, and lines without control characters."""

    def __init__(self) -> None:
        self._console = Console(soft_wrap=True, markup=False, highlight=False)

    def table(self, table: Table) -> None:
        self._console.print(table.rich(self._console.width, wrap=self._console.is_terminal))

    def line(self, text: str, style: str = "") -> None:
        self._console.print(printable(text), style=style)

    def rule(self, title: str) -> None:
        self._console.rule(printable(title), align="left")


def score(value: float | None) -> str:
    """A score with four digits, or the cell of a missing one."""
    return NONE if value is None else f"{value:.4f}"


def signed(value: float) -> str:
    """A difference with its sign, with a minus and not a hyphen.

    >>> signed(0.0048), signed(-0.1), signed(-0.00001)
    ('+0.0048', '\\u22120.1000', '+0.0000')
    """
    text = f"{value:+.4f}"
    return "+0.0000" if text == "-0.0000" else text.replace("-", MINUS)


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
    strong: set[tuple[int, int]] = set()
    for j, column in enumerate(zip(*rows, strict=True), labels):
        known = [value for value in column if value is not None]
        if len(set(known)) > 1:
            strong |= {(i, j) for i, value in enumerate(column) if value == max(known)}
    return frozenset(strong)


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
