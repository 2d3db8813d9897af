"""Rows of data files: lines, columns, JSON objects and datasets; and digests of files.

Text files are plain or gzipped, whatever their name, and stream line by line; errors name file and
line. A digest is of the bytes, so that a collection is found again wherever its files are and
whenever they were touched.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from caravan import manifests
from caravan.data.texts import Record
from caravan.errors import InputError, first_line
from caravan.files import cache_folder, listed
from caravan.hub import refuse_unreachable

KEPT_FROM_BYTES = 1 << 26  # smaller files are hashed in some milliseconds
SETTLED_S = 2.0  # a file written just now may change again within one tick of its clock

QUERY_IDS = {"qid", "query", "queryid", "topic", "topicid"}
PASSAGE_IDS = {"pid", "docid", "docno", "corpusid", "passageid", "documentid"}
TEXTS = {"text", "contents", "body", "passage", "document", "query", "question"}
"""Column names in header lines, as `column_name` spells them."""

ARCHIVES = {b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
"""First bytes of packed files that cannot be read."""
NOT_DATA = {"readme", "license", "licence", "notice"}
SAVED = ("dataset_dict.json", "state.json")
"""Files that `Dataset.save_to_disk` writes."""

log = logging.getLogger(__name__)


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The bytes of a file, unpacked if they are gzip; raises "unsupported-archive"."""
    with open(file, "rb") as raw:
        start = raw.peek(8)
        kind = next((name for magic, name in ARCHIVES.items() if start.startswith(magic)), None)
        if kind is not None:
            raise InputError("unsupported-archive", f"{file} is {kind}: unpack it, or use gzip")
        if start.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked
        else:
            yield raw


