"""Rows of jsonl, csv and parquet files and of Hugging Face datasets, each with its place.

Text files are plain or gzipped, whatever their name. Rows stream; errors name the file and the
line, or the row.
"""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet

from caravan.data.readers.lines import malformed, objects, opened, some
from caravan.errors import InputError, first_line
from caravan.hub import refuse_unreachable

TABLES = (".csv", ".tsv", ".parquet")
SAVED = ("dataset_dict.json", "state.json")
"""Files that `Dataset.save_to_disk` writes."""


def rows(
    paths: Sequence[str],
    config: str | None,
    subset: str,
    revision: str | None,
    remedy: str,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of files of jsonl, csv or parquet, or of one split of Hugging Face datasets.

    Args:
        paths: files, folders that `datasets` reads or that `save_to_disk` wrote, or hub ids.
        config, subset, revision: of a dataset; `subset` is its split.
        remedy: says what a row should be.

    Raises:
        InputError: "empty-file", "file-not-found", "dataset-not-loaded", "malformed-line", ...
    """
    for path in paths:
        file = Path(path)
        if path.endswith((".jsonl", ".json", ".gz", *TABLES)) and not file.is_file():
            raise InputError("file-not-found", f"there is no file {path}: correct the path")
        if not file.is_file():
            yield from some(path, _dataset_rows(path, config, subset, revision))
        elif path.endswith(".parquet"):
            yield from some(file, _parquet_rows(file))
        elif path.removesuffix(".gz").endswith(TABLES):
            yield from some(file, _cells(file))
        else:
            yield from some(file, objects(file, remedy))


def _cells(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a .csv or .tsv file with a header; every cell is a text."""
    csv.field_size_limit(2**31 - 1)
    settings: dict[str, Any] = {}
    if file.name.removesuffix(".gz").endswith(".tsv"):
        # Quotes are part of a text between tabs, as in all other .tsv files.
        settings = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    number = 0
    try:
        with opened(file) as found:
            stream: Any = found
            reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), **settings)
            _refuse_twice(f"{file}:1", reader.fieldnames or ())
            for row in reader:
                number = reader.line_num
                if None in row or None in row.values():
                    raise malformed(
                        f"{file}:{number}",
                        "another number of cells than the header",
                        f"there are the columns {', '.join(reader.fieldnames or ())}",
                    )
                yield f"{file}:{number}", row
    except UnicodeDecodeError:
        problem = f"{file}: a line after {number} is not UTF-8: convert it, such as with iconv"
        raise InputError("not-utf8", problem) from None
    except (EOFError, OSError, zlib.error, csv.Error) as error:
        problem = f"{file} is damaged after line {number} ({first_line(error)}): write it again"
        raise InputError("damaged-file", problem) from None


def _refuse_twice(place: str, names: Sequence[str]) -> None:
    """Refuse two columns of one name, of which a row would have the last."""
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise malformed(place, f"several columns named {twice[0]!r}", "rename or remove them")


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        found = parquet.ParquetFile(file)
        _refuse_twice(str(file), found.schema_arrow.names)
        for batch in found.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{file}, row {number}", row
                number += 1
    except InputError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's are ValueErrors
        raise InputError("damaged-file", f"{file} is damaged ({first_line(error)})") from None


def _dataset_rows(
    path: str, config: str | None, subset: str, revision: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import DatasetDict, load_dataset, load_from_disk  # takes a second

    refuse_unreachable(path, revision, "dataset")
    try:
        if any((Path(path) / name).is_file() for name in SAVED):
            saved: Any = load_from_disk(path)
            if not isinstance(saved, DatasetDict):
                saved = {"train": saved, **({str(saved.split): saved} if saved.split else {})}
            found = saved.get(subset)
            if found is None:
                raise ValueError(f"it has no split {subset!r}; there are {', '.join(saved)}")
        else:
            found = load_dataset(path, config, split=subset, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # what `datasets` raises is among them
        raise InputError(
            "dataset-not-loaded",
            f"{path}: the dataset cannot be loaded ({first_line(error)}); give its files instead",
        ) from None
    try:
        for number, row in enumerate(found):
            yield f"{path}, row {number}", row
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's are ValueErrors
        raise InputError("damaged-file", f"{path} is damaged ({first_line(error)})") from None
