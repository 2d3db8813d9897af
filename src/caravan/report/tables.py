"""A table once, and as Markdown, LaTeX (booktabs) and on the terminal.

Cells are text: whoever makes the table decides how many digits a figure has.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caravan.errors import printable
from caravan.files import replacing

MINUS, NONE = "\u2212", "\u2013"
"""A minus that is as wide as a plus, and what stands where there is no score (`-` in terminals)."""
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
        caption: one sentence or more, fit for a paper.
        labels: how many columns at the left are text; the others hold numbers.
        strong: (row, column) of the cells that stand out, such as the best of a column.
        folded: on a page it is opened by whoever wants it.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    strong: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    folded: bool = False

    def markdown(self) -> str:
        """GitHub's pipe table, under the caption."""
        rule = ["---"] * self.labels + ["---:"] * (len(self.columns) - self.labels)
        body = [
            [f"**{cell}**" if (i, j) in self.strong else cell for j, cell in enumerate(row)]
            for i, row in enumerate(_escaped(self.rows, _markdown))
        ]
        head = _escaped([self.columns], _markdown)
        lines = ["| " + " | ".join(row) + " |" for row in [*head, rule, *body]]
        return "\n".join([_markdown(self.caption), "", *lines, ""])

    def latex(self) -> str:
        """A floating table; its document says `\\usepackage{booktabs}`."""
        body = [
            [rf"\textbf{{{cell}}}" if (i, j) in self.strong else cell for j, cell in enumerate(row)]
            for i, row in enumerate(_escaped(self.rows, _latex))
        ]
        (head,) = _escaped([self.columns], _latex)
        return "\n".join(
            [
                r"\begin{table}[t]",
                r"\centering",
                rf"\caption{{{_latex(self.caption)}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{'l' * self.labels}{'r' * (len(head) - self.labels)}}}",
                r"\toprule",
                " & ".join(head) + r" \\",
                r"\midrule",
                *(" & ".join(row) + r" \\" for row in body),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def rich(self, width: int, wrap: bool = False) -> Any:
        """For a terminal of a width. `*` marks cells that stand out, since not all show bold.

        Names and scores stay whole: where a row is too long, its labels get a line of their own.

        Args:
            wrap: the caption too; in a file it is one line, for those who search in it.
        """
        from rich.box import SIMPLE_HEAD
        from rich.cells import cell_len
        from rich.console import Group
        from rich.table import Table as Drawn
        from rich.text import Text

        marked = {j for _, j in self.strong}
        cells = [
            [
                ("-" if cell == NONE else printable(cell))
                + ("*" if (i, j) in self.strong else " " if j in marked else "")
                for j, cell in enumerate(row)
            ]
            for i, row in enumerate(self.rows)
        ]
        heads = [
            printable(name) + (" " if j in marked else "") for j, name in enumerate(self.columns)
        ]
        lengths = [max(map(cell_len, column)) for column in zip(heads, *cells, strict=True)]
        caption = printable(self.caption).replace("in bold", "marked *").replace(NONE, "-")
        title = Text(textwrap.fill(caption, max(width, 20)) if wrap else caption, "italic")
        if sum(lengths) + 2 * len(lengths) + 1 > width:
            return Group(title, self._stacked(heads, cells, lengths))
        # A Text is shown as it is; of a plain string rich would take [...] for markup.
        drawn = Drawn(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for j, name in enumerate(heads):
            justify: Any = "left" if j < self.labels else "right"
            drawn.add_column(Text(name), justify=justify, no_wrap=True)
        for i, row in enumerate(cells):
            drawn.add_row(
                *(Text(cell, "bold" if (i, j) in self.strong else "") for j, cell in enumerate(row))
            )
        return Group(title, drawn)

    def _stacked(self, heads: list[str], cells: list[list[str]], lengths: list[int]) -> Any:
        """Each row as two lines: labels, and below them the numbers."""
        from rich.cells import cell_len
        from rich.text import Text

        def lines(row: list[str], i: int | None) -> Iterator[Text]:
            yield Text(" " + " | ".join(row[: self.labels]), "bold" if i is None else "")
            numbers = Text("  ")
            for j in range(self.labels, len(row)):
                strong = i is None or (i, j) in self.strong
                space = " " * (2 + lengths[j] - cell_len(row[j]))
                numbers.append(space).append(row[j], "bold" if strong else "")
            yield numbers

        rule = 2 + sum(length + 2 for length in lengths[self.labels :])
        return Text("\n").join(
            [
                *lines(heads, None),
                Text(" " + "\u2500" * (rule - 1)),
                *(line for i, row in enumerate(cells) for line in lines(row, i)),
                Text(""),
            ]
        )


class Screen:
    """Prints reports: tables that fit the terminal, and lines without what would control it."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(soft_wrap=True, markup=False, highlight=False)

    def table(self, table: Table) -> None:
        self._console.print(table.rich(self._console.width, wrap=self._console.is_terminal))

    def line(self, text: str, style: str = "") -> None:
        self._console.print(printable(text), style=style)

    def rule(self, title: str) -> None:
        self._console.rule(printable(title), align="left")


def depth_note(scored: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a table has NONE for some systems or stages: a sentence; empty if it has for none.

    Args:
        scored: by name, with `depth` and `too_deep` of `caravan.report.records.to_depth`.
    """
    short = [f"{name} is {of['depth']:,} deep" for name, of in scored.items() if of.get("too_deep")]
    if not short:
        return ""
    return f" Not scored ({NONE}): the measure looks deeper than the run ({', '.join(short)})."


def best(rows: Sequence[Sequence[float | None]], labels: int = 1) -> frozenset[tuple[int, int]]:
    """(row, column) of the highest figure of each column, ties included; columns after labels.

    None where all rows have the same.
    """
    strong: set[tuple[int, int]] = set()
    for j, column in enumerate(zip(*rows, strict=True)):
        known = [value for value in column if value is not None]
        if len(set(known)) > 1:
            strong |= {(i, j + labels) for i, value in enumerate(column) if value == max(known)}
    return frozenset(strong)


def write(folder: Path, tables: Iterable[Table]) -> None:
    """Each table as `<name>.md` and `<name>.tex`."""
    for table in tables:
        for suffix, text in (("md", table.markdown()), ("tex", table.latex())):
            with replacing(folder / f"{table.name}.{suffix}") as scratch:
                scratch.write_text(text, "utf-8")


def _escaped(rows: Iterable[Sequence[str]], escape: Any) -> list[list[str]]:
    return [[escape(cell) for cell in row] for row in rows]


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[\]])", r"\\\1", " ".join(text.split()))


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))
