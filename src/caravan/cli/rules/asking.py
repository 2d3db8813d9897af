"""How a rule asks a composed config: for values, mappings, and what a retriever names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caravan.cli.checking.signatures import signature
from caravan.cli.checking.walk import Mistake
from caravan.cli.checking.walk import Path as KeyPath

Rule = Callable[[DictConfig], Iterator[Mistake]]


def value(cfg: DictConfig, place: str) -> Any:
    """A value, or None where there is none, it is `???`, or its interpolation is broken."""
    try:
        return OmegaConf.select(cfg, place)
    except OmegaConfBaseException:
        return None


def is_number(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool)


def mappings(node: Any, path: KeyPath) -> Iterator[tuple[KeyPath, DictConfig]]:
    """A mapping and all mappings in it, those behind interpolations left out."""
    if not isinstance(node, DictConfig):
        return
    yield path, node
    for key in map(str, node):
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            yield from mappings(node.get(key), (*path, key))


def listed(node: DictConfig, key: str) -> list[str]:
    """The texts of a list, empty where there is none."""
    given = value(node, key)
    return (
        [text for text in given if isinstance(text, str)] if isinstance(given, ListConfig) else []
    )


def given_or_default(node: DictConfig, name: str) -> Any:
    """An argument as the config gives it, else the default of what `_target_` names."""
    given = value(node, name)
    if given is not None:
        return given
    try:
        parameter = signature(str(value(node, "_target_"))).parameters[name]
    except LookupError:
        return None
    return getattr(parameter.default, "value", None)


def retrievers(cfg: DictConfig) -> list[Any]:
    """What `retriever` names."""
    given = value(cfg, "retriever")
    return list(given) if isinstance(given, ListConfig) else [given]


def place_of_retriever(cfg: DictConfig) -> KeyPath:
    """Where the user has said what searches: search has a shorter word for it."""
    shorter = "model" in cfg and OmegaConf.is_interpolation(cfg, "retriever")
    return ("model",) if shorter else ("retriever",)