def lines(file: Path, blank: bool = False) -> Iterator[tuple[int, str]]:
    """(line number, line) of each line that is not blank, with its end; only LF ends a line.

    Args:
        blank: yield blank lines too.

    Raises:
        InputError: "damaged-file", "unreadable-file", "not-utf8".
    """
    number = 0
    try:
        with opened(file) as found:
            for number, line in enumerate(found, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if blank or line.strip():
                    yield number, line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the line (0x{error.object[error.start]:02x})"
        raise InputError(
            "not-utf8",
            f"{file}:{number}: {byte} is not UTF-8: convert it, such as with iconv",
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            "damaged-file", f"{file}:{number + 1}: cannot be unpacked ({error}): fetch it again"
        ) from None
    except OSError as error:
        raise InputError("unreadable-file", f"{file} cannot be read: {error.strerror}") from None


def column_name(cell: str) -> str:
    """A name in a header line, without case and separators.

    >>> column_name("Query-ID"), column_name("corpus_id")
    ('queryid', 'corpusid')
    """
    return cell.strip().casefold().replace("-", "").replace("_", "")


def columns(
    file: Path, layouts: Sequence[tuple[str, ...]]
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line number, columns) of each line of a .tsv, in the order of their layout.

    A header line is skipped; the columns may then be in any order.

    Args:
        layouts: names of the columns, such as ("id", "text"), each of another length; the first
            line decides which of them the file has.

    Raises:
        InputError: "malformed-line", another number of columns; "unknown-column".
    """
    order: list[int] | None = None
    for number, line in lines(file):
        found = line.rstrip("\r\n").split("\t")
        layout = next((one for one in layouts if len(one) == len(found)), None)
        if layout is None or len(found) != len(order or found):
            known = " or ".join(f"{len(one)} ({', '.join(one)})" for one in layouts)
            wanted = f"{len(order)} as above" if order else known
            raise malformed(
                f"{file}:{number}", f"{len(found)} columns between tabs", f"expected {wanted}"
            )
        if order is None:
            meanings = list(map(_meaning, found))
            if sorted(meanings) == sorted(layout):
                order = [meanings.index(column) for column in layout]
                continue
            if meanings[0] == "id":
                raise InputError(
                    "unknown-column",
                    f"{file}:{number}: {found[0]!r} looks like a header, but the columns are not"
                    f" {', '.join(layout)}: name them so, or remove the line",
                )
            order = list(range(len(found)))
        yield number, tuple(found[i] for i in order)


def _meaning(cell: str) -> str:
    name = column_name(cell)
    if name == "id" or name in QUERY_IDS - {"query"} or name in PASSAGE_IDS:
        return "id"
    return "text" if name in TEXTS else name


def objects(file: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of each line; `remedy` says what a line should be."""
    for number, line in lines(file):
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"not JSON ({error.msg}, column {error.colno})"
            raise malformed(f"{file}:{number}", problem, remedy) from None
        except (ValueError, RecursionError) as error:  # a huge number, or deep nesting
            raise malformed(f"{file}:{number}", f"not JSON ({error})", remedy) from None
        if not isinstance(found, dict):
            raise malformed(f"{file}:{number}", "JSON, but not an object", remedy)
        yield number, found


def malformed(place: str, problem: str, remedy: str) -> InputError:
    """A "malformed-line" error; `remedy` says what the line should be."""
    return InputError("malformed-line", f"{place}: {problem}: {remedy}")


def record_of(
    place: str,
    fields: dict[str, Any],
    ids: Sequence[str] = ("docid", "_id", "id"),
    texts: Sequence[str] = ("text", "contents"),
) -> Record:
    """Id, title and text of an object; the title may be missing or null.

    Args:
        ids, texts: the keys of id and text; the first that the object has counts. The defaults are
            those of Tevatron, BEIR and Pyserini.
    """
    remedy = f'every line is one object such as {{"{ids[0]}": "7", "title": "...", "text": "..."}}'
    id_key = next((key for key in ids if key in fields), None)
    text_key = next((key for key in texts if key in fields), None)
    if id_key is None or text_key is None:
        raise malformed(place, f"no {ids[0] if id_key is None else texts[0]}", remedy)
    title = "" if fields.get("title") is None else fields["title"]
    record = id_of(fields[id_key]), title, fields[text_key]
    for key, value in zip((id_key, "title", text_key), record, strict=True):
        if not isinstance(value, str):
            raise malformed(place, f"{key} is not a string", remedy)
    return record


def id_of(value: Any) -> Any:
    """The value, as a string if it is an integer."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def rows(
    paths: Sequence[str],
    config: str | None,
    subset: str,
    revision: str | None,
    remedy: str,
    columns: Sequence[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of files of jsonl, or of one split of Hugging Face datasets.

    Args:
        paths: files, folders that `datasets` reads or that `save_to_disk` wrote, or hub ids.
        config, subset, revision: of a dataset; `subset` is its split.
        remedy: says what a row should be.
        columns: those that a dataset must have.

    Raises:
        InputError: "empty-file", "file-not-found", "dataset-not-loaded", "malformed-line", ...
    """
    empty = True
    for path in paths:
        file = Path(path)
        if file.is_file() and path.endswith((".parquet", ".arrow")):
            raise InputError("file-of-dataset", f"{path}: give the folder of the dataset instead")
        if path.endswith((".jsonl", ".json", ".gz")) and not file.is_file():
            raise InputError("file-not-found", f"there is no file {path}: correct the path")
        if file.is_file():
            for number, row in objects(file, remedy):
                empty = False
                yield f"{file}:{number}", row
        else:
            for placed in _dataset_rows(path, config, subset, revision, columns):
                empty = False
                yield placed
    if empty:
        raise InputError("empty-file", f"there is no row in {' and '.join(paths)}: {remedy}")


def _dataset_rows(
    path: str, config: str | None, subset: str, revision: str | None, columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import DatasetDict, load_dataset, load_from_disk  # takes a second

    refuse_unreachable(path, revision, "dataset")
    try:
        if any((Path(path) / name).is_file() for name in SAVED):
            saved: Any = load_from_disk(path)
            if not isinstance(saved, DatasetDict):
                saved = {"train": saved, **({str(saved.split): saved} if saved.split else {})}
            if subset not in saved:
                raise ValueError(f"it has no split {subset!r}; there are {', '.join(saved)}")
            found = saved[subset]
        else:
            found = load_dataset(path, config, split=subset, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # what `datasets` raises is among them
        raise InputError(
            "dataset-not-loaded",
            f"{path}: the dataset cannot be loaded ({first_line(error)}); give its files instead",
        ) from None
    there = found.column_names or ()
    for column in columns:
        if there and column not in there:
            raise InputError(
                "unknown-column", f"{path} has no column {column!r}; there are {', '.join(there)}"
            )
    try:
        for number, row in enumerate(found):
            yield f"{path}, row {number}", row
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's are ValueErrors
        raise InputError("damaged-file", f"{path} is damaged ({first_line(error)})") from None


def one_of(folder: Path, names: Iterable[str]) -> Path | None:
    """The file of a folder with one of these names, plain or .gz; raises "ambiguous-files"."""
    there = [folder / f"{name}{end}" for name in names for end in ("", ".gz")]
    there = [file for file in there if file.is_file()]
    if len(there) > 1:
        raise InputError("ambiguous-files", f"{there[0]} and {there[1]} exist: keep one of them")
    return there[0] if there else None


def by_stem(folder: Path, suffixes: Sequence[str], prefix: str = "") -> dict[str, Path]:
    """The files `<prefix><stem><suffix>` of a folder by stem, sorted, plain or .gz.

    Hidden files and README or LICENSE are left out. Empty if there is no folder.
    """
    stems = set()
    for file in listed(folder) if folder.is_dir() else ():
        name = file.name.removesuffix(".gz")
        suffix = next((one for one in suffixes if name.endswith(one)), "")
        stem = name.removeprefix(prefix).removesuffix(suffix)
        if suffix and stem and name == f"{prefix}{stem}{suffix}":
            if stem.casefold() in NOT_DATA:
                log.info("%s is not read as data", file)
                continue
            stems.add(stem)
    found = {
        stem: one_of(folder, [f"{prefix}{stem}{suffix}" for suffix in suffixes])
        for stem in sorted(stems)
    }
    return {stem: file for stem, file in found.items() if file is not None}


def contents(path: str, cache_dir: str | Path) -> list[list[str]]:
    """[name, digest] of each file of a folder, or of a file; empty for a hub id.

    Hidden files and folders are left out, as in `datasets`.
    """
    place = Path(path)
    if place.is_file():
        return [[place.suffix, *digests([place], cache_dir)]]
    inside = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else []
    names = {file: file.relative_to(place) for file in inside}
    shown = [file for file in inside if not any(part[0] == "." for part in names[file].parts)]
    found = zip(shown, digests(shown, cache_dir), strict=True)
    return [[str(names[file]), digest] for file, digest in found]


def digests(files: Iterable[Path], cache_dir: str | Path) -> list[str]:
    """The digest of each file's bytes.

    Hashing 20 GB takes a minute, so `cache_dir` keeps the digests of large files, by path, size and
    times of change.
    """
    return [_digest(file, Path(cache_dir)) for file in files]


def _digest(file: Path, cache_dir: Path) -> str:
    try:
        large = file.stat().st_size >= KEPT_FROM_BYTES
        name = hashlib.blake2b(str(file.resolve()).encode(), digest_size=8).hexdigest()
        kept = cache_dir / "digests" / f"{name}.json"
        if large:
            with suppress(OSError, ValueError, RecursionError, TypeError):
                record, seal = json.loads(kept.read_text("utf-8"))
                if seal == manifests.digest(record) and manifests.is_as_written(file, record):
                    return str(record["xxh3"])
            log.info("reading %s once, for its digest", file)
        record = manifests.content(file)
        settled = time.time() - file.stat().st_ctime > SETTLED_S
    except OSError as error:
        raise InputError("unreadable-file", f"{file} cannot be read: {error.strerror}") from None
    if large and settled:
        with suppress(OSError):  # a read-only cache keeps nothing
            cache_folder(cache_dir, "digests")
            manifests.write_json(kept, [record, manifests.digest(record)])
    return str(record["xxh3"])
