"""A BEIR folder: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, each plain or .gz.

It becomes a `Collection`, built on first use and opened later: found again by what the files hold,
not by where they lie. Whatever is wrong in a file is told in one sentence with file and line.
Other layouts are read by `msmarco`, `tsv`, `tevatron`, `flagembedding`, `irds`.

    python train.py data=beir data.path=/data/scifact
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from caravan.data.collection import Collection
from caravan.data.jsonl import records
from caravan.data.labelled import Labelled
from caravan.data.texts import Record
from caravan.errors import InputError

QRELS_SUFFIXES = (".tsv", ".txt", ".qrels")


class Beir:
    """A folder in the layout of BEIR (Thakur et al. 2021, arXiv 2104.08663).

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
        files = self._files()
        qrels = {
            part.removeprefix("qrels/"): file
            for part, file in files.items()
            if part.startswith("qrels/")
        }
        return Labelled(
            *(self.name, files["corpus"], _records, [files["queries"]], _records, qrels),
            unknown_ids=self.unknown_ids,
        ).collection(cache_dir, "beir")

    def _files(self) -> dict[str, Path]:
        """The file of each part: corpus, queries, qrels/<split> in alphabetical order."""
        layout = "a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/<split>.tsv"
        if not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder: set data.path to one, {layout}")
        found: dict[str, Path] = {}
        for part in ("corpus", "queries"):
            there = [self.path / f"{part}.jsonl{end}" for end in ("", ".gz")]
            there = [file for file in there if file.is_file()]
            if not there:
                raise InputError(f"{self.path}/{part}.jsonl (or .gz) is missing: {layout}")
            _add(found, part, there[0])
            for file in there[1:]:
                _add(found, part, file)
        for file in sorted((self.path / "qrels").glob("*")):
            plain = Path(file.name.removesuffix(".gz"))
            if plain.suffix in QRELS_SUFFIXES and file.is_file():
                _add(found, f"qrels/{plain.stem}", file)
        return found


def _add(found: dict[str, Path], part: str, file: Path) -> None:
    if part in found:
        raise InputError(f"{found[part]} and {file} are both {part}: keep one of them")
    found[part] = file


def _records(file: Path) -> Iterator[tuple[int, Record]]:
    return records(file, ids=("_id",), texts=("text",))
