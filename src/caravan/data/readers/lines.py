"""Lines, columns and JSON objects of text files, each with its place; and digests of files.

Text files are plain or gzipped, whatever their name, and stream line by line; errors name file and
line. A digest is of the bytes, so that a collection is found again wherever its files are and
whenever they were touched.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

ARCHIVES = {b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
"""First bytes of packed files that cannot be read."""
NOT_DATA = {"readme", "license", "licence", "notice"}

T = TypeVar("T")


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The bytes of a file, unpacked if they are gzip."""
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


def line_blocks(file: Path) -> Iterator[tuple[int, list[bytes]]]:
    """(lines before, lines with their ends) of a file, some megabytes at a time.

    Only LF ends a line. A byte order mark is left out.

    Raises:
        InputError: "damaged-file", "unreadable-file", "unsupported-archive".
    """
    before = 0
    try:
        with opened(file) as found:
            while block := found.readlines(BLOCK_BYTES):
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
        raise InputError(
            "not-utf8", f"{file}:{number}: {byte} is not UTF-8: convert it, such as with iconv"
        ) from None


def lines(file: Path, blank: bool = False) -> Iterator[tuple[int, str]]:
    """(line number, line) of each line, with its end; of blank ones only if `blank`."""
    for before, block in line_blocks(file):
        for number, line in enumerate(block, before + 1):
            if blank or line.strip():
                yield number, decoded(file, number, line)


def some(file: str | Path, found: Iterator[T]) -> Iterator[T]:
    """The items of a file; raises "empty-file" if there is none."""
    first = next(found, None)
    if first is None:
        raise InputError("empty-file", f"{file} is empty: fill it, or remove it")
    yield first
    yield from found


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
        yield f"{file}:{number}", [found[i] for i in order]


def _meaning(cell: str) -> str:
    name = column_name(cell)
    if name == "id" or name in QUERY_IDS - {"query"} or name in PASSAGE_IDS:
        return "id"
    return "text" if name in TEXTS else name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with a key twice is refused, since a dict would keep the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise InputError("malformed-line", f"several values of the key {key!r}")
    return found


def objects(file: Path, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, JSON object) of each line; `remedy` says what a line should be.

    Raises:
        InputError: "malformed-line".
    """
    decode = json.JSONDecoder(object_pairs_hook=_unique).decode
    for number, line in lines(file):
        place = f"{file}:{number}"
        try:
            found = decode(line.rstrip("\r\n"))  # a column of the line, not of the next
        except InputError as error:
            raise malformed(place, str(error), "keep one of them") from None
        except json.JSONDecodeError as error:
            problem = f"not JSON ({error.msg}, column {error.colno})"
            raise malformed(place, problem, remedy) from None
        except (ValueError, RecursionError) as error:  # a huge number, or deep nesting
            raise malformed(place, f"not JSON ({error})", remedy) from None
        if not isinstance(found, dict):
            raise malformed(place, "JSON, but not an object", remedy)
        yield place, found


def malformed(place: str, problem: str, remedy: str) -> InputError:
    """A "malformed-line" error; `remedy` says what the line should be."""
    return InputError("malformed-line", f"{place}: {problem}: {remedy}")


def string(place: str, value: Any, name: str, remedy: str) -> str:
    """The value; raises "malformed-line" if it is not a string."""
    if not isinstance(value, str):
        raise malformed(place, f"{name} is not a string", remedy)
    return value


def text_of(
    place: str, fields: dict[str, Any], remedy: str, text: str = "text", title: str | None = "title"
) -> tuple[str, str]:
    """Title and text of an object; the title may be missing or null."""
    head = fields.get(title) if title else None
    head = "" if head is None else string(place, head, str(title), remedy)
    return head, string(place, fields.get(text), text, remedy)


def record_of(place: str, fields: dict[str, Any]) -> Record:
    """Id, title and text of an object."""
    remedy = 'every line is one object such as {"_id": "7", "title": "...", "text": "..."}'
    id_keys = [key for key in ID_KEYS if key in fields]
    if len({str(fields[key]) for key in id_keys}) > 1:
        raise malformed(place, f"several ids ({', '.join(id_keys)})", "keep one of them")
    id_key = id_keys[0] if id_keys else ID_KEYS[0]
    text_key = next((key for key in TEXT_KEYS if key in fields), TEXT_KEYS[0])
    name = string(place, id_of(fields.get(id_key)), id_key, remedy)
    return name, *text_of(place, fields, remedy, text_key)


def id_of(value: Any) -> Any:
    """The value, as a string if it is an integer."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


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

    Raises:
        InputError: "ambiguous-files", a stem has two files.
    """
    ends = "|".join(map(re.escape, suffixes))
    pattern = re.compile(rf"{re.escape(prefix)}(.+)({ends})(\.gz)?")
    found: dict[str, Path] = {}
    for file in listed(folder) if folder.is_dir() else ():
        match = pattern.fullmatch(file.name)
        if match is None or match[1].casefold() in NOT_DATA or not file.is_file():
            continue
        if match[1] in found:
            there = f"{found[match[1]]} and {file} exist"
            raise InputError("ambiguous-files", f"{there}: keep one of them")
        found[match[1]] = file
    return dict(sorted(found.items()))


def contents(path: str, cache_dir: str | Path) -> list[list[str]]:
    """[name, digest] of each file of a folder, or of a file; empty for a hub id.

    Hidden files and folders are left out, as in `datasets`.
    """
    place = Path(path)
    if place.is_file():
        return [[place.suffix, digest(place, cache_dir)]]
    names = {file: file.relative_to(place) for file in sorted(place.rglob("*")) if file.is_file()}
    return [
        [str(name), digest(file, cache_dir)]
        for file, name in names.items()
        if not any(part[0] == "." for part in name.parts)
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
