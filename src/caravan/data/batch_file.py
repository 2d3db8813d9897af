"""An Arrow stream on disk that is written batch by batch, and continued after an interruption.

The journal beside it has a line for each message of the stream (the schema, the batches and the end
mark): its size and digest. The file is continued after the last message that is intact, so neither
a kill nor a power failure leaves wrong texts in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import xxhash

JOURNAL = ".journal"
Row = tuple[bytes, ...]  # one UTF-8 text per column
_END = b"\xff\xff\xff\xff\0\0\0\0"  # the end mark of an Arrow stream


class BatchFile:
    """Appends batches of rows to an Arrow stream of text columns; a context manager.

    The constructor truncates the file and its journal after the last intact message. The caller
    deletes the journal when the file is no longer continued.

    Attributes:
        journal: the path of the journal; without it the file is written anew.
        is_whole: the file has its end mark, and needs no more batches.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.schema = pa.schema([(column, pa.large_string()) for column in columns])
        self.path, self.journal = path, path.with_name(f"{path.name}{JOURNAL}")
        intact = self._intact()
        self.is_whole = bool(intact) and intact[-1] == _line(_END)
        self._file, self._lines = path.open("ab"), self.journal.open("ab")
        self._file.truncate(sum(int(line.split()[0]) for line in intact))
        self._lines.truncate(sum(map(len, intact)))
        if not intact:
            self._append(self.schema.serialize())

    def __enter__(self) -> BatchFile:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file, self._lines:  # closes one if the other fails, as on a full disk
            pass

    def kept(self) -> Iterator[list[Row]]:
        """The batches that are in the file."""
        with pa.OSFile(str(self.path)) as file:
            for batch in pa.ipc.open_stream(file):
                columns = (column.cast(pa.large_binary()).to_pylist() for column in batch.columns)
                yield list(zip(*columns, strict=True))

    def write(self, rows: Sequence[Row]) -> None:
        """Append a batch."""
        arrays = [pa.array(column, pa.large_string()) for column in zip(*rows, strict=True)]
        self._append(pa.record_batch(arrays, schema=self.schema).serialize())

    def finish(self) -> None:
        """Write the end mark, unless it is there."""
        if not self.is_whole:
            self._append(_END)
            self.is_whole = True

    def _append(self, message: bytes | pa.Buffer) -> None:
        self._file.write(message)
        self._file.flush()
        self._lines.write(_line(message))
        self._lines.flush()

    def _intact(self) -> list[bytes]:
        """The lines of the journal whose messages are in the file, up to the first that is not."""
        if not self.path.exists() or not self.journal.exists():
            return []
        lines = self.journal.read_bytes().splitlines(keepends=True)
        left = self.path.stat().st_size
        with self.path.open("rb") as file:
            for at, line in enumerate(lines):
                size = re.match(rb"\d{1,15} ", line)
                if size is None or int(size[0]) > left or _line(file.read(int(size[0]))) != line:
                    return lines[:at]
                left -= int(size[0])
        return lines


def _line(message: bytes | pa.Buffer) -> bytes:
    return b"%d %s\n" % (len(message), xxhash.xxh3_128_hexdigest(message).encode())
