"""Unlabelled text: files, or a Hugging Face dataset, as a collection without queries.

LLaRA adapts on unlabelled text. The texts become the corpus of a memory-mapped collection, so that
Wikipedia takes disk space, not memory, and a resumed run finds the same texts in the same order.

    python train.py stage=adaptation data=texts data.path=/data/wikipedia.jsonl
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from caravan.data.collection import Collection, write_collection
from caravan.data.readers.lines import NOT_DATA, contents, digest, lines, parsed, text_of
from caravan.data.readers.tables import Rows
from caravan.data.source import Source, cache_key, cached_collection
from caravan.errors import InputError
from caravan.files import listed

FILE = re.compile(r".+\.(txt|jsonl)(\.gz)?")
ROW = 'a row is an object such as {"text": "..."}; data.text and data.title name other columns'
TITLE = "title"
"""The default title column, which may be missing; others may not."""


@dataclass
class UnlabelledTexts(Source):
    """Texts of .txt files, and of rows as in `Rows`; each file plain or .gz.

    Args:
        path: a file; a folder, of which all .txt and .jsonl files are read, or else the dataset
            that it holds; or a dataset's hub id, such as wikimedia/wikipedia.
        documents: a document of a .txt file is the whole "file", or a "line".
        text, title: columns of rows; None goes without titles.
        config: of a dataset, such as 20231101.en; None if there is only one.
        subset: the split of a dataset; None is train, or all files of a folder.
        revision: of a hub dataset: a branch, tag or commit.
        name: what reports call the collection; the last part of the path by default.
    """

    path: str
    documents: Literal["file", "line"] = "file"
    text: str = "text"
    title: str | None = TITLE
    config: str | None = None
    subset: str | None = None
    revision: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        self.hub_id = None if Path(self.path).exists() else self.path

    def collection(self, cache_dir: str | Path) -> Collection:
        files = self._files()
        # files and folders are identified by content, hub datasets by id
        read = [[file.suffixes, digest(file, cache_dir)] for file in files]
        settings = [self.documents, self.text, self.title, self.config, self.subset, self.revision]
        key = cache_key("texts", read or contents(self.path, cache_dir) or self.path, settings)
        name = self.name or Path(self.path).resolve().name

        def build(folder: Path) -> Collection:
            found = (document for document in self._documents(files) if document[1].strip())
            corpus = ((str(number), *document) for number, document in enumerate(found))
            return write_collection(
                folder, name, corpus, (), {}, where=lambda *_: self.path, resumes=True
            )

        return cached_collection(cache_dir, name, key, build, resumes=True)

    def _files(self) -> list[Path]:
        """The file, or those of the folder; none of a dataset."""
        path = Path(self.path)
        if not path.is_dir():
            return [path] if path.is_file() else []
        files = [] if self.config or self.subset else list(filter(_is_data, listed(path)))
        if not files and (found := next(filter(_is_data, path.rglob("*.txt*")), None)):
            raise InputError(
                "texts-not-read",
                f"{found} would be read line by line, as a dataset; set data.path to its folder,"
                " without data.subset and data.config",
            )
        return files

    def _documents(self, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
        """(title, text) of each document."""
        for path in [str(file) for file in files] or [self.path]:
            if not path.removesuffix(".gz").endswith(".txt"):
                rows = Rows([path], self.subset or "train", self.config, self.revision).read(ROW)
                yield from (document for _, document in parsed(rows, self._text, ROW))
            elif self.documents == "line":
                yield from (("", line.strip()) for _, line in lines(Path(path)))
            else:
                yield "", "".join(line for _, line in lines(Path(path), blank=True))

    def _text(self, row: dict[str, Any]) -> tuple[str, str]:
        for column in (self.text, self.title):
            if column not in (None, TITLE, *row):
                raise InputError(
                    "unknown-column", f"no column {column!r}; there are {', '.join(row)}: {ROW}"
                )
        return text_of(row, self.text, self.title)


def _is_data(file: Path) -> bool:
    is_named = FILE.fullmatch(file.name) and file.is_file()
    return bool(is_named) and file.name.partition(".")[0].casefold() not in NOT_DATA
