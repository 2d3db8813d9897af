"""Unlabelled text: files, or a dataset of the Hugging Face hub, as a collection without queries.

LLaRA adapts on unlabelled text. The texts become the corpus of a memory-mapped collection, so that
a Wikipedia takes disk and no memory, and a resumed run finds the same texts in the same order.

    python train.py stage=adaptation data=texts data.path=/data/wikipedia.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from caravan.data.collection import Collection, write_collection
from caravan.data.readers.lines import contents, digest, lines, objects, parsed, text_of
from caravan.data.readers.tables import Rows
from caravan.data.source import Source, cache_key, cached_collection
from caravan.errors import InputError
from caravan.files import listed

LINE = 'every line is one object such as {"text": "..."}'
COLUMNS = "set data.text and data.title to columns of texts"

Documents = Iterable[tuple[str, tuple[str, str]]]
"""(place, (title, text)) of each document."""


class Unlabelled(Source):
    """A source of texts alone: it has no splits."""

    train_split = dev_split = split = ""


@dataclass
class TextFiles(Unlabelled):
    """Text or jsonl files, each plain or .gz: one, or all in a folder.

    Args:
        path: a file or a folder.
        name: what reports call the collection; the name of the path by default.
        documents: a document of a text file is the whole "file", or a "line". A line of jsonl is
            always one: an object with "text", and "title" if it has one.
    """

    path: str
    name: str | None = None
    documents: Literal["file", "line"] = "file"

    def collection(self, cache_dir: str | Path) -> Collection:
        path = Path(self.path)
        if not path.exists():
            raise InputError("file-not-found", f"there is no file or folder {path}: set data.path")
        files = [file for file in ([path] if path.is_file() else listed(path)) if _suffix(file)]
        if not files:
            raise InputError(
                "file-not-found", f"{path} holds no .jsonl or .txt (nor .gz): give text files"
            )
        read = [[_suffix(file), digest(file, cache_dir)] for file in files]
        key = cache_key("whole texts", read, self.documents)
        found = (one for file in files for one in self._documents(file))
        return _collection(cache_dir, self.name or path.resolve().name, key, found, path)

    def _documents(self, file: Path) -> Documents:
        if _suffix(file) == ".jsonl":
            yield from parsed(objects(file, LINE), text_of, LINE)
        elif self.documents == "line":
            yield from ((place, ("", line.strip())) for place, line in lines(file))
        else:
            yield str(file), ("", "".join(line for _, line in lines(file, blank=True)))


@dataclass
class HubTexts(Unlabelled):
    """A dataset of the Hugging Face hub, or of a folder that `datasets` reads.

    Args:
        path: hub id, such as wikimedia/wikipedia, or a folder.
        config: such as 20231101.en; None if there is only one.
        subset: the split of the dataset to read.
        text, title: columns; None goes without titles.
        revision: a branch, tag or commit.
        name: what reports call the collection; the last part of the path by default.
    """

    path: str
    config: str | None = None
    subset: str = "train"
    text: str = "text"
    title: str | None = None
    revision: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        self.hub_id = None if Path(self.path).exists() else self.path

    def collection(self, cache_dir: str | Path) -> Collection:
        found = contents(self.path, cache_dir)
        place = "" if found else self.path  # a folder is found again by its content
        settings = [place, self.config, self.subset, self.text, self.title, self.revision]
        name = self.name or self.path.rstrip("/").rpartition("/")[2]
        key = cache_key("hub", settings, found)
        rows = Rows([self.path], self.subset, self.config, self.revision).read(COLUMNS)
        documents = parsed(rows, self._text, COLUMNS)
        return _collection(cache_dir, name, key, documents, self.path)

    def _text(self, row: dict[str, Any]) -> tuple[str, str]:
        for column in (self.text, self.title):
            if column and column not in row:
                there = f"no column {column!r}; there are {', '.join(row)}"
                raise InputError("unknown-column", f"{there}: {COLUMNS}")
        return text_of(row, self.text, self.title)


def _collection(
    cache_dir: str | Path, name: str, key: str, documents: Documents, path: str | Path
) -> Collection:
    """A collection of the documents that are not blank, numbered."""
    written = (document for _, document in documents if document[1].strip())
    corpus = ((str(number), *document) for number, document in enumerate(written))

    def build(folder: Path) -> Collection:
        return write_collection(folder, name, corpus, (), {}, where=lambda *_: str(path))

    return cached_collection(cache_dir, name, key, build)


def _suffix(file: Path) -> str:
    """.jsonl or .txt, plain or .gz; empty for other files and for folders."""
    suffix = Path(file.name.removesuffix(".gz")).suffix
    return suffix if suffix in (".jsonl", ".txt") and file.is_file() else ""
