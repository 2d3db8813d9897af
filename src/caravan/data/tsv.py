"""Plain .tsv: an id and a text on each line, in a folder with qrels.

corpus.tsv           id <tab> text, or id <tab> title <tab> text
queries.tsv          id <tab> text; or queries.<split>.tsv for each split
qrels.<split>.tsv    query <tab> passage <tab> grade, or TREC's four columns; or qrels/<split>.tsv

python evaluate.py retriever=bm25 data=tsv data.path=/data/mine
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from caravan.data.collection import Collection
from caravan.data.files import columns, one_of
from caravan.data.labelled import Labelled
from caravan.data.texts import Record
from caravan.errors import InputError

LAYOUT = "a folder of plain tsv holds corpus.tsv, queries.tsv and qrels.<split>.tsv (or .gz)"


class Tsv:
    """A folder of .tsv files, each plain or .gz.

    Args:
        path: the folder.
        name: what reports call the collection; the folder's name by default.
        train_split, dev_split, split: qrels to train on, to validate on, and to score.
        unknown_ids: "refuse" judgements of unknown queries or passages, or "count" them and go on.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        dev_split: str = "dev",
        split: str = "test",
        unknown_ids: str = "refuse",
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.resolve().name
        self.train_split, self.dev_split, self.split = train_split, dev_split, split
        self.unknown_ids = unknown_ids

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: a file is missing or wrong; says which, at which line, and what to do.
        """
        if not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder: set data.path to one; {LAYOUT}")
        corpus = one_of(self.path, ["corpus.tsv"])
        queries = _named(self.path, "queries")
        if corpus is None or not queries:
            missing = "corpus.tsv" if corpus is None else "queries.tsv"
            raise InputError(f"{self.path}/{missing} (or .gz) is missing: {LAYOUT}")
        qrels = _named(self.path, "qrels")
        if (self.path / "qrels").is_dir():
            qrels |= _stems(self.path / "qrels", "")
        return Labelled(
            *(self.name, corpus, passages, list(queries.values()), asked, qrels),
            unknown_ids=self.unknown_ids,
        ).collection(cache_dir, "tsv")


def passages(file: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record) of `id, text` or `id, title, text`."""
    for number, found in columns(file, (2, 3), "2 (id, text) or 3 (id, title, text)"):
        yield number, (found[0], "" if len(found) == 2 else found[1], found[-1])


def asked(file: Path) -> Iterator[tuple[int, Record]]:
    """(line number, record) of `id, text`."""
    for number, (name, text) in columns(file, (2,), "2 (id, text)"):
        yield number, (name, "", text)


def _named(folder: Path, part: str) -> dict[str, Path]:
    """`<part>.tsv` under "", `<part>.<split>.tsv` under the split."""
    found = _stems(folder, f"{part}.")
    whole = one_of(folder, [f"{part}.tsv"])
    return found if whole is None else {"": whole, **found}


def _stems(folder: Path, prefix: str) -> dict[str, Path]:
    names = (file.name.removesuffix(".gz") for file in folder.iterdir() if file.is_file())
    stems = {
        name.removeprefix(prefix).removesuffix(".tsv")
        for name in names
        if name.startswith(prefix) and name.endswith(".tsv") and name != f"{prefix}tsv"
    }
    found = {stem: one_of(folder, [f"{prefix}{stem}.tsv"]) for stem in sorted(stems)}
    return {stem: file for stem, file in found.items() if file is not None}
