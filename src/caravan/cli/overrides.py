"""Check one override of the command line before anything is composed.

Can Hydra parse it, does the group have the option, is the key one of this program? Where not, the
answer is a line to type instead.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from caravan.cli.schema import MOVED
from caravan.cli.signatures import did_you_mean

WHOLE = ("experiment", "sweep")
"""Groups whose options may set anything; null unless chosen."""
ALIASES = {
    **dict.fromkeys(("model", "encoder", "base_model", "network"), ("backbone", "retriever")),
    **dict.fromkeys(("dataset", "datamodule", "corpus", "collection"), ("data",)),
    **dict.fromkeys(("optim", "optimiser"), ("optimizer",)),
    **dict.fromkeys(("criterion", "objective"), ("loss",)),
    **dict.fromkeys(("adapter", "lora"), ("peft",)),
    **dict.fromkeys(("exp", "recipe"), ("experiment",)),
}
"""Names of other projects for groups and settings."""
MOST_LISTED = 20
"""Options that a message names."""


class Overrides:
    """The overrides of one primary config.

    Args:
        loader: Hydra's, of the config folders.
        name: the primary config, without .yaml.
        root: the dataclass of its root.
    """

    def __init__(self, loader: ConfigLoader, name: str, root: type) -> None:
        self.loader, self.name = loader, name
        self.known = [field.name for field in fields(root)]
        self.parser = OverridesParser.create(config_loader=loader)
        self._options: dict[str, list[str]] = {}

    def check(self, text: str) -> tuple[str | None, str | None]:
        """Check one override.

        Returns:
            What is wrong with it, and the override to continue with (None: without it).
        """
        try:
            override = self.parse(text)
        except HydraException as error:
            return self._unreadable(text, str(error)), None
        key, value = override.key_or_group, override.value()
        if key.startswith(("hydra.", "hydra/")) or override.is_delete():
            return None, text
        root = re.split(r"[.@/]", key)[0]
        if not self.is_group(text):
            meant = None if root in self.known else self._meant(key, value)
            if meant:
                return f"{self.name} has no setting {key!r}; did you mean {meant}?", None
            # An unknown key is added, so that the check of all keys suggests what was meant.
            return None, text if root in self.known else f"++{text.lstrip('+')}"
        if root not in self.known and root not in WHOLE:
            return f"{self.name} has no group {key!r}", None
        if text.startswith("+") and override.package is None and key == root:
            return f"write {text.lstrip('+')}, without +", text.lstrip("+")
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
            raise HydraException("nested too deeply" if deep else str(error)) from error

    def is_group(self, text: str) -> bool:
        """Whether an override chooses an option of a group."""
        return key_of(text) in WHOLE or bool(self.options(key_of(text)))

    def options(self, group: str) -> list[str]:
        """The options of a group and, as "folder/option", of the folders in it."""

        def below(path: str) -> Iterator[str]:
            for kind in (ObjectType.CONFIG, ObjectType.GROUP):
                for name in self.loader.get_group_options(path, kind, self.name):
                    if kind is ObjectType.CONFIG:
                        yield name
                    else:
                        yield from (f"{name}/{option}" for option in below(f"{path}/{name}"))

        if group not in self._options:
            self._options[group] = list(below(group))
        return self._options[group]

    def globbed(self, override: Override) -> list[str]:
        """The options that `group=glob(pattern)` matches; `*` does not match a slash."""
        value = override.value()
        if not isinstance(value, Glob):
            return []
        depths = {pattern.count("/") for pattern in value.include}
        options = self.options(override.key_or_group)
        return [name for name in value.filter(options) if name.count("/") in depths]

    def quoted(self, key: str, given: str) -> str | None:
        """An override whose value is the text as it was given; None where quotes do not help."""
        escaped = given.replace("'", "\\'")
        try:
            same = self.parse(f"{key}='{escaped}'").value() == given
        except HydraException:
            return None
        return f"{key}='{escaped}'" if same else None

    def _choice(self, text: str, key: str, value: Any) -> tuple[str | None, str | None]:
        """Whether the chosen options of a group are there."""
        options = self.options(key)
        if isinstance(value, dict):
            return f"{key} is a group; choose {key}=<option>, and set {key}.<setting>=<value>", None
        for name in map(str, value if isinstance(value, list) else [value]):
            if name in options:
                continue
            inside = [option for option in options if option.startswith(f"{name}/")]
            near = None if inside else did_you_mean(name, options)
            hint = f"did you mean {key}={near}?" if near else listed(inside or options)
            instead = f"{key}={near}" if near and key not in WHOLE else None
            return f"no {key} is called {'null' if value is None else name}; {hint}", instead
        return None, text

    def _meant(self, key: str, value: Any) -> str | None:
        """The choice that an unknown key stands for: model=bert means backbone=bert_base."""
        if not isinstance(value, str):
            return None
        if key in MOVED:
            return MOVED[key].format(value)
        groups = {name: self.options(name) for name in (*self.known, *WHOLE)}
        for group, options in groups.items():
            if value in options:
                return f"{group}={value}"
        alias = next((name for name in ALIASES.get(key, ()) if name in groups), None)
        if alias is None or not groups[alias]:
            return alias and f"{alias}={value}"
        starts = [option for option in groups[alias] if option.startswith(value)]
        near = starts[0] if starts else did_you_mean(value, groups[alias], cutoff=0.5)
        return f"{alias}={near or '<option>'}"

    def _unreadable(self, text: str, reason: str) -> str:
        """Why an override cannot be read, with the text to type instead."""
        name, equals, given = text.partition("=")
        if not equals:
            return "no setting; write key=value"
        reason = f"cannot be read: {reason.splitlines()[0]}"
        if given.startswith("~"):
            reason = "the shell does not expand ~ there"
            given = given.replace("~", "$HOME", 1)
        instead = self.quoted(name, given)
        if instead is None or given[:1] in "[{'\"" or "Error while evaluating" in reason:
            return reason
        special = set('"$`\\!') & set(instead.replace("$HOME", ""))
        typed = shlex.quote(instead) if special else f'"{instead}"'
        return f"{reason}; put it into quotes: {typed}"


def key_of(text: str) -> str:
    """The key or group of an override."""
    return re.split("[=@]", text.lstrip("+~"), maxsplit=1)[0]


def listed(options: list[str]) -> str:
    """The options of a group, in words."""
    if not options:
        return "the group has no options"
    more = f" and {len(options) - MOST_LISTED} more" if len(options) > MOST_LISTED else ""
    return (
        f"there {'are' if len(options) > 1 else 'is only'} {', '.join(options[:MOST_LISTED])}{more}"
    )
