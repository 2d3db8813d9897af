"""What a config is composed of: the overrides of the command line, and YAML files."""

from __future__ import annotations

import os
import re
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
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


def flags(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Hydra's flags and `overrides` of a command line, and the options that are unknown.

    Raises:
        InputError: "conflicting-flags", which Hydra would refuse with a traceback.
    """
    parser = ArgumentParser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    for names in ("-m --multirun", "-r --run", "--resolve"):
        parser.add_argument(*names.split(), action="store_true")
    for names in ("-cp --config-path", "-cn --config-name", "-cd --config-dir", "-c --cfg"):
        parser.add_argument(*names.split())
    parser.add_argument("-p", "--package")
    parser.add_argument("-i", "--info", nargs="?", const="all")
    args, unknown = parser.parse_known_args(argv)
    given = [f"--{name}" for name in ("cfg", "info", "run", "multirun") if getattr(args, name)]
    if len(given) > 1:
        remedy = f"leave out {' and '.join(given[1:])}"
        if args.multirun and not args.run:
            remedy += ", and give each setting one value"
        text = f"{given[0]} cannot be combined with {given[1]}: it is for one job; {remedy}"
        raise InputError("conflicting-flags", text)
    if args.resolve and not args.cfg:
        raise InputError("conflicting-flags", "--resolve is an option of --cfg; add --cfg job")
    return args, unknown


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
        deep = isinstance(error, RecursionError)
        raise HydraException("nested too deeply" if deep else str(error)) from error


def quoted(key: str, given: str) -> str | None:
    """The override with its value in quotes; None if Hydra would still not read the same text."""
    escaped = given.replace("'", "\\'")
    text = f"{key}='{escaped}'"
    try:
        same = parse(text, OverridesParser.create()).value() == given
    except HydraException:
        return None
    return text if same else None


def divided(overrides: list[str]) -> dict[str, str]:
    """Map words without a key to the override that the shell probably split at spaces.

    >>> divided(["name=my", "long", "run", "seed=1"])
    {'long': 'name=my long run', 'run': 'name=my long run'}
    """
    parts: list[str] = []
    words: dict[str, list[str]] = {}
    for text in overrides:
        if "=" in text or text.startswith("~"):
            parts = [text]
        elif parts:
            parts.append(text)
            words[text] = parts
    return {text: " ".join(parts) for text, parts in words.items()}


def unreadable(text: str, reason: str, whole: str = "") -> str:
    """Why an override cannot be read, with the text to type instead.

    Args:
        whole: see `divided`.
    """
    name, equals, given = text.partition("=")
    if not equals:
        name, _, given = whole.partition("=")
        instead = whole if given[:1] in ("[", "{") else quoted(name, given) if given else None
        remedy = f"; quote a value that contains spaces: {_typed(instead)}" if instead else ""
        return f"not a setting; write key=value{remedy}"
    if given.startswith("~"):
        home = f"\"{name}='$HOME{given[1:]}'\""
        return f"the shell does not expand ~ there; put it into quotes: {home}"
    reason = f"cannot be read: {reason.splitlines()[0]}"
    instead = quoted(name, given)
    if instead is None or given[:1] in "[{'\"" or "Error while evaluating" in reason:
        return reason
    return f"{reason}; put it into quotes: {_typed(instead)}"


def _typed(override: str) -> str:
    """An override as it is typed into a shell."""
    return shlex.quote(override) if set('"$`\\!') & set(override) else f'"{override}"'


def lines_of(tree: yaml.Node | None, key: str = "", line: int = 1) -> Iterator[tuple[str, int]]:
    """The keys that a YAML tree sets, aliases expanded, with their lines from 1."""
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
    keys = [key_of(text) for text in values]
    inside = tuple(f"{key}{end}" for key in keys for end in ".[")
    found = {key_of(text): TYPED for text in [*groups, *values]}
    for file, package in files:
        tree = yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader)
        for key, line in lines_of(tree, package):
            if key and key not in keys and not key.startswith(inside):
                found[key] = f"{shown(file)}:{line}"
    for key in keys:  # its parents may be in no file
        for end in re.finditer(r"\.", key):
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
