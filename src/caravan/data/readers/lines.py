"""Lines and columns of text files, plain or gzipped, and digests of files.

Errors in a line name file and line. A digest is of the bytes, so that a collection
is found again wherever its files lie and whenever they were touched; the cache keeps the digests of
large files, since hashing 20 GB takes a minute.
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
from typing import IO

import xxhash

from caravan import manifests
from caravan.errors import InputError
from caravan.files import cache_folder, listed
from caravan.progress import track

BLOCK_BYTES = 1 << 22
KEPT_FROM_BYTES = 1 << 26
"""Size from which on a file's digest is kept; smaller files are hashed in some milliseconds."""
SETTLED_S = 2.0
"""A file that was written just now may be written again within one tick of its clock."""

QUERY_IDS = {"qid", "query", "queryid", "topic", "topicid"}
PASSAGE_IDS = {"pid", "docid", "docno", "corpusid", "passageid", "documentid"}
"""Names of id columns in header lines, as `column_name` spells them."""
TEXTS = {"text", "contents", "body", "passage", "document", "query", "question"}
"""Names of text columns."""

GZIP = b"\x1f\x8b"
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
"""First bytes of packed files that are no text, and what they are."""
NOT_DATA = {"readme", "license", "licence", "notice"}
"""Stems of files that accompany data."""

log = logging.getLogger(__name__)


def digests(files: Iterable[Path], cache_dir: str | Path) -> list[str]:
    """The digest of each file's bytes, in their order.

    Args:
        cache_dir: keeps the digests of large files, by path, size and times of change.
    """
    return [_digest(file, Path(cache_dir)) for file in files]


def _digest(file: Path, cache_dir: Path) -> str:
    try:
        facts = file.stat()
        path = str(file.resolve())
        # The second time, ctime, changes even where a copy keeps the first (cp -p, rsync -t).
        times = [facts.st_mtime_ns, facts.st_ctime_ns]
        known = {"path": path, "size": facts.st_size, "changed_ns": times}
        large = facts.st_size >= KEPT_FROM_BYTES
        name = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
        kept = cache_dir / "digests" / f"{name}.json"
        if large and (found := _kept(kept)) == _sealed(known, found.get("xxh3")):
            return str(found["xxh3"])
        hasher = xxhash.xxh3_128()
        with open(file, "rb") as opened:
            blocks = iter(lambda: opened.read(BLOCK_BYTES), b"")
            total = facts.st_size >> 20
            for block in track(
                blocks, f"digest of {file.name}", total, "MiB", lambda block: len(block) >> 20
            ):
                hasher.update(block)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    digest = hasher.hexdigest()
    if large and time.time() - facts.st_ctime > SETTLED_S:
        with suppress(OSError):  # a cache that is read-only keeps nothing
            manifests.write_json(
                cache_folder(cache_dir, "digests") / kept.name, _sealed(known, digest)
            )
    return digest


def _kept(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sealed(known: dict[str, object], digest: object) -> dict[str, object]:
    """A record of a digest, with a digest of the record itself, which shows damage."""
    record = {**known, "xxh3": digest}
    return {**record, "seal": manifests.digest(record)}


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The bytes of a file, unpacked where they are gzip's, whatever the name of the file.

    Raises:
        InputError: the file is packed in another way.
    """
    with open(file, "rb") as raw:
        start = raw.peek(8)
        kind = next((name for magic, name in ARCHIVES.items() if start.startswith(magic)), None)
        if kind is not None:
            raise InputError(f"{file} is {kind}: unpack it; only gzip is read as it is")
        if start.startswith(GZIP):
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked
        else:
            yield raw


def lines(file: Path, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of each line that is not blank; lines end at LF and nowhere else.

    Args:
        blank: yield blank lines too.
    """
    number = 0
    try:
        with opened(file) as found:
            for number, line in enumerate(found, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if blank or line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{file}:{number + 1}: cannot be unpacked ({error}): the file is damaged, fetch it anew"
        ) from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None


def text_of(file: Path, number: int, line: bytes) -> str:
    """A line as text; it must be UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}:{number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) is "
            "not UTF-8: convert the file, for instance with iconv"
        ) from None


def column_name(cell: str) -> str:
    """A name in a header line, whatever its case and separators.

    >>> column_name("Query-ID"), column_name("corpus_id")
    ('queryid', 'corpusid')
    """
    return cell.strip().casefold().replace("-", "").replace("_", "")


def columns(
    file: Path, layouts: Sequence[tuple[str, ...]], expected: str
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line number, columns between tabs) of each line of a .tsv, in the order of their layout.

    A first line of column names is skipped; the columns may then be in any order.

    Args:
        layouts: the names of the columns, such as ("id", "text"), each of another length; the first
            line decides which of them the file has.
        expected: what a line holds, for messages.

    Raises:
        InputError: a line has another number of columns; a header names a column that is unknown.
    """
    order: list[int] | None = None
    for number, line in lines(file):
        found = text_of(file, number, line).rstrip("\r\n").split("\t")
        layout = next((one for one in layouts if len(one) == len(found)), None)
        if layout is None or len(found) != len(order or found):
            wanted = f"{len(order)} as above" if order else expected
            raise InputError(
                f"{file}:{number}: {len(found)} columns between tabs where {wanted} belong: mend "
                "the line"
            )
        if order is None:
            order = _header(file, number, found, layout)
            if order is not None:
                continue
            order = list(range(len(found)))
        yield number, tuple(found[i] for i in order)


def _header(file: Path, number: int, names: list[str], layout: tuple[str, ...]) -> list[int] | None:
    """Where a header has each column of a layout; None where the line is no header."""
    meanings = list(map(_meaning, names))
    if sorted(meanings) == sorted(layout):
        return [meanings.index(column) for column in layout]
    if meanings[0] != "id":
        return None
    raise InputError(
        f"{file}:{number}: {names[0]!r} looks like the name of a column, and the columns are not "
        f"{', '.join(layout)}: name them so, or remove the line"
    )


def _meaning(cell: str) -> str:
    name = column_name(cell)
    if name == "id" or name in QUERY_IDS - {"query"} or name in PASSAGE_IDS:
        return "id"
    return "text" if name in TEXTS else name


def one_of(folder: Path, names: Iterable[str]) -> Path | None:
    """The file of a folder that has one of these names, plain or .gz; None where there is none.

    Raises:
        InputError: there are several.
    """
    there = [folder / f"{name}{end}" for name in names for end in ("", ".gz")]
    there = [file for file in there if file.is_file()]
    if len(there) > 1:
        raise InputError(f"{there[0]} and {there[1]} are both there: keep one of them")
    return there[0] if there else None


def by_stem(folder: Path, suffixes: Sequence[str], prefix: str = "") -> dict[str, Path]:
    """The files `<prefix><stem><suffix>` of a folder by their stems, in order, plain or .gz.

    Hidden files and those called README or LICENSE are left out. Empty where there is no folder.

    Raises:
        InputError: several have one stem.
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
