"""Seeded mutations of files: bytes, JSON, lines of text and safetensors, for fuzz tests.

    for mutant in sampled(json_mutants(data, seed=0), 30, seed=0):
        path.write_bytes(mutant.data)
        result = outcome(lambda: load(path))   # a value or an InputError; anything else fails

A mutant of the same data, seed and position is always the same, so that the name that a failing
test prints is enough to repeat it. `data` is None where the file is to be removed.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
import signal
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from caravan.errors import InputError

DEEP = 100_000
"""Brackets of a nested value: more than any recursive parser takes."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1.5, 1e308, -0.0),
    *(math.nan, math.inf, -math.inf, "", "x", "\0", "../../etc/passwd", "\ud800", "a" * 5000),
    *([], [None], [[]], {}, {"": None}, {"a": {"b": [1]}}),
)
"""JSON values of all types that take the place of others."""


class Mutant(NamedTuple):
    """What is done to a file, and the file's new bytes (None: no file)."""

    name: str
    data: bytes | None


def bytes_mutants(data: bytes, seed: int, flips: int = 8) -> Iterator[Mutant]:
    """Removed, emptied, truncated, extended, overwritten and flipped, whatever the format."""
    rng = random.Random(seed)
    for name, whole in {
        "removed": None,
        "empty": b"",
        "zeros": bytes(len(data)),
        "white space": b" \n\t\n",
        "a byte order mark in front": b"\xef\xbb\xbf" + data,
        "UTF-16": b"\xff\xfe" + data.decode("latin-1").encode("utf-16-le"),
        "gzip's first bytes": b"\x1f\x8b\x08\x00" + data[4:],
        "a pickle": b"\x80\x04cos\nsystem\n(S'exit 99'\ntR.",
        "twice": data + data,
        "reversed": data[::-1],
        "random bytes": rng.randbytes(max(len(data), 16)),
    }.items():
        yield Mutant(name, whole)
    for size in sorted({1, 7, 8, 9, len(data) // 2, max(len(data) - 1, 0)}):
        if size < len(data):
            yield Mutant(f"truncated to {size} bytes", data[:size])
    for _ in range(flips if data else 0):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        yield Mutant(f"bit {bit} of byte {place} flipped", bytes(flipped))
        start, size = rng.randrange(len(data)), rng.randrange(1, 64)
        yield Mutant(f"{size} bytes at {start} cut out", data[:start] + data[start + size :])


def json_mutants(data: bytes, seed: int, depth: int = 3) -> Iterator[Mutant]:
    """A JSON file with values of other types, keys removed, added and doubled, and deep nesting.

    Args:
        depth: of the nodes that are changed; those below are left alone.
    """
    rng = random.Random(seed)
    tree = json.loads(data)
    for value in (None, 0, math.nan, "x", [], [tree], {}, {"x": tree}):
        yield Mutant(f"the whole is {_short(value)}", _dump(value))
    yield Mutant("deep lists", b"[" * DEEP + b"]" * DEEP)
    yield Mutant("deep objects", b'{"a":' * DEEP + b"1" + b"}" * DEEP)
    yield Mutant("a trailing comma", data.rstrip()[:-1] + b",}")
    yield Mutant("an integer of 5,000 digits", b'{"format": ' + b"9" * 5000 + b"}")
    for path in _paths(tree, depth):
        where = ".".join(map(str, path))
        yield Mutant(f"{where} removed", _dump(_without(tree, path)))
        for value in rng.sample(VALUES, 5):
            yield Mutant(f"{where} is {_short(value)}", _dump(_with(tree, path, value)))
        deep = json.dumps(_with(tree, path, "DEEP")).encode()
        nested = b"[" * DEEP + b"]" * DEEP
        if rng.random() < 0.2:
            yield Mutant(f"{where} is nested deep", deep.replace(b'"DEEP"', nested))
        if isinstance(_at(tree, path), dict):
            added = {**_at(tree, path), "unknown key": rng.choice(VALUES)}
            yield Mutant(f"{where} has another key", _dump(_with(tree, path, added)))
    if isinstance(tree, dict):
        yield Mutant("another key", _dump({**tree, "unknown_key": [1]}))
        for key in rng.sample(sorted(tree), min(3, len(tree))):
            doubled = data.rstrip()[:-1] + b", " + json.dumps(key).encode() + b": null}"
            yield Mutant(f"{key} twice", doubled)


def line_mutants(data: bytes, seed: int, number: int = 4) -> Iterator[Mutant]:
    """A text file with lines lost, doubled, swapped, joined, cut, or with other separators."""
    rng = random.Random(seed)
    lines = data.splitlines(keepends=True)
    if not lines:
        return
    yield Mutant("the last line without its end", data.rstrip(b"\r\n"))
    yield Mutant("CRLF", data.replace(b"\n", b"\r\n"))
    yield Mutant("blank lines between", b"\n".join(lines))
    yield Mutant("sorted", b"".join(sorted(lines)))
    for _ in range(number):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        line = lines[at]
        text = line.rstrip(b"\r\n")
        fields = text.split(b"\t" if b"\t" in line else b" ")
        shuffled = rng.sample(fields, len(fields))
        value = str(rng.choice(VALUES[:15])).encode()
        changed = list(fields)
        changed[rng.randrange(len(fields))] = value
        for name, new in {
            "lost": b"",
            "twice": line + line,
            f"replaced by {other + 1}": lines[other],
            "without its end": text,
            "cut in half": line[: len(line) // 2] + b"\n",
            "with spaces for tabs": line.replace(b"\t", b" "),
            "with a tab at its end": text + b"\t\n",
            "with a null byte": b"\0" + line,
            "not in UTF-8": b"\xff\xfe" + line,
            "of 1 MB": text + b"a" * 1_000_000 + b"\n",
            "with its fields shuffled": b"\t".join(shuffled) + b"\n",
            f"with {value!r}": b"\t".join(changed) + b"\n",
        }.items():
            whole = b"".join([*lines[:at], new, *lines[at + 1 :]])
            yield Mutant(f"line {at + 1} {name}", whole)


def text_mutants(name: str, data: bytes, seed: int) -> Iterator[Mutant]:
    """Of bytes, of lines, of the objects on two lines of .jsonl, and of what gzip unpacks."""
    yield from bytes_mutants(data, seed)
    zipped = data.startswith(b"\x1f\x8b")
    text = gzip.decompress(data) if zipped else data
    for mutant in (*line_mutants(text, seed), *(_row_mutants(text) if ".jsonl" in name else ())):
        assert mutant.data is not None
        yield mutant._replace(data=gzip.compress(mutant.data, mtime=0)) if zipped else mutant


def _row_mutants(data: bytes) -> Iterator[Mutant]:
    lines = data.splitlines(keepends=True)
    for at in (0, len(lines) // 2):
        for name, row in json_mutants(lines[at], seed=at):
            new = b" ".join((row or b"").split(b"\n")) + b"\n"
            whole = b"".join([*lines[:at], new, *lines[at + 1 :]])
            yield Mutant(f"{name} in line {at + 1}", whole)


def safetensors_mutants(data: bytes, seed: int, number: int = 3) -> Iterator[Mutant]:
    """A safetensors file with other names, shapes, types and values, and damaged headers."""
    import torch
    from safetensors.torch import load, save

    rng = random.Random(seed)
    size = int.from_bytes(data[:8], "little")
    for length in (0, 1, size - 1, size + 1, 2**27, 2**40, 2**63, 2**64 - 1):
        yield Mutant(f"a header of {length} bytes", struct.pack("<Q", length) + data[8:])
    header = json.loads(data[8 : 8 + size])
    names = sorted(set(header) - {"__metadata__"})
    for name in rng.sample(names, min(number, len(names))):
        for key, value in (
            ("dtype", "F64"),
            ("dtype", "X9"),
            ("shape", [2**40]),
            ("shape", [-1]),
            ("data_offsets", [0, 10**12]),
            ("data_offsets", [5, 1]),
        ):
            changed = copy.deepcopy(header)
            changed[name][key] = value
            text = json.dumps(changed).encode()
            whole = struct.pack("<Q", len(text)) + text + data[8 + size :]
            yield Mutant(f"{key} of {name} is {value}", whole)
    tensors = load(data)
    metadata = header.get("__metadata__")

    def saved(changed: dict[str, Any]) -> bytes:
        return save({key: value.contiguous() for key, value in changed.items()}, metadata)

    yield Mutant("no tensors", saved({}))
    yield Mutant("another tensor", saved({**tensors, "another": torch.ones(2)}))
    for name in rng.sample(names, min(number, len(names))):
        whole = tensors[name]
        others = {key: value for key, value in tensors.items() if key != name}
        yield Mutant(f"{name} removed", saved(others))
        yield Mutant(f"{name} renamed", saved({**others, f"{name}x": whole}))
        yield Mutant(f"{name} shorter", saved({**others, name: whole[:-1].clone()}))
        yield Mutant(f"{name} with another axis", saved({**others, name: whole[None].clone()}))
        yield Mutant(f"{name} of integers", saved({**others, name: whole.to(torch.int32)}))
        for value in (math.nan, math.inf, -math.inf):
            wrong = whole.clone()
            wrong.view(-1)[rng.randrange(wrong.numel())] = value
            yield Mutant(f"{name} with {value}", saved({**others, name: wrong}))


def file_mutants(path: Path, data: bytes, depth: int = 2, number: int = 3) -> Iterator[Mutant]:
    """Of bytes, and of JSON (to a depth) or safetensors by the file's name."""
    yield from bytes_mutants(data, seed=0)
    if path.suffix == ".json":
        yield from json_mutants(data, seed=0, depth=depth)
    elif path.suffix == ".safetensors":
        yield from safetensors_mutants(data, seed=0, number=number)


def exchanged(path: Path) -> Iterator[Mutant]:
    """The other files of its folder in its place, of the same suffix."""
    for other in sorted(path.parent.iterdir()):
        if other.suffix == path.suffix and other != path and other.is_file():
            yield Mutant(f"{other.name} in its place", other.read_bytes())


def sampled(mutants: Iterable[Mutant], number: int, seed: int) -> list[Mutant]:
    """So many of the mutants, in their order; the same ones for the same seed."""
    listed = list(mutants)
    chosen = random.Random(seed).sample(range(len(listed)), min(number, len(listed)))
    return [listed[i] for i in sorted(chosen)]


def put(path: Path, mutant: Mutant) -> None:
    """Write the mutant in place of the file, or remove the file."""
    path.unlink(missing_ok=True)
    if mutant.data is not None:
        path.write_bytes(mutant.data)


@contextmanager
def restored(path: Path) -> Iterator[bytes]:
    """The file's bytes; they are put back at the end."""
    data = path.read_bytes()
    try:
        yield data
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(data)


class Snapshot:
    """The bytes of all files below a folder, to put them back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def restore(self) -> None:
        """Put all files back as they were; no others remain."""
        for path, data in Snapshot(self.folder).files.items():
            if self.files.get(path) != data:
                path.unlink()
        for path, data in self.files.items():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


def amounts(quick: int, full: int) -> pytest.MarkDecorator:
    """Run a test with so many mutants (`number`), and with all of them if slow tests run."""
    return pytest.mark.parametrize("number", [quick, pytest.param(full, marks=pytest.mark.slow)])


@contextmanager
def noted(case: str) -> Iterator[None]:
    """Name the mutant in the traceback of a test that fails."""
    try:
        yield
    except BaseException as error:
        error.add_note(case)
        raise


def outcome(work: Callable[[], Any], seconds: int = 60) -> Any:
    """What the work returns, or the InputError that it raises.

    Raises:
        AssertionError: it takes longer than so many seconds.
        Exception: any other that the work raises, which is a defect.
    """
    try:
        with _within(seconds):
            return work()
    except InputError as error:
        text = str(error)
        assert text, "an InputError without a sentence"
        assert "\n" not in text, f"an InputError of several lines: {text!r}"
        return error


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"it did not end within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _dump(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).encode()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def _paths(tree: Any, depth: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of nodes, a few of each long list or object."""
    if not depth:
        return
    keys: Sequence[Any] = ()
    if isinstance(tree, dict):
        keys = list(tree)
    elif isinstance(tree, list):
        keys = range(len(tree))
    if len(keys) > 50:  # a vocabulary
        keys = [keys[0], keys[len(keys) // 2], keys[-1]]
    for key in keys:
        yield (*path, key)
        yield from _paths(tree[key], depth - 1, (*path, key))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _with(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(tree)
    _at(changed, path[:-1])[path[-1]] = value
    return changed


def _without(tree: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(tree)
    del _at(changed, path[:-1])[path[-1]]
    return changed
