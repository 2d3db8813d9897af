"""Check one override of the command line by itself, before anything is composed.

Does it parse, does the group have the option, is the idiom one that Hydra takes. Where it does not,
the answer is a line to type instead.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from caravan.cli.checking.definitions import did_you_mean

WHOLE = ("experiment", "sweep")
"""The groups that may set anything anywhere; null unless chosen."""
ALIASES = {
    **dict.fromkeys(("model", "encoder", "base_model", "network"), ("backbone", "retriever")),
    **dict.fromkeys(("dataset", "datamodule", "corpus", "collection"), ("data",)),
    **dict.fromkeys(("optim", "optimiser"), ("optimizer",)),
    **dict.fromkeys(("criterion", "objective"), ("loss",)),
    **dict.fromkeys(("adapter", "lora"), ("peft",)),
    **dict.fromkeys(("exp", "recipe"), ("experiment",)),
}
"""What groups and settings are called elsewhere."""
MOST_LISTED = 20
"""Options that a message names."""
IN_SHELL = set('"$`\\!')
"""Characters that a shell interprets inside double quotes."""


class Vet:
    """Checks overrides of one primary config.

    Args:
        loader: Hydra's config loader.
        name: the primary config, without .yaml.
        root: the dataclass that says what its root may hold.
    """

    def __init__(self, loader: Any, name: str, root: type) -> None:
        self.loader, self.name = loader, name
        self.known = [field.name for field in fields(root)]
        self.parser = OverridesParser.create(config_loader=loader)
        self._options: dict[str, list[str]] = {}

    def __call__(self, text: str) -> tuple[str | None, str | None]:
        """Check one override.

        Returns:
            What is wrong with it, and the override to continue with (None: without it).
        """
        try:
            override = self.parse(text)
        except HydraException as error:
            return f"{text} (command line): {self._unreadable(text, str(error))}", None
        key, value = override.key_or_group, override.value()
        if key.startswith(("hydra.", "hydra/")) or override.is_delete():
            return None, text
        root = re.split(r"[.@/]", key)[0]
        if not self.is_group(text):
            meant = None if root in self.known else self._choice_meant(key, value)
            if meant:
                what = f"{self.name} has no setting {key!r}; did you mean {meant}?"
                return f"{text} (command line): {what}", None
            # Force-added even if unknown: the walk over all keys suggests what was meant.
            return None, text if root in self.known else f"++{text.lstrip('+')}"
        if root not in self.known and root not in WHOLE:
            return f"{text} (command line): {self.name} has no group {key!r}", None
        if text.startswith("+") and override.package is None and key == root:
            plain = text.lstrip("+")
            return f"{text} (command line): write {plain}, without +", plain
        return self._choice(text, key, value)

    def parse(self, text: str) -> Override:
        """One override as Hydra reads it.

        Raises:
            HydraException: it cannot be read.
        """
        try:
            return self.parser.parse_override(text)
        except (RecursionError, ValueError) as error:
            deep = isinstance(error, RecursionError)
            reason = "its value is nested too deeply" if deep else str(error)
            raise HydraException(reason) from error

    def is_group(self, text: str) -> bool:
        """Whether an override chooses an option of a group."""
        return bool(self.loader.repository.group_exists(key_of(text)))

    def options(self, group: str) -> list[str]:
        """The options of a group and, as "folder/option", of the folders in it."""

        def below(path: str) -> Iterator[str]:
            yield from self.loader.get_group_options(path, config_name=self.name)
            for folder in self.loader.get_group_options(path, ObjectType.GROUP, self.name):
                yield from (f"{folder}/{option}" for option in below(f"{path}/{folder}"))

        if group not in self._options:
            self._options[group] = list(below(group))
        return self._options[group]

    def globbed(self, override: Override) -> list[str]:
        """The options that `group=glob(pattern)` stands for; `*` does not match a slash."""
        value = override.value()
        if not isinstance(value, Glob):
            return []
        depths = {pattern.count("/") for pattern in value.include}
        options = self.options(override.key_or_group)
        return [name for name in value.filter(options) if name.count("/") in depths]

    def _choice(self, text: str, key: str, value: Any) -> tuple[str | None, str | None]:
        """Are the chosen options of a group there?"""
        options = self.options(key)
        if isinstance(value, dict):
            plain = f"{key} is a group; choose {key}=<option>, and set {key}.<setting>=<value>"
            return f"{text} (command line): {plain}", None
        for name in map(str, value if isinstance(value, list) else [value]):
            if name in options:
                continue
            inside = [option for option in options if option.startswith(f"{name}/")]
            near = None if inside else did_you_mean(name, options)
            hint = f"did you mean {key}={near}?" if near else listed(inside or options)
            instead = f"{key}={near}" if near and key not in WHOLE else None
            name = "null" if value is None else name
            return f"{text} (command line): no {key} is called {name}; {hint}", instead
        return None, text

    def _choice_meant(self, key: str, value: Any) -> str | None:
        """The choice that a key means which does not exist: model=bert means backbone=bert_base."""
        if not isinstance(value, str):
            return None
        groups = [name for name in (*self.known, *WHOLE) if self.is_group(name)]
        for group in groups:
            if value in self.options(group):
                return f"{group}={value}"
        alias = next((name for name in ALIASES.get(key, ()) if name in (*self.known, *WHOLE)), None)
        if alias is None:
            return None
        if alias not in groups:
            return f"{alias}={value}"
        options = self.options(alias)
        starts = [option for option in options if option.startswith(value)]
        near = starts[0] if starts else did_you_mean(value, options, cutoff=0.5)
        return f"{alias}={near or '<option>'}"

    def _unreadable(self, text: str, reason: str) -> str:
        """Why an override cannot be read, with the text to type instead."""
        name, equals, given = text.partition("=")
        if not equals:
            return "no setting; write key=value"
        reason = reason.splitlines()[0]
        if given.startswith("~"):
            reason = "the shell does not expand ~ there"
            given = given.replace("~", "$HOME", 1)
        elif reason.startswith("Error while evaluating"):  # a function of Hydra's, used wrongly
            return f"cannot be read: {reason}"
        elif "=" in given:
            reason = "its value has another ="
        else:
            reason = f"cannot be read: {reason}"
        instead = self.quoted(name, given)
        if instead is not None and given[:1] not in "[{'\"":
            return f"{reason}; put it into quotes: {in_shell(instead)}"
        if "=" in given or "token recognition error" in reason:
            return f"{reason}; put each text with special characters into quotes of its own"
        return reason

    def quoted(self, key: str, given: str) -> str | None:
        """An override whose value is a text as it is given; None where quotes do not help."""
        escaped = given.replace("'", "\\'")
        text = f"{key}='{escaped}'"
        try:
            value = self.parse(text).value()
        except HydraException:
            return None
        return text if value == given else None


def key_of(text: str) -> str:
    """The key or group of an override."""
    return re.split("[=@]", text.lstrip("+~"), maxsplit=1)[0]


def listed(options: list[str]) -> str:
    """All options of a group, in words."""
    if not options:
        return "the group has no options"
    more = f" and {len(options) - MOST_LISTED} more" if len(options) > MOST_LISTED else ""
    verb = "is only" if len(options) == 1 else "are"
    return f"there {verb} {', '.join(options[:MOST_LISTED])}{more}"


def in_shell(text: str) -> str:
    """An argument as it is typed in a shell."""
    home = text.replace("$HOME", "")
    return shlex.quote(text) if IN_SHELL & set(home) else f'"{text}"'
