"""What a config is composed of: the overrides of the command line, and YAML files."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from caravan.errors import first_line

KeyPath = tuple[str | int, ...]
MOST_VALUES = 10_000
"""Of a YAML file, with aliases expanded: each value is composed, checked and recorded."""


def dotted(path: KeyPath) -> str:
    """A path as it is written on the command line."""
    words = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(words).lstrip(".")


def key_of(text: str) -> str:
    """The key or group of an override."""
    return re.split("[=@]", text.lstrip("+~"), maxsplit=1)[0]


def parse(text: str, parser: OverridesParser) -> Override:
    """One override as Hydra reads it.

    Raises:
        HydraException: it cannot be read.
    """
    try:
        return parser.parse_overrides([text])[0]
    except (RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        raise HydraException("nested too deeply" if deep else str(error)) from error


def quoted(key: str, given: str) -> str | None:
    """An override whose value is the text as it was given; None where quotes do not help."""
    escaped = given.replace("'", "\\'")
    try:
        same = parse(f"{key}='{escaped}'", OverridesParser.create()).value() == given
    except HydraException:
        return None
    return f"{key}='{escaped}'" if same else None


def unreadable(text: str, reason: str) -> str:
    """Why an override cannot be read, with the text to type instead."""
    name, equals, given = text.partition("=")
    if not equals:
        return "no setting; write key=value"
    reason = f"cannot be read: {reason.splitlines()[0]}"
    if given.startswith("~"):
        reason = "the shell does not expand ~ there"
        given = given.replace("~", "$HOME", 1)
    instead = quoted(name, given)
    if instead is None or given[:1] in "[{'\"" or "Error while evaluating" in reason:
        return reason
    special = set('"$`\\!') & set(instead.replace("$HOME", ""))
    typed = shlex.quote(instead) if special else f'"{instead}"'
    return f"{reason}; put it into quotes: {typed}"


def explain(error: Exception, file: str) -> str:
    """Describe an exception while composing in one line; `file` was read last."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{shown(Path(mark.name))}:{mark.line + 1}: not YAML: {error.problem}"
    if isinstance(error, UnicodeDecodeError):
        return f"{file}.yaml: not UTF-8: {error.reason}"
    if isinstance(error, RecursionError):
        return f"{file} is nested too deeply, or its defaults include {file} again"
    text = " ".join(str(error).split())
    if text.startswith("Could not append to config"):
        return "it is already set; remove the +"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    return f"{text} {first_line(cause)}" if cause else text or repr(error)


def selected_by(files: list[Path], wanted: Path) -> str:
    """`file:line: ` of the defaults that select the option `wanted` of a group, or nothing."""
    choice = re.compile(rf"\b{re.escape(wanted.parent.name)}\b.*:\s*{re.escape(wanted.name)}\b")
    for path in files:
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            if choice.search(line):
                return f"{shown(path)}:{number}: "
    return ""


def split_over_folders(cfg: DictConfig) -> Iterator[str]:
    """Report Hydra settings that would split a run over two folders."""
    try:
        run_dir, log_dir = cfg.get("run_dir"), cfg.hydra.run.dir
    except OmegaConfBaseException:
        return  # reported already
    if isinstance(run_dir, str) and log_dir != run_dir:
        yield f"hydra.run.dir: this moves only the log; set run_dir={log_dir} instead"
    if cfg.hydra.job.chdir is True:
        text = "paths are relative to the working directory of the command; remove it"
        yield f"hydra.job.chdir: {text}"


class FurtherFolder(SearchPathPlugin):
    """Adds the folder of `--config-dir`, since `initialize_config_dir` accepts one folder only."""

    folder: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            before = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{self.folder}", before)


class Origins:
    """Where the values of a composed config come from: the command line, or a file and its line.

    Args:
        keys: the keys that the command line sets.
        files: the files of the config and their packages, the last first.
    """

    def __init__(self, keys: list[str], files: list[tuple[Path, KeyPath]]) -> None:
        self.keys = keys
        self.trees = [
            (file, package, yaml.compose(file.read_text("utf-8"), Loader=yaml.SafeLoader))
            for file, package in files
        ]

    def __call__(self, path: KeyPath) -> str:
        name = dotted(path)
        if any(name == key or name.startswith((f"{key}.", f"{key}[")) for key in self.keys):
            return "command line"
        for wanted in (path, (*path, "_target_"), path[:-1]):
            for file, package, tree in self.trees:
                if wanted[: len(package)] == package:
                    line = _line(tree, wanted[len(package) :])
                    if line is not None:
                        return f"{shown(file)}:{line}"
        return "command line" if any(key.startswith(name) for key in self.keys) else "no file"


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


def has_too_many_values(file: Path) -> bool:
    """Whether the aliases of aliases in a YAML file stand for thousands of values."""
    text = file.read_bytes()
    if b"*" not in text or b"&" not in text:
        return False
    sizes: dict[int, int] = {}  # of nodes, by id

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES  # inside of itself, without end
            inside = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = (one if isinstance(one, tuple) else (one,) for one in inside)
            sizes[id(node)] = 1 + sum(size(one) for pair in pairs for one in pair)
        return sizes[id(node)]

    try:
        tree = yaml.compose(text.decode(), Loader=yaml.SafeLoader)
        return tree is not None and size(tree) >= MOST_VALUES
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return False  # reported where the file is used
