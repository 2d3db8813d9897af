"""Rows of a dataset, as they stream in: of the Hugging Face hub, of a folder of one, or of jsonl.

A folder may hold what `datasets` reads (parquet, jsonl, ...) or what its `save_to_disk` wrote.

    for row in rows("rlhn/rlhn-680K", None, "train", None): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caravan.data.readers import jsonl
from caravan.data.readers.lines import digests
from caravan.errors import InputError, first_line
from caravan.hub import refuse_unreachable

FILES = (".jsonl", ".json", ".gz")
OF_DATASET = (".parquet", ".arrow")
SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves in a folder."""
WHOLE = "train"
"""The split that a dataset is which was saved without any, as `datasets` calls it too."""


def rows(
    path: str, config: str | None, subset: str, revision: str | None, columns: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of one split of a dataset.

    Args:
        path: hub id, such as wikimedia/wikipedia, or a folder.
        config: such as 20231101.en; None is the only one.
        subset: the split of the dataset.
        revision: a branch, tag or commit.
        columns: those that must be there.

    Raises:
        InputError: the dataset is not to be had, or lacks a column.
    """
    refuse_unreachable(path, revision, "dataset")
    try:
        found = _opened(path, config, subset, revision)
    except (OSError, ValueError, RuntimeError) as error:  # what `datasets` raises is among them
        raise InputError(
            f"{path}: no dataset could be loaded ({first_line(error)}); where a dataset is a"
            " script, fetch its files and give those"
        ) from None
    there = found.column_names or ()
    for column in columns:
        if there and column not in there:
            raise InputError(f"{path} has no column {column!r}; there are {', '.join(there)}")
    try:
        yield from found
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's are ValueErrors
        raise InputError(f"{path}: a file of the dataset is broken ({first_line(error)})") from None


def _opened(path: str, config: str | None, subset: str, revision: str | None) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not any((Path(path) / name).is_file() for name in SAVED):
        return load_dataset(path, config, split=subset, revision=revision, streaming=True)
    saved = load_from_disk(path)
    if not isinstance(saved, DatasetDict):
        saved = {WHOLE: saved, **({} if saved.split is None else {str(saved.split): saved})}
    if subset not in saved:
        raise ValueError(f"it has no split {subset!r}; there are {', '.join(saved)}")
    return saved[subset]


def objects(
    path: str, config: str | None, subset: str, revision: str | None, remedy: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row of a file of jsonl, or of what `rows` reads.

    Args:
        remedy: ends a message: what a row should be.
    """
    if path.endswith(FILES) and not Path(path).is_file():
        raise InputError(f"there is no file {path}: give the path of one")
    if Path(path).is_file():
        if path.endswith(OF_DATASET):
            raise InputError(f"{path} is a file of a dataset: give the folder that it lies in")
        for number, row in jsonl.objects(Path(path), remedy):
            yield f"{path}:{number}", row
    else:
        for number, row in enumerate(rows(path, config, subset, revision)):
            yield f"{path}, row {number}", row


def contents(path: str, cache_dir: str | Path) -> list[list[str]]:
    """Name and digest of each file of a folder, or of a file; of a hub id nothing.

    Hidden files and folders are left out, as in `datasets`.
    """
    place = Path(path)
    if place.is_file():
        return [[place.suffix, *digests([place], cache_dir)]]
    inside = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else []
    inside = [file for file in inside if not _is_hidden(file.relative_to(place))]
    names = [str(file.relative_to(place)) for file in inside]
    return [list(pair) for pair in zip(names, digests(inside, cache_dir), strict=True)]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
