"""Help texts of a program: groups and options for --help, and a short usage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

COMMAND = re.compile(r"^# python (\w+)\.py\b.*?\b(?:experiment|sweep)=([\w/-]+)", re.MULTILINE)
"""A command in the head of a config file, with the option that it chooses."""


def bare(conf: Path, name: str, program: str) -> str:
    """The text for a program that is started without arguments: its purpose and first commands.

    Args:
        conf: the folder of the configs.
        name: the primary config.
        program: what is typed after `python`.
    """
    texts = yaml.safe_load((conf / f"{name}.yaml").read_text("utf-8"))["hydra"]["help"]
    return (
        f"usage: python {program} key=value ...\n\n{texts['header'].rstrip()}\n\n"
        f"  python {program} --help{' ' * 12}all groups and options\n"
    )


def groups(folders: Iterable[Path], name: str, known: Iterable[str]) -> str:
    """The groups of a program with their options, a line each; search takes evaluate's experiments.

    Args:
        folders: of configs.
        name: the primary config.
        known: the groups that the program has.
    """
    user = "evaluate" if name == "search" else name
    options: dict[str, set[str]] = {}
    for folder in folders:
        for group in known:
            for file in (folder / group).rglob("*.yaml"):
                if user in (_users(file, file.relative_to(folder / group)) or [user]):
                    path = file.parent.relative_to(folder).as_posix()
                    options.setdefault(path, set()).add(file.stem)
    return "".join(f"{group}: {', '.join(sorted(options[group]))}\n" for group in sorted(options))


def _users(file: Path, option: Path) -> list[str]:
    """The programs whose commands in the head of a file choose it; none where it shows none."""
    name = option.with_suffix("").as_posix()
    return [program for program, chosen in COMMAND.findall("".join(_head(file))) if chosen == name]


def _head(file: Path) -> Iterator[str]:
    """The comments that a file opens with."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.strip() and not line.startswith("#"):
                return
            yield line
