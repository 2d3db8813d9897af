"""Unlabelled text: files, or a dataset of the Hugging Face hub, as a collection without queries.

LLaRA adapts on text alone. The texts become the corpus of a memory-mapped collection, so that a
Wikipedia takes disk and no memory, and a run that is resumed finds the same ones in the same order.

    python train.py stage=adaptation data=texts data.path=/data/wikipedia.jsonl
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from caravan.data.cached import cache_key, cached_collection
from caravan.data.collection import Collection, write_collection
from caravan.data.readers import hub
from caravan.data.readers.jsonl import objects
from caravan.data.readers.lines import digests, lines, text_of
from caravan.data.texts import Record
from caravan.errors import InputError
from caravan.files import listed

SUFFIXES = (".jsonl", ".txt")
DOCUMENTS = ("file", "line")
REMEDY = 'every line is one object such as {"text": "..."}'


class TextFiles:
    """Text or jsonl files, each plain or .gz: one, or all in a folder.

    Args:
        path: a file or a folder.
        name: what reports call the collection; the path's name by default.
        documents: what a document of a text file is: the whole "file", or a "line". A line of
            jsonl is one in any case: an object with "text", and "title" if it has one.
        train_split, dev_split, split: there are none.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        documents: str = "file",
        train_split: str = "",
        dev_split: str = "",
        split: str = "",
    ) -> None:
        if documents not in DOCUMENTS:
            raise InputError(f"data.documents is {documents!r}; it must be file or line")
        self.path = Path(path)
        self.name = name or self.path.resolve().name
        self.documents = documents
        self.train_split, self.dev_split, self.split = train_split, dev_split, split

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: there is no text, or a file is wrong; says which, and at which line.
        """
        files = self._files()
        key = cache_key("texts", list(map(_kind, files)), digests(files, cache_dir), self.documents)
        return cached_collection(cache_dir, self.name, key, lambda to: self._build(to, files))

    def _files(self) -> list[Path]:
        if not self.path.exists():
            raise InputError(f"there is no file or folder {self.path}: set data.path to one")
        files = [self.path] if self.path.is_file() else listed(self.path)
        found = [file for file in files if _kind(file) in SUFFIXES]
        if not found:
            raise InputError(
                f"{self.path} holds no .jsonl or .txt (nor such as .gz): give text files"
            )
        return found

    def _build(self, folder: Path, files: list[Path]) -> Collection:
        def corpus() -> Iterator[Record]:
            documents = itertools.chain.from_iterable(map(self._documents, files))
            written = (document for document in documents if document[1].strip())
            for number, (title, text) in enumerate(written):
                yield str(number), title, text

        return write_collection(
            folder, self.name, corpus(), (), {}, where=lambda *_: str(self.path)
        )

    def _documents(self, file: Path) -> Iterator[tuple[str, str]]:
        """(title, text) of each."""
        if _kind(file) == ".jsonl":
            for number, fields in objects(file, REMEDY):
                yield _document(f"{file}:{number}", fields)
        elif self.documents == "line":
            for number, line in lines(file):
                yield "", text_of(file, number, line).strip()
        else:
            whole = [text_of(file, number, line) for number, line in lines(file)]
            yield "", "".join(whole)


class HubTexts:
    """A dataset of the Hugging Face hub, or of a folder that `datasets` reads, as it streams in.

    Args:
        path: hub id, such as wikimedia/wikipedia, or a folder.
        config: such as 20231101.en; None is the only one.
        subset: the split of the dataset whose texts are read.
        text, title: columns; None goes without titles.
        revision: a branch, tag or commit.
        name: what reports call the collection.
        train_split, dev_split, split: there are none.
    """

    def __init__(
        self,
        path: str,
        config: str | None = None,
        subset: str = "train",
        text: str = "text",
        title: str | None = None,
        revision: str | None = None,
        name: str | None = None,
        train_split: str = "",
        dev_split: str = "",
        split: str = "",
    ) -> None:
        self.path, self.config, self.subset = path, config, subset
        self.text, self.title, self.revision = text, title, revision
        self.name = name or path.rstrip("/").rpartition("/")[2]
        self.train_split, self.dev_split, self.split = train_split, dev_split, split

    @property
    def hub_id(self) -> str | None:
        """The dataset's name on the Hub; None where it is a folder of this machine."""
        return None if Path(self.path).exists() else self.path

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: the dataset is not to be had, or lacks a column.
        """
        contents = hub.contents(self.path, cache_dir)
        place = "" if contents else self.path  # what it holds says more than where it lies
        settings = [place, self.config, self.subset, self.text, self.title, self.revision]
        key = cache_key("hub", settings, contents)
        return cached_collection(cache_dir, self.name, key, self._build)

    def _build(self, folder: Path) -> Collection:
        def corpus() -> Iterator[Record]:
            written = 0
            for number, row in enumerate(self._rows()):
                title, text = row.get(self.title) if self.title else "", row.get(self.text)
                title = "" if title is None else title
                if not isinstance(title, str) or not isinstance(text, str):
                    raise InputError(
                        f"{self.path}, row {number}: {self.text} or {self.title} is no text; set"
                        " data.text and data.title to columns of texts"
                    )
                if text.strip():
                    yield str(written), title, text
                    written += 1

        return write_collection(
            folder, self.name, corpus(), (), {}, where=lambda part, n: f"{self.path}, row {n}"
        )

    def _rows(self) -> Iterator[dict[str, object]]:
        columns = [column for column in (self.text, self.title) if column]
        return hub.rows(self.path, self.config, self.subset, self.revision, columns)


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix if file.is_file() else ""


def _document(place: str, fields: dict[str, object]) -> tuple[str, str]:
    """Title and text of a line of jsonl."""
    if not isinstance(text := fields.get("text"), str):
        raise InputError(f"{place}: no text: {REMEDY}")
    title = "" if fields.get("title") is None else fields["title"]
    if not isinstance(title, str):
        raise InputError(f"{place}: title is not a string: {REMEDY}")
    return title, text
