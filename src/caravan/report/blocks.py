"""What a page is made of: sections, and in them notes, facts, tables, plots, queries and code.

Plain data; `templates/page.html` says how each looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from caravan.report.examples import Example
from caravan.report.plots import Plot
from caravan.report.tables import Table


@dataclass(frozen=True)
class Note:
    """A sentence or two."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values, under a heading if they are of one thing among several."""

    items: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True)
class Code:
    """A config or commands; folded away unless it is short."""

    title: str
    text: str
    folded: bool = True


@dataclass(frozen=True)
class Queries:
    """Queries that one system does better, or worse, than another."""

    title: str
    before: str  # names of the systems
    after: str
    measure: str
    examples: Sequence[Example]


Block = Note | Facts | Code | Queries | Table | Plot


@dataclass(frozen=True)
class Section:
    """A heading, the anchor that leads to it, and what stands below it."""

    title: str
    anchor: str
    blocks: Sequence[Block] = field(default_factory=list)


def plots(sections: Sequence[Section]) -> list[Plot]:
    return [block for section in sections for block in section.blocks if isinstance(block, Plot)]


def tables(sections: Sequence[Section]) -> list[Table]:
    return [block for section in sections for block in section.blocks if isinstance(block, Table)]
