"""Hydra's access to config files; refuses a file that would take forever to compose.

A few lines of YAML with aliases of aliases stand for millions of values, and Hydra and OmegaConf
copy each of them several times.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType

from caravan.errors import InputError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_VALUES, MOST_LEVELS = 10_000, 50
"""Of a YAML file, with aliases expanded: each value is composed, checked and recorded."""
EMPTY = ("", "~", "null")
"""A document without settings."""


class Repository(ConfigRepository):
    """Hydra's own, which looks at the size of each file before it is loaded."""

    def load_config(self, config_path: str) -> Any:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is not None and source.scheme() == "file":
            file = Path(source.path, f"{config_path.removesuffix('.yaml')}.yaml")
            if file.is_file():
                _refuse_too_large(file)
        return super().load_config(config_path)


def _refuse_too_large(file: Path) -> None:
    """Refuse a file that is nested deeper, or expands to more values, than any config does.

    Raises:
        InputError: with the file and the line.
        yaml.YAMLError: it is not YAML.
    """
    sizes: dict[str, int] = {}  # values that an anchor stands for
    unfinished: list[tuple[str | None, int]] = []  # collections: anchor, values before it
    count = 0
    for event in _events(file):
        line = f"{shown(file)}:{event.start_mark.line + 1}"
        if not count and (
            isinstance(event, yaml.SequenceStartEvent)
            or (isinstance(event, yaml.ScalarEvent) and event.value not in EMPTY)
        ):
            raise InputError(f"{line}: a config file is a mapping; write key: value")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in unfinished}:
                raise InputError(f"{line}: *{event.anchor} refers to a value that contains it")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            unfinished.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = unfinished.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
        if len(unfinished) > MOST_LEVELS:
            raise InputError(f"{line}: its values are nested in more than {MOST_LEVELS} levels")
        if count > MOST_VALUES:
            raise InputError(f"{line}: more than {MOST_VALUES:,} values with aliases expanded")


def _events(file: Path) -> Iterator[yaml.Event]:
    with file.open(encoding="utf-8") as stream:
        try:
            yield from yaml.parse(stream, Loader=LOADER)
        except UnicodeDecodeError as error:
            raise InputError(f"{shown(file)}: it is not UTF-8: {error.reason}") from error


def shown(file: Path) -> str:
    """A path from here if it lies below, else in full."""
    near = os.path.relpath(file)
    return str(file) if near.startswith("..") else near
