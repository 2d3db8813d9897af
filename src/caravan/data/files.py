"""Lines of text files, plain or .gz; what is wrong in one is told with file and line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from caravan.errors import InputError


def stamp(file: Path) -> list[str | int]:
    """What changes when a file does: name, size, time."""
    facts = file.stat()
    return [file.name, facts.st_size, facts.st_mtime_ns]


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of each line that is not blank; lines end at LF and nowhere else."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as found:
            for number, line in enumerate(found, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
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
