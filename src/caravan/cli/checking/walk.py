"""Walk a composed config and find every mistake in it, from the root to the last argument.

The root and its sections are dataclasses, every other node names what it is for by `_target_`; both
have signatures, so one walk compares keys and values with them. In a root dataclass the annotation
`Node` asks for a node with a `_target_`, `OptionalNode` allows null and `NamedNode` a name as well,
`Nodes` is a mapping of names to nodes, a dataclass is a section. A mapping without `_target_` is
wrong wherever no annotation asks for one: that is how a typo in an experiment file shows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from caravan.cli.checking.annotations import (
    Kind,
    kinds,
    mismatch,
    remedy,
    takes_mapping,
)
from caravan.cli.checking.definitions import did_you_mean, resolve
from caravan.cli.checking.signatures import Parameter, Signature, is_dataclass, signature

RESERVED = {
    "_target_": (Kind("str"),),
    "_partial_": (Kind("bool"),),
    "_recursive_": (Kind("bool"),),
    "_args_": (Kind("sequence"),),
    "_convert_": (Kind("literal", values=("none", "partial", "object", "all")),),
}
CIRCULAR = "it refers to itself"
MARKERS = {
    "Node": (Kind("node"),),
    "OptionalNode": (Kind("node"), Kind("none")),
    "NamedNode": (Kind("node"), Kind("str")),
    "Nodes": (Kind("nodes"),),
}
NAMES = (Kind("str"), Kind("sequence", inner=ast.Name("str"), scope="builtins"), Kind("none"))
"""What the annotation `Names` allows: a name, a list of names, or null, which a rule checks."""
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """What is wrong at a place in the config, with its remedy.

    `kind` tells apart what is treated differently: "missing" (a `???` left to fill in),
    "folder" (a path that is not there) and "unquoted" (a number where a text is wanted, such as the
    name 2024); all else is "wrong".
    """

    path: Path
    text: str
    kind: str = "wrong"


def dotted(path: Path) -> str:
    """A path as it is written on the command line."""
    words = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(words).lstrip(".")


def mistakes(cfg: DictConfig, root: type) -> list[Mistake]:
    """Every mistake of keys, types, targets, `???` and interpolations in a config.

    Args:
        cfg: the config, its interpolations unresolved.
        root: the dataclass that says what the root may hold.
    """
    walk = _Walk(cfg)
    walk.mapping(cfg, (), signature(f"{root.__module__}.{root.__qualname__}"), "the config", True)
    return walk.found


class _Walk:
    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.found: list[Mistake] = []

    def add(self, path: Path, text: str, kind: str = "wrong") -> None:
        mistake = Mistake(path, text, kind)
        if mistake not in self.found:
            self.found.append(mistake)

    def mapping(
        self, node: DictConfig, path: Path, takes: Signature, owner: str, schema: bool
    ) -> None:
        """Compare the keys of a mapping with a signature, and go on into their values."""
        for key in node:
            inner = (*path, str(key))
            parameter = takes.parameters.get(str(key))
            if not schema and key in RESERVED:
                self.entry(node, key, inner, RESERVED[str(key)])
            elif parameter is not None:
                self.entry(node, key, inner, _alternatives(parameter, schema), schema)
            elif takes.open:
                self.entry(node, key, inner, (Kind("any"),))
            else:
                what = "setting" if schema else "argument"
                hint = self.meant(node, str(key), path, takes)
                self.add(inner, f"{owner} has no {what} {key!r}{hint}")
        there = set(map(str, node.keys()))
        for name in takes.parameters if schema else ():
            if name not in there:
                inner = (*path, name)
                self.add(inner, f"it is removed, but needed; leave ~{dotted(inner)} out")

    def meant(self, node: DictConfig, key: str, path: Path, takes: Signature) -> str:
        """A hint at the key that was meant: a neighbour, or one of that name elsewhere."""
        near = did_you_mean(key, [*takes.parameters, *RESERVED])
        if near is not None:
            inner, value = (*path, near), _plain(node, key)
            while isinstance(value, DictConfig) and len(value) == 1:
                name = str(next(iter(value)))
                inner, value = (*inner, name), _plain(value, name)
            return f"; did you mean {dotted(inner)}?"
        own = dotted((*path, key))
        elsewhere = {leaf.rpartition(".")[2]: leaf for leaf in _leaves(self.cfg, without=own)}
        near = did_you_mean(key, elsewhere, cutoff=0.8)
        if near is not None:
            return f"; did you mean {elsewhere[near]}?"
        if 0 < len(takes.parameters) <= 12:
            return f"; it takes {', '.join(takes.parameters)}"
        return ""

    def entry(
        self,
        node: DictConfig | ListConfig,
        key: Any,
        path: Path,
        alternatives: tuple[Kind, ...],
        written: bool = False,
    ) -> None:
        """Check one value of a mapping or list against what may stand there."""
        if OmegaConf.is_missing(node, key):
            self.add(path, f"it is not set (???); give {dotted(path)}=<value>", "missing")
            return
        try:
            value = node[key]
        except InterpolationToMissingValueError:
            return  # what it refers to is reported where it stands
        except OmegaConfBaseException as error:
            self.broken(node, key, path, error)
            return
        refers = OmegaConf.is_interpolation(node, key)
        if isinstance(value, DictConfig):
            self.inside(value, path, alternatives, refers)
        elif isinstance(value, ListConfig):
            self.elements(value, path, alternatives, refers)
        else:
            self.scalar(value, path, alternatives, written)

    def broken(
        self, node: DictConfig | ListConfig, key: Any, path: Path, error: OmegaConfBaseException
    ) -> None:
        text = str(error).splitlines()[0]
        lost = re.fullmatch(r"Interpolation key '(.+)' not found", text)
        if "Recursive interpolation" in text:
            if all(mistake.text != CIRCULAR for mistake in self.found):  # once for the whole circle
                self.add(path, CIRCULAR)
        elif lost is None:
            reason = text.partition("raised while resolving interpolation: ")[2] or text
            self.add(path, f"its value cannot be found: {reason}")
        elif lost[1] in _raw(node, key):
            near = did_you_mean(lost[1], _leaves(self.cfg, without=dotted(path)))
            hint = f"; did you mean ${{{near}}}?" if near else ""
            self.add(path, f"${{{lost[1]}}} refers to no setting{hint}")
        # else it refers to a value that is broken, which is reported where it stands

    def inside(
        self, value: DictConfig, path: Path, alternatives: tuple[Kind, ...], refers: bool
    ) -> None:
        """A mapping: a node, a section, named nodes, or plain data where that is asked for."""
        if "_target_" in value.keys():  # noqa: SIM118  `in` denies what is ???
            if not refers:
                self.target(value, path)
            return
        wanted = {kind.name: kind for kind in alternatives}
        plain = takes_mapping(alternatives)
        if "section" in wanted:
            section = ast.unparse(wanted["section"].inner or ast.Constant(""))
            takes = signature(f"{wanted['section'].scope}.{section}")
            self.mapping(value, path, takes, dotted(path), True)
        elif "nodes" in wanted:
            for key in value:
                self.entry(value, key, (*path, str(key)), MARKERS["OptionalNode"])
        elif plain is not None:
            if not refers:
                for key in value:
                    self.entry(value, key, (*path, str(key)), kinds(plain.inner, plain.scope))
        elif not value and "node" in wanted:
            hint = " or null" if "none" in wanted else ""
            self.add(path, f"nothing is chosen; give {dotted(path)}=<option>{hint}", "missing")
        elif {"node", "class"} & wanted.keys():
            self.add(path, f"it has no _target_{self.sibling(path)}")
        else:
            self.add(path, f"it must be {mismatch({}, alternatives)}, not a mapping")

    def sibling(self, path: Path) -> str:
        """A hint at a neighbour of nearly the same name."""
        above: Any = self.cfg
        for part in path[:-1]:
            above = above[part]
        others = [str(key) for key in above if key != path[-1]] if _is_mapping(above) else []
        near = did_you_mean(str(path[-1]), others)
        if near:
            return f"; did you mean {dotted((*path[:-1], near))}?"
        if len(path) == 1:
            return f", so no class is chosen; give {path[0]}=<option>"
        return f", so no class is chosen; give {dotted(path)}._target_=<class>"

    def elements(
        self, value: ListConfig, path: Path, alternatives: tuple[Kind, ...], refers: bool
    ) -> None:
        lists = [kind for kind in alternatives if kind.name in ("sequence", "any", "class")]
        if not lists:
            self.add(path, f"it must be {mismatch([], alternatives)}, not a list")
        elif not refers:
            inner: list[Kind] = []
            for one in lists:
                inner += [one] if one.name == "class" else kinds(one.inner, one.scope)
            for i in range(len(value)):
                self.entry(value, i, (*path, i), tuple(inner))

    def scalar(self, value: Any, path: Path, alternatives: tuple[Kind, ...], written: bool) -> None:
        wanted = mismatch(value, alternatives, written)
        if wanted is None:
            return
        names = [str(choice) for kind in alternatives for choice in kind.values]
        near = did_you_mean(str(value), names)
        given = "null" if value is None else repr(value)
        text = f"it must be {wanted}, not {given}"
        if near:
            self.add(path, f"{text}; did you mean {near}?")
        elif not isinstance(value, str) and any(kind.name == "str" for kind in alternatives):
            of_list = isinstance(path[-1], int)
            example = f"{dotted(path[:-1])}=['...']" if of_list else f"{dotted(path)}='...'"
            hint = f'for a text put it into quotes: "{example}"'
            self.add(path, f"{text}; {hint}", "wrong" if value is None else "unquoted")
        else:
            hint = remedy(value, alternatives)
            self.add(path, text + (f"; {hint}" if hint else ""))

    def target(self, node: DictConfig, path: Path) -> None:
        """A node with `_target_`: its keys are the arguments of what it names."""
        takes, name = Signature("", open=True), ""
        if not OmegaConf.is_missing(node, "_target_"):
            try:
                name = str(node["_target_"])
                takes = signature(name)
            except LookupError as error:
                self.add((*path, "_target_"), str(error))
            except OmegaConfBaseException:
                pass  # a broken interpolation, reported with the other keys
        self.mapping(node, path, takes, name, False)
        given = list(node.keys())
        if _plain(node, "_partial_") is True or "_args_" in given:
            return
        for parameter in takes.parameters.values():
            if parameter.required and parameter.name not in given:
                inner = dotted((*path, parameter.name))
                self.add(path, f"{name} needs {parameter.name!r}; give {inner}=<value>")


def _alternatives(parameter: Parameter, schema: bool) -> tuple[Kind, ...]:
    """What may be given for a parameter."""
    annotation = parameter.annotation
    if schema and isinstance(annotation, ast.Name):
        if annotation.id in MARKERS:
            return MARKERS[annotation.id]
        if annotation.id == "Names":
            return NAMES
        found = resolve(parameter.scope, annotation)
        if found is not None and is_dataclass(found.node):
            name = ast.Name(getattr(found.node, "name", annotation.id), ast.Load())
            return (Kind("section", inner=name, scope=found.module),)
    allowed = kinds(annotation, parameter.scope)
    return (*allowed, Kind("none")) if parameter.takes_none else allowed


def _is_mapping(value: Any) -> bool:
    return isinstance(value, DictConfig)


def _plain(node: DictConfig, key: str) -> Any:
    try:
        return node.get(key)
    except OmegaConfBaseException:
        return None


def _raw(node: DictConfig | ListConfig, key: Any) -> str:
    """A value as it is written, interpolations and all."""
    tree: Any = OmegaConf.to_container(node, resolve=False)
    return str(tree[key])


def _leaves(cfg: DictConfig, without: str = "") -> list[str]:
    """The dotted names of all keys in a config, but for the key `without` and what is in it."""

    def below(tree: Any, path: tuple[str, ...]) -> Iterator[str]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                name = ".".join((*path, str(key)))
                if name != without:
                    yield name
                    yield from below(value, (*path, str(key)))

    return list(below(OmegaConf.to_container(cfg, resolve=False), ()))
