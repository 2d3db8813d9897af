"""Rows of jsonl, csv and parquet files and of Hugging Face datasets, each with its place.

Text files are plain or gzipped, whatever their name. Rows stream; errors name the file and the
line, or the row.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import parquet

from caravan.data.readers.lines import lines, objects, some
from caravan.errors import InputError, first_line, reading
from caravan.hub import refuse_unreachable

TABLES = (".csv", ".tsv", ".parquet")
SAVED = ("dataset_dict.json", "state.json")
"""Files that `Dataset.save_to_disk` writes."""

Placed = Iterator[tuple[str, dict[str, Any]]]
"""(place, row) of each row."""


class Rows(NamedTuple):
    """Files of jsonl, csv or parquet, or one split of Hugging Face datasets.

    Args:
        paths: files, folders that `datasets` reads or that `save_to_disk` wrote, or hub ids.
        subset, config, revision: of a dataset; `subset` is its split.
    """

    paths: list[str]
    subset: str = "train"
    config: str | None = None
    revision: str | None = None

    def read(self, remedy: str) -> Placed:
        """(place, row) of each row; `remedy` says what a line of jsonl should be.

        Raises:
            InputError: "empty-file", "file-not-found", "dataset-not-loaded", "malformed-line", ...
        """
        for path in self.paths:
            file = Path(path)
            if not file.is_file():
                if path.endswith((".jsonl", ".json", ".gz", *TABLES)):
                    text = f"there is no file {path}: correct the path"
                    raise InputError("file-not-found", text)
                found = self._dataset(path)
            elif path.endswith(".parquet"):
                found = _parquet(file)
            elif path.removesuffix(".gz").endswith(TABLES):
                found = _cells(file)
            else:
                found = objects(file, remedy)
            yield from some(path, found)

    def _dataset(self, path: str) -> Placed:
        from datasets import DatasetDict, load_dataset, load_from_disk  # takes a second

        refuse_unreachable(path, self.revision, "dataset")
        options: Any = {"revision": self.revision, "streaming": True}
        with reading(path, "the dataset cannot be loaded", "dataset-not-loaded"):
            if any((Path(path) / name).is_file() for name in SAVED):
                saved: Any = load_from_disk(path)
                if not isinstance(saved, DatasetDict):
                    saved = {"train": saved, **({str(saved.split): saved} if saved.split else {})}
                if self.subset not in saved:
                    there = ", ".join(saved)
                    raise ValueError(f"it has no split {self.subset!r}; there are {there}")
                found = saved[self.subset]
            else:
                found = load_dataset(path, self.config, split=self.subset, **options)
        with reading(path, "the dataset is damaged", "damaged-file"):
            for number, row in enumerate(found):
                yield f"{path}, row {number}", row


def _cells(file: Path) -> Placed:
    """(place, row) of a .csv or .tsv file with a header; every cell is a text."""
    csv.field_size_limit(2**31 - 1)
    settings: dict[str, Any] = {}
    if file.name.removesuffix(".gz").endswith(".tsv"):
        # Quotes are part of a text between tabs, as in all other .tsv files.
        settings = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.DictReader((line for _, line in lines(file, blank=True)), **settings)
    try:
        names = reader.fieldnames or ()
        _refuse_twice(f"{file}:1", names)
        for row in reader:
            place = f"{file}:{reader.line_num}"
            if None in row or None in row.values():
                problem = "another number of cells than the header"
                expected = f"there are the columns {', '.join(names)}"
                raise InputError("malformed-line", f"{place}: {problem}: {expected}")
            yield place, row
    except csv.Error as error:
        problem = f"{file} is damaged after line {reader.line_num} ({first_line(error)})"
        raise InputError("damaged-file", f"{problem}: write it again") from None


def _refuse_twice(place: str, names: Sequence[str]) -> None:
    """Refuse two columns of one name, of which a row would have the last."""
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        problem = f"several columns named {twice[0]!r}: rename or remove them"
        raise InputError("malformed-line", f"{place}: {problem}")


def _parquet(file: Path) -> Placed:
    with reading(file, "the file is damaged", "damaged-file"):
        found = parquet.ParquetFile(file)
        _refuse_twice(str(file), found.schema_arrow.names)
        batches = (batch.to_pylist() for batch in found.iter_batches(batch_size=1024))
        for number, row in enumerate(itertools.chain.from_iterable(batches)):
            yield f"{file}, row {number}", row
