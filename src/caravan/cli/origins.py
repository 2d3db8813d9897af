"""Config files: where the values of a composed config come from, and which files are too large."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from caravan.cli.check import KeyPath, dotted

MOST_VALUES = 10_000
"""Of a YAML file, with aliases expanded: each value is composed, checked and recorded."""


class Origins:
    """Where the values of a composed config come from: the command line, or a file and its line.

    Args:
        keys: the keys that the command line sets.
        files: the files of the config and their packages, the last first.
    """

    def __init__(self, keys: list[str], files: Iterable[tuple[Path, KeyPath]]) -> None:
        self.keys, self.files = keys, files
        self._trees: list[tuple[Path, KeyPath, yaml.Node | None]] | None = None

    def __call__(self, path: KeyPath) -> str:
        name = dotted(path)
        if any(name == key or name.startswith((f"{key}.", f"{key}[")) for key in self.keys):
            return "command line"
        if self._trees is None:
            self._trees = [
                (file, package, yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader))
                for file, package in self.files
            ]
        for wanted in (path, (*path, "_target_"), path[:-1]):
            for file, package, tree in self._trees:
                if wanted[: len(package)] == package:
                    line = _line(tree, wanted[len(package) :])
                    if line is not None:
                        return f"{shown(file)}:{line}"
        inside = any(key.startswith(name) for key in self.keys)
        return "command line" if inside else "no file"


def _line(tree: yaml.Node | None, path: KeyPath) -> int | None:
    """The line, from 1, at which a YAML tree sets a path; None where it does not."""
    if not path:
        return None
    if isinstance(tree, yaml.SequenceNode) and path[0] in range(len(tree.value)):
        item = tree.value[int(path[0])]
        return _line(item, path[1:]) or item.start_mark.line + 1
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        if key.value == str(path[0]):
            return key.start_mark.line + 1 if len(path) == 1 else _line(value, path[1:])
    return None


def shown(file: Path) -> str:
    """A path from here if it lies below, else in full."""
    near = os.path.relpath(file)
    return str(file) if near.startswith("..") else near


def too_many_values(file: Path) -> str | None:
    """The mistake in a YAML file whose aliases of aliases stand for millions of values."""
    text = file.read_bytes()
    if b"*" not in text or b"&" not in text:
        return None
    sizes: dict[str | None, int] = {}  # values that an anchor stands for
    unfinished: list[tuple[str | None, int]] = []  # collections: anchor, values before it
    count = 0
    try:
        for event in yaml.parse(text.decode(), Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                count += sizes.get(event.anchor, MOST_VALUES)  # inside of itself, without end
            elif isinstance(event, yaml.CollectionStartEvent):
                unfinished.append((event.anchor, count))
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = unfinished.pop()
                sizes[anchor] = count - before
            elif isinstance(event, yaml.ScalarEvent):
                count, sizes[event.anchor] = count + 1, 1
            if count >= MOST_VALUES:
                line = f"{shown(file)}:{event.start_mark.line + 1}"
                return f"{line}: more than {MOST_VALUES:,} values with aliases expanded"
    except (yaml.YAMLError, UnicodeDecodeError):
        pass  # reported where the file is used
    return None
