"""What a config is composed of: the overrides of the command line, and YAML files."""

from __future__ import annotations

import os
import re
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin

from caravan.errors import InputError

TYPED = "command line"


class FurtherFolder(SearchPathPlugin):
    """Adds the folder of `--config-dir`, since `initialize_config_dir` accepts one folder only."""

    folder: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            before = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{self.folder}", before)


def flags(argv: list[str]) -> Namespace:
    """Hydra's flags and the `overrides` of a command line.

    Raises:
        InputError: "conflicting-flags" or "unknown-option".
    """
    parser = ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("overrides", nargs="*")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("-m", "--multirun", action="store_true")
    modes.add_argument("-r", "--run", action="store_true")
    modes.add_argument("-c", "--cfg")
    modes.add_argument("-i", "--info", nargs="?", const="all")
    parser.add_argument("--resolve", action="store_true")
    for names in ("-p --package", "-cp --config-path", "-cn --config-name", "-cd --config-dir"):
        parser.add_argument(*names.split())
    try:
        args, unknown = parser.parse_known_args(argv)
    except ArgumentError as error:
        raise InputError("conflicting-flags", str(error)) from None
    if args.resolve and not args.cfg:
        raise InputError("conflicting-flags", "--resolve is an option of --cfg; add --cfg job")
    if unknown:
        text = "unknown option; settings have no dashes (key=value)"
        raise InputError("unknown-option", f"{unknown[0]}: {text}")
    return args


def key_of(text: str) -> str:
    """The key or group of an override."""
    return re.split("[=@]", text.lstrip("+~"), maxsplit=1)[0]


def top(text: str) -> str:
    """The top-level key, or the first part of the group, of an override."""
    return re.split(r"[./]", key_of(text))[0]


def parse(text: str, parser: OverridesParser) -> Override:
    """One override as Hydra reads it.

    Raises:
        HydraException: If it cannot be read.
    """
    try:
        return parser.parse_overrides([text])[0]
    except (RecursionError, ValueError) as error:
        raise HydraException(str(error)) from error


def quoted(text: str) -> str:
    """An override with its value in quotes, so that Hydra reads a string.

    >>> quoted("name=2024_11_29")
    "name='2024_11_29'"
    """
    key, _, value = text.partition("=")
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def unreadable(text: str, error: HydraException) -> str:
    """Why an override cannot be read, and how it is written."""
    key, equals, value = text.partition("=")
    if not equals:
        return "not a setting; write key=value, and quotes around a value that contains spaces"
    inside = "$HOME/..." if value.startswith("~") else "..."
    remedy = f"put a text with special characters into both quotes: \"{key}='{inside}'\""
    return f"cannot be read: {str(error).splitlines()[0]}; {remedy}"


def message(error: Exception) -> str:
    """What Hydra says, in one line; the cause, if it is OmegaConf's."""
    return " ".join(str(error.__cause__ or error).split()) or repr(error)


def lines_of(tree: yaml.Node | None, key: str = "", line: int = 1) -> Iterator[tuple[str, int]]:
    """The keys that a YAML tree sets, aliases expanded, with their lines from 1."""
    if key:
        yield key, line
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(tree, yaml.SequenceNode):
        children = [(f"[{i}]", item, item) for i, item in enumerate(tree.value)]
    elif isinstance(tree, yaml.MappingNode):
        children = [(f".{name.value}", name, value) for name, value in tree.value]
    for part, start, value in children:
        yield from lines_of(value, f"{key}{part}".removeprefix("."), start.start_mark.line + 1)


def origins(files: list[tuple[Path, str]], groups: list[str], values: list[str]) -> dict[str, str]:
    """Where each key of a config is set: `TYPED`, or the last file that sets it, with its line.

    Args:
        files: of the config, in the order in which they are merged, with their packages.
        groups: the overrides that choose options; values: the others.
    """
    found: dict[str, str] = {}
    for file, package in files:
        tree = yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader)
        found |= {key: f"{shown(file)}:{line}" for key, line in lines_of(tree, package)}
    for key in map(key_of, groups):
        found.setdefault(key, TYPED)
    for key in map(key_of, values):
        inside = (f"{key}.", f"{key}[")
        found = {one: place for one, place in found.items() if not one.startswith(inside)}
        found[key] = TYPED
        for end in re.finditer(r"\.", key):  # its parents may be in no file
            found.setdefault(key[: end.start()], TYPED)
    return found


def origin(key: str, found: dict[str, str]) -> str:
    """The origin of a key, or of its closest parent that a file or override sets."""
    while key and key not in found:
        key = re.sub(r"(^|\.)[^.\[]*$|\[\d+\]$", "", key)
    return found.get(key, "no file")


def shown(file: Path) -> str:
    """A path relative to the working directory if it is inside, else as given."""
    near = os.path.relpath(file)
    return str(file) if near.startswith("..") else near
