"""A table once, and as Markdown, LaTeX (booktabs) and on the terminal.

Cells are text: whoever makes the table decides how many digits a figure has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caravan.atomic import replacing

MINUS, NONE = "\u2212", "\u2013"
"""A minus that is as wide as a plus, and what stands where there is no figure."""
LABEL = 5
"""Characters of a label that stay beside one another on a terminal."""
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

    def rich(self, width: int) -> Any:
        """For a terminal of a width; where it is narrow labels give way, and never a figure."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as Drawn
        from rich.text import Text

        # A Text is shown as it is; of a plain string rich would take [...] for markup.
        longest = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        least = [min(n, LABEL) if j < self.labels else n for j, n in enumerate(longest)]
        needed = sum(least) + 2 * len(least) + 1  # with what stands between columns
        drawn = Drawn(
            title=Text(self.caption),
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            width=needed if needed > width else None,
        )
        for j, name in enumerate(self.columns):
            justify: Any = "left" if j < self.labels else "right"
            drawn.add_column(
                Text(name),
                justify=justify,
                overflow="fold",
                no_wrap=j >= self.labels,
                min_width=least[j],
            )
        for i, row in enumerate(self.rows):
            drawn.add_row(
                *(Text(cell, "bold" if (i, j) in self.strong else "") for j, cell in enumerate(row))
            )
        return drawn


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
