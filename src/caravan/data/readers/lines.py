"""Lines, columns and JSON objects of text files, each with its place; and digests of files.

Text files are plain or gzipped, whatever their name, and stream line by line; errors name file and
line. A digest is of the bytes, so that a collection is found again wherever its files are and
whenever they were touched.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from caravan import manifests
from caravan.data.texts import Record
from caravan.errors import InputError
from caravan.files import cache_folder, listed

BLOCK_BYTES = 1 << 24  # of lines in memory at once
KEPT_FROM_BYTES = 1 << 26  # smaller files are hashed in some milliseconds

QUERY_IDS = {"qid", "query", "queryid", "topic", "topicid"}
PASSAGE_IDS = {"pid", "docid", "docno", "corpusid", "passageid", "documentid"}
TEXTS = {"text", "contents", "body", "passage", "document", "query", "question"}
"""Column names in header lines, as `column_name` spells them."""

ID_KEYS, TEXT_KEYS = ("_id", "docid", "id"), ("text", "contents")
"""Keys of JSON objects, as in BEIR, Tevatron and Pyserini; the first that an object has counts."""
RECORD = 'every line is one object such as {"_id": "7", "title": "...", "text": "..."}'
NOT_DATA = {"readme", "license", "licence", "notice"}

S = TypeVar("S")
T = TypeVar("T")


def line_blocks(file: Path) -> Iterator[tuple[int, list[bytes]]]:
    """(lines before, lines with their ends) of a file, some megabytes at a time.

    Only LF ends a line. A byte order mark is left out.

    Raises:
        InputError: "damaged-file", "unreadable-file".
    """
    before = 0
    try:
        with open(file, "rb") as raw:
            is_packed = raw.peek(2).startswith(b"\x1f\x8b")
            unpacked: IO[bytes] | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if is_packed else raw
            while block := unpacked.readlines(BLOCK_BYTES):
                if not before:
                    block[0] = block[0].removeprefix(b"\xef\xbb\xbf")
                yield before, block
                before += len(block)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            "damaged-file", f"{file}: it cannot be unpacked ({error}): fetch it again"
        ) from None
    except OSError as error:
        raise InputError("unreadable-file", f"{file} cannot be read: {error.strerror}") from None


def decoded(file: Path, number: int, line: bytes) -> str:
    """A line as text; raises "not-utf8"."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the line (0x{line[error.start]:02x})"
        remedy = "convert it, such as with iconv; unpack archives other than gzip"
        raise InputError("not-utf8", f"{file}:{number}: {byte} is not UTF-8: {remedy}") from None


def lines(file: Path, blank: bool = False) -> Iterator[tuple[str, str]]:
    """(place, line) of each line, with its end; of blank ones only if `blank`."""
    for before, block in line_blocks(file):
        for number, line in enumerate(block, before + 1):
            if blank or line.strip():
                yield f"{file}:{number}", decoded(file, number, line)


def some(file: str | Path, found: Iterator[T]) -> Iterator[T]:
    """The items of a file; raises "empty-file" if there is none."""
    first = next(found, None)
    if first is None:
        raise InputError("empty-file", f"{file} is empty: fill it, or remove it")
    yield first
    yield from found


def parsed(
    items: Iterable[tuple[str, S]], parse: Callable[[S], T], remedy: str
) -> Iterator[tuple[str, T]]:
    """(place, `parse(item)`) of each item; the errors of `parse` get the place.

    Args:
        parse: raises ValueError with what is wrong, or an InputError of another code.
        remedy: what an item should be.

    Raises:
        InputError: "malformed-line" for a ValueError, else the code that `parse` raised.
    """
    for place, item in items:
        try:
            found = parse(item)
        except InputError as error:
            raise InputError(error.code, f"{place}: {error}") from None
        except ValueError as error:
            raise InputError("malformed-line", f"{place}: {error}: {remedy}") from None
        yield place, found


def column_name(cell: str) -> str:
    """A name in a header line, without case and separators.

    >>> column_name("Query-ID"), column_name("corpus_id")
    ('queryid', 'corpusid')
    """
    return cell.strip().casefold().replace("-", "").replace("_", "")


def columns(file: Path, layouts: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, list[str]]]:
    """(place, columns) of each line of a .tsv, in the order of their layout.

    A header line is skipped; the columns may then be in any order.

    Args:
        layouts: names of the columns, such as ("id", "text"), each of another length; the first
            line decides which of them the file has.

    Raises:
        InputError: "malformed-line", another number of columns; "unknown-column".
    """
    order: list[int] | None = None
    for place, line in lines(file):
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) not in map(len, layouts):
            expected = " or ".join(", ".join(layout) for layout in layouts)
            raise InputError(
                "malformed-line",
                f"{place}: the number of columns between tabs is {len(cells)}: expected {expected}",
            )
        if order is None:
            layouts = [layout for layout in layouts if len(layout) == len(cells)]
            meanings = list(map(_meaning, cells))
            if sorted(meanings) == sorted(layouts[0]):
                order = [meanings.index(column) for column in layouts[0]]
                continue
            if meanings[0] == "id":
                raise InputError(
                    "unknown-column",
                    f"{place}: {cells[0]!r} looks like a header, but the columns are not"
                    f" {', '.join(layouts[0])}: name them so, or remove the line",
                )
            order = list(range(len(cells)))
        yield place, [cells[i] for i in order]


