"""Lines of text files, plain or .gz, and what a file holds, in one number.

What is wrong in a line is told with file and line. A digest is of the bytes, so that a collection
is found again wherever its files lie and whenever they were touched; the cache keeps the digests of
large files, since hashing 20 GB takes a minute.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from caravan.cache import cache_folder
from caravan.errors import InputError
from caravan.manifest import write_json
from caravan.progress import track

BLOCK_BYTES = 1 << 22
KEPT_FROM_BYTES = 1 << 26
"""Size from which on a file's digest is kept; smaller files are hashed in some milliseconds."""
SETTLED_S = 2.0
"""A file that was written just now may be written again within one tick of its clock."""


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
        if large and (found := _kept(kept)).items() >= known.items():
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
            write_json(cache_folder(cache_dir, "digests") / kept.name, {**known, "xxh3": digest})
    return digest


def _kept(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("xxh3"), str) else {}


def lines(file: Path, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of each line that is not blank; lines end at LF and nowhere else.

    Args:
        blank: yield blank lines too.
    """
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as found:
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


def columns(file: Path, widths: tuple[int, ...], expected: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, columns between tabs) of each line of a .tsv.

    Args:
        widths: how many columns there may be; the first line decides which of them.
        expected: what belongs into them, for messages.
    """
    width = 0
    for number, line in lines(file):
        found = text_of(file, number, line).rstrip("\r\n").split("\t")
        if len(found) not in widths or width not in (0, len(found)):
            wanted = f"{width} as above" if width else expected
            raise InputError(
                f"{file}:{number}: {len(found)} columns between tabs where {wanted} belong: mend "
                "the line"
            )
        width = len(found)
        yield number, found


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

    Empty where there is no such folder.

    Raises:
        InputError: several have one stem.
    """
    stems = set()
    for file in folder.iterdir() if folder.is_dir() else ():
        name = file.name.removesuffix(".gz")
        suffix = next((one for one in suffixes if name.endswith(one)), "")
        stem = name.removeprefix(prefix).removesuffix(suffix)
        if suffix and stem and name == f"{prefix}{stem}{suffix}":
            stems.add(stem)
    found = {
        stem: one_of(folder, [f"{prefix}{stem}{suffix}" for suffix in suffixes])
        for stem in sorted(stems)
    }
    return {stem: file for stem, file in found.items() if file is not None}
