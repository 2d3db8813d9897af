"""Unlabelled text: files, or a dataset of the Hugging Face hub, as a collection without queries.

LLaRA adapts on unlabelled text. The texts become the corpus of a memory-mapped collection, so that
a Wikipedia takes disk and no memory, and a resumed run finds the same texts in the same order.

    python train.py stage=adaptation data=texts data.path=/data/wikipedia.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from caravan.data.collection import Collection, write_collection
from caravan.data.readers.lines import contents, digest, lines, objects, text_of
from caravan.data.readers.tables import rows
from caravan.data.source import Source, cache_key, cached_collection
from caravan.errors import InputError
from caravan.files import listed

SUFFIXES = (".jsonl", ".txt")


@dataclass
class TextFiles(Source):
    """Text or jsonl files, each plain or .gz: one, or all in a folder.

    Args:
        path: a file or a folder.
        name: what reports call the collection; the name of the path by default.
        documents: a document of a text file is the whole "file", or a "line". A line of jsonl is
            always one: an object with "text", and "title" if it has one.
        train_split, dev_split, split: there are none.
    """

    path: str
    name: str | None = None
    documents: Literal["file", "line"] = "file"
    train_split: str = ""
    dev_split: str = ""
    split: str = ""

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
        found = (one for file in files for one in self._documents(file))
        name = self.name or path.resolve().name
        return _collection(
            cache_dir, name, cache_key("whole texts", read, self.documents), found, path
        )

    def _documents(self, file: Path) -> Iterator[tuple[str, str]]:
        """(title, text) of each."""
        if _suffix(file) == ".jsonl":
            remedy = 'every line is one object such as {"text": "..."}'
            for place, fields in objects(file, remedy):
                yield text_of(place, fields, remedy)
        elif self.documents == "line":
            for _, line in lines(file):
                yield "", line.strip()
        else:
            yield "", "".join(line for _, line in lines(file, blank=True))


@dataclass
class HubTexts(Source):
    """A dataset of the Hugging Face hub, or of a folder that `datasets` reads.

    Args:
        path: hub id, such as wikimedia/wikipedia, or a folder.
        config: such as 20231101.en; None if there is only one.
        subset: the split of the dataset to read.
        text, title: columns; None goes without titles.
        revision: a branch, tag or commit.
        name: what reports call the collection; the last part of the path by default.
        train_split, dev_split, split: there are none.
    """

    path: str
    config: str | None = None
    subset: str = "train"
    text: str = "text"
    title: str | None = None
    revision: str | None = None
    name: str | None = None
    train_split: str = ""
    dev_split: str = ""
    split: str = ""

    def __post_init__(self) -> None:
        self.hub_id = None if Path(self.path).exists() else self.path

    def collection(self, cache_dir: str | Path) -> Collection:
        found = contents(self.path, cache_dir)
        place = "" if found else self.path  # a folder is found again by its content
        settings = [place, self.config, self.subset, self.text, self.title, self.revision]
        name = self.name or self.path.rstrip("/").rpartition("/")[2]
        key = cache_key("hub", settings, found)
        return _collection(cache_dir, name, key, self._documents(), self.path)

    def _documents(self) -> Iterator[tuple[str, str]]:
        remedy = "set data.text and data.title to columns of texts"
        found = rows([self.path], self.config, self.subset, self.revision, remedy)
        for place, row in found:
            for column in (self.text, self.title):
                if column and column not in row:
                    text = f"{place}: no column {column!r}; there are {', '.join(row)}"
                    raise InputError("unknown-column", text)
            yield text_of(place, row, remedy, self.text, self.title)


def _collection(
    cache_dir: str | Path,
    name: str,
    key: str,
    documents: Iterable[tuple[str, str]],
    path: str | Path,
) -> Collection:
    """A collection of the documents that are not blank, numbered."""
    written = (document for document in documents if document[1].strip())
    corpus = ((str(number), *document) for number, document in enumerate(written))

    def build(folder: Path) -> Collection:
        return write_collection(folder, name, corpus, (), {}, where=lambda *_: str(path))

    return cached_collection(cache_dir, name, key, build)


def _suffix(file: Path) -> str:
    """.jsonl or .txt, plain or .gz; empty for other files and for folders."""
    suffix = Path(file.name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES and file.is_file() else ""
