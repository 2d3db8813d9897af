"""Plain .tsv: an id and a text on each line, in a folder with qrels.

corpus.tsv           id <tab> text, or id <tab> title <tab> text
queries.tsv          id <tab> text; or queries.<split>.tsv for each split
qrels.<split>.tsv    query <tab> passage <tab> grade, or TREC's four columns; or qrels/<split>.tsv

python evaluate.py retriever=bm25 data=tsv data.path=/data/mine
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caravan.data.readers.labelled import Labelled, WithHeldOut
from caravan.data.readers.lines import by_stem, columns, one_of
from caravan.data.texts import Record
from caravan.errors import InputError

LAYOUT = "a folder of plain tsv holds corpus.tsv, queries.tsv and qrels.<split>.tsv (or .gz)"


@dataclass
class Tsv(WithHeldOut):
    """A folder of .tsv files, each plain or .gz."""

    def files(self, folder: Path) -> Labelled:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: set data.path to one; {LAYOUT}")
        corpus, whole = one_of(folder, ["corpus.tsv"]), one_of(folder, ["queries.tsv"])
        queries = [*([whole] if whole else []), *by_stem(folder, [".tsv"], "queries.").values()]
        if corpus is None or not queries:
            missing = "corpus.tsv" if corpus is None else "queries.tsv"
            raise InputError(f"{folder}/{missing} (or .gz) is missing: {LAYOUT}")
        return Labelled(
            ("tsv",), corpus, passages, queries, asked, _qrels(folder), held_out=self._share()
        )


def passages(file: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record) of `id, text` or `id, title, text`; a header may name them.

    Where the third column is empty on every line, a tab ends the lines of `id, text`.
    """
    layouts = [("id", "text"), ("id", "title", "text")]
    expected = "2 (id, text) or 3 (id, title, text)"
    rows = columns(file, layouts, expected)
    ended = all(len(found) == 3 and not found[2] for _, found in rows)
    for number, found in columns(file, layouts, expected):
        if len(found) == 2 or ended:
            yield number, (found[0], "", found[1])
        else:
            yield number, (found[0], found[1], found[2])


def asked(file: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record) of `id, text`; a header may name them."""
    for number, (name, text) in columns(file, [("id", "text")], "2 (id, text)"):
        yield number, (name, "", text)


def _qrels(folder: Path) -> dict[str, Path]:
    if (whole := one_of(folder, ["qrels.tsv"])) is not None:
        raise InputError(f"{whole} names no split: rename it, for instance to qrels.test.tsv")
    beside, below = by_stem(folder, [".tsv"], "qrels."), by_stem(folder / "qrels", [".tsv"])
    if both := sorted(beside.keys() & below.keys()):
        first, second = beside[both[0]], below[both[0]]
        raise InputError(f"{first} and {second} are both there: keep one of them")
    return beside | below