def _meaning(cell: str) -> str:
    name = column_name(cell)
    if name == "id" or name in QUERY_IDS - {"query"} or name in PASSAGE_IDS:
        return "id"
    return "text" if name in TEXTS else name


def objects(file: Path, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, JSON object) of each line; `remedy` says what a line should be.

    Raises:
        InputError: "malformed-line".
    """
    return parsed(lines(file), _object, remedy)


def _object(line: str) -> dict[str, Any]:
    try:
        found = _decode(line.rstrip("\r\n"))  # an error's column is of this line, not of the next
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("JSON, but not an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with a key twice is refused, since a dict would keep the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"several values of the key {key!r}")
    return found


_decode = json.JSONDecoder(object_pairs_hook=_unique).decode


def string(value: Any, name: str) -> str:
    """The value; raises ValueError if it is not a string."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a string")
    return value


def id_of(value: Any, name: str) -> str:
    """The value, a string or an integer, as a string; raises ValueError for anything else."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_integer else string(value, name)


def text_of(
    fields: dict[str, Any], text: str = "text", title: str | None = "title"
) -> tuple[str, str]:
    """Title and text of an object; the title may be missing or null."""
    head = fields.get(title) if title else None
    return "" if head is None else string(head, str(title)), string(fields.get(text), text)


def record_of(fields: dict[str, Any]) -> Record:
    """Id, title and text of an object, a `RECORD`."""
    ids = [key for key in ID_KEYS if key in fields]
    if len({str(fields[key]) for key in ids}) > 1:
        raise ValueError(f"several ids ({', '.join(ids)})")
    id_key = ids[0] if ids else ID_KEYS[0]
    text_key = next((key for key in TEXT_KEYS if key in fields), TEXT_KEYS[0])
    return id_of(fields.get(id_key), id_key), *text_of(fields, text_key)


def one_of(folder: Path, names: Iterable[str]) -> Path | None:
    """The file of a folder with one of these names, plain or .gz; raises "ambiguous-files"."""
    there = [folder / f"{name}{end}" for name in names for end in ("", ".gz")]
    there = [file for file in there if file.is_file()]
    if len(there) > 1:
        raise InputError("ambiguous-files", f"{there[0]} and {there[1]} exist: keep one of them")
    return there[0] if there else None


def required(folder: Path, *names: str) -> Path:
    """As `one_of`; raises "file-not-found" if there is none."""
    file = one_of(folder, names)
    if file is None:
        wanted = " or ".join(names)
        raise InputError("file-not-found", f"{folder} has no {wanted} (or .gz): put it there")
    return file


def by_stem(folder: Path, *patterns: str) -> dict[str, Path]:
    """The files of a folder, plain or .gz, by the part of their names that `*` stands for, sorted.

    Hidden files and README or LICENSE are left out.

    Args:
        patterns: relative paths with one `*` in the name of the file, such as "qrels/*.tsv".

    Raises:
        InputError: "ambiguous-files", a stem has two files.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        inside, _, name = pattern.rpartition("/")
        start, end = name.split("*")
        for file in listed(folder / inside) if (folder / inside).is_dir() else ():
            plain = file.name.removesuffix(".gz")
            stem = plain.removeprefix(start).removesuffix(end)
            if f"{start}{stem}{end}" != plain or stem.casefold() in NOT_DATA or not file.is_file():
                continue
            if stem in found:
                there = f"{found[stem]} and {file} exist"
                raise InputError("ambiguous-files", f"{there}: keep one of them")
            found[stem] = file
    return dict(sorted(found.items()))


def contents(path: str, cache_dir: str | Path) -> list[list[str]]:
    """[relative path, digest] of each file of a folder, or [suffix, digest] of a file.

    Empty if the path does not exist, as for a hub id. Hidden files and folders are left out, as in
    `datasets`.
    """
    place = Path(path)
    if place.is_file():
        return [[place.suffix, digest(place, cache_dir)]]
    names = {file: file.relative_to(place) for file in sorted(place.rglob("*")) if file.is_file()}
    return [
        [str(name), digest(file, cache_dir)]
        for file, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    ]


def digest(file: Path, cache_dir: str | Path) -> str:
    """The digest of a file's bytes.

    Hashing 20 GB takes a minute, so `cache_dir` keeps the digests of large files, by path, size and
    times of change.
    """
    kept = Path(cache_dir) / "digests" / manifests.digest(str(file.resolve()))
    try:
        large = file.stat().st_size >= KEPT_FROM_BYTES
        before = manifests.read(kept) if large else None
        if before is not None and manifests.is_as_written(file, before["inputs"]):
            return str(before["inputs"]["xxh3"])
        record = manifests.content(file)
    except OSError as error:
        raise InputError("unreadable-file", f"{file} cannot be read: {error.strerror}") from None
    if large:
        with suppress(OSError):  # a read-only cache keeps nothing
            cache_folder(cache_dir, "digests")
            manifests.write(kept, record)
    return str(record["xxh3"])
