"""Check a composed config: every mistake at once, each with its key and its remedy.

Each `_target_` is imported, and a pydantic model of its signature validates the arguments, so that
the classes of a user are checked as those of Caravan. The root and its sections are the dataclasses
of `caravan.cli.schema`. A class states its own constraints, as annotations (`Literal`,
`pydantic.PositiveInt`); rules between objects are in `caravan.cli.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ValidationError

from caravan.cli.schema import MOVED, Node
from caravan.cli.signatures import RESERVED, Takes, did_you_mean, locate, takes
from caravan.errors import InputError, first_line

CIRCULAR = "it refers to itself"
UNKNOWN = Node(None)
"""In the place of a value that is broken, or is checked where it stands."""
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """What is wrong at a place in the config, with its remedy.

    `kind` is "missing" (a `???` to fill in), "unquoted" (a number where a text is expected, such as
    the name 2024), "folder" (a file or folder that is not there, or not yet), or "wrong".
    """

    path: KeyPath
    text: str
    kind: str = "wrong"


def dotted(path: KeyPath) -> str:
    """A path as it is written on the command line."""
    words = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(words).lstrip(".")


class Checker:
    """Walks a config, and collects its mistakes and the targets of its nodes.

    Args:
        cfg: the config, its interpolations unresolved.
        root: the dataclass of its root.
    """

    def __init__(self, cfg: DictConfig, root: type) -> None:
        self.cfg, self.root = cfg, root
        self.found: list[Mistake] = []
        self.targets: dict[KeyPath, Any] = {}
        self._references: set[KeyPath] = set()
        self._mapping(cfg, (), takes(root, section=True), "the config")

    def mistakes(self) -> list[Mistake]:
        """What was found; a value that several keys refer to is reported once."""
        own = {_problem(one) for one in self.found if one.path not in self._references}
        return [
            one
            for one in dict.fromkeys(self.found)
            if one.path not in self._references or _problem(one) not in own
        ]

    def get(self, key: str) -> Any:
        """A value, or None where there is none, it is `???`, or its interpolation is broken."""
        try:
            return OmegaConf.select(self.cfg, key)
        except OmegaConfBaseException:
            return None

    def nodes(self, group: str | None = None) -> Iterator[tuple[KeyPath, Any, DictConfig]]:
        """(path, target, node) of all nodes, or of those that a key of the root holds."""
        for path, target in self.targets.items():
            if group in (None, path[0]):
                yield path, target, self.get(dotted(path))

    def is_a(self, group: str, kind: type | tuple[type, ...]) -> bool:
        """Whether a node of the root makes an object of a class, or of a subclass."""
        return is_class(self.targets.get((group,)), kind)

    def _add(self, path: KeyPath, text: str, kind: str = "wrong") -> None:
        self.found.append(Mistake(path, text, kind))

    def _mapping(
        self, node: DictConfig, path: KeyPath, wanted: Takes, owner: str
    ) -> dict[str, Any]:
        """Check the keys and values of a section, or of a node; returns its values."""
        given = {
            str(key): self._value(node, key, (*path, str(key)), wanted.hints.get(str(key)))
            for key in node
        }
        try:
            if wanted.model is not None:
                wanted.model.model_validate(given)
        except ValidationError as error:
            self._explain(error, path, given, wanted, owner)
        return given

    def _value(self, parent: Any, key: Any, path: KeyPath, hint: Any = None) -> Any:
        """A value as plain data, with `Node` where a node or a section is."""
        if OmegaConf.is_missing(parent, key):
            self._add(path, f"it is not set (???); give {dotted(path)}=<value>", "missing")
            return UNKNOWN
        try:
            value = parent[key]
        except InterpolationToMissingValueError:
            return UNKNOWN  # reported where the value stands
        except OmegaConfBaseException as error:
            self._broken(parent, key, path, error)
            return UNKNOWN
        refers = OmegaConf.is_interpolation(parent, key)
        if refers:
            self._references.add(path)
        if not isinstance(value, DictConfig | ListConfig):
            return value
        if refers:
            return UNKNOWN
        if isinstance(value, ListConfig):
            return [self._value(value, i, (*path, i)) for i in range(len(value))]
        if "_target_" in value.keys():  # noqa: SIM118  `in` denies what is ???
            return self._node(value, path)
        if isinstance(hint, type) and is_dataclass(hint):
            self._section(hint, value, path)
            return UNKNOWN
        return {str(name): self._value(value, name, (*path, str(name))) for name in value}

    def _node(self, node: DictConfig, path: KeyPath) -> Node:
        name, target, wanted = "", None, Takes()
        try:
            name = "" if OmegaConf.is_missing(node, "_target_") else str(node["_target_"])
            if name:
                target = locate(name)
                wanted = takes(target)
        except LookupError as error:
            self._add((*path, "_target_"), str(error))
        except OmegaConfBaseException:
            pass  # a broken interpolation, reported with the other keys
        self.targets[path] = target
        self._mapping(node, path, wanted, name)
        return Node(target)

    def _section(self, kind: type, value: DictConfig, path: KeyPath) -> None:
        """A section, and the constraints between its keys, which its dataclass checks."""
        before = len(self.found)
        given = self._mapping(value, path, takes(kind, section=True), dotted(path))
        if len(self.found) > before or UNKNOWN in given.values():
            return
        try:
            kind(**given)
        except InputError as error:
            for problem in re.split(rf"; (?={re.escape(dotted(path))}\.)", str(error)):
                key, _, text = problem.partition(" ")
                self._add(tuple(key.split(".")), f"it {text}")

    def _broken(
        self, node: DictConfig | ListConfig, key: Any, path: KeyPath, error: OmegaConfBaseException
    ) -> None:
        """An interpolation without a value; one that refers to a broken value is left out."""
        text = first_line(error)
        lost = re.fullmatch(r"Interpolation key '(.+)' not found", text)
        raw: Any = OmegaConf.to_container(node, resolve=False)
        if "Recursive interpolation" in text:
            if all(mistake.text != CIRCULAR for mistake in self.found):  # once for the whole circle
                self._add(path, CIRCULAR)
        elif lost is None:
            reason = text.partition("raised while resolving interpolation: ")[2] or text
            self._add(path, f"its value cannot be found: {reason}")
        elif lost[1] in str(raw[key]):
            near = did_you_mean(lost[1], _leaves(self.cfg, without=dotted(path)))
            hint = f"; did you mean ${{{near}}}?" if near else ""
            self._add(path, f"${{{lost[1]}}} refers to no setting{hint}")

    def _explain(
        self,
        error: ValidationError,
        path: KeyPath,
        given: dict[str, Any],
        wanted: Takes,
        owner: str,
    ) -> None:
        """Mistakes for the errors of pydantic."""
        problems: dict[KeyPath, list[Any]] = {}
        for one in error.errors(include_url=False):
            name, inner = str(one["loc"][0]), (*path, str(one["loc"][0]))
            if isinstance(one["input"], Node):
                continue
            if one["type"] == "extra_forbidden":
                self._add(
                    inner, f"{owner} has no setting {name!r}{self._meant(inner, given, wanted)}"
                )
            elif one["type"] != "missing":
                problems.setdefault(_place(path, one["loc"], given), []).append(one)
            elif "_target_" not in given:
                self._add(inner, f"it is removed, but needed; leave ~{dotted(inner)} out")
            elif given.get("_partial_") is not True and "_args_" not in given:
                self._add(path, f"{owner} needs {name!r}; give {dotted(inner)}=<value>")
        for place, ones in problems.items():
            if not any(
                len(place) < len(other) and other[: len(place)] == place for other in problems
            ):
                self.found.append(self._mistake(place, ones))

    def _mistake(self, path: KeyPath, ones: list[Any]) -> Mistake:
        """One mistake for a value; a union has an error for each of its types."""
        value, kinds = ones[0]["input"], {one["type"] for one in ones}
        if isinstance(value, dict):
            if not value:
                text = f"nothing is chosen; give {dotted(path)}=<option>"
                return Mistake(path, text, "missing")
            if kinds & {"value_error", "is_instance_of", "dataclass_exact_type"}:
                return Mistake(path, f"it has no _target_{self._sibling(path)}")
        text = " or ".join(dict.fromkeys(map(_wanted, ones)))
        if kinds == {"value_error"}:
            return Mistake(path, f"it {text}; it is {value!r}")
        words = {dict: "a mapping", list: "a list", type(None): "null"}
        text = f"it must be {text}, not {words.get(type(value)) or repr(value)}"
        choices = [name for one in ones for name in re.findall(r"'([^']*)'", one["msg"])]
        near = did_you_mean(str(value), choices)
        if near:
            return Mistake(path, f"{text}; did you mean {near}?")
        if "string_type" in kinds and isinstance(value, bool | int | float | None):
            in_list = isinstance(path[-1], int)
            example = f"{dotted(path[:-1])}=['...']" if in_list else f"{dotted(path)}='...'"
            kind = "wrong" if value is None or in_list else "unquoted"
            return Mistake(path, f'{text}; for a text put it into quotes: "{example}"', kind)
        if kinds & {"list_type", "tuple_type", "sequence_str"} and not isinstance(value, dict):
            return Mistake(path, f"{text}; write [{value}]")
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            return Mistake(path, f"{text}; write {value:.0f}")
        return Mistake(path, text)

    def _meant(self, path: KeyPath, given: dict[str, Any], wanted: Takes) -> str:
        """A hint at the key that was meant: a neighbour, or one of that name elsewhere."""
        if path[0] in MOVED and len(path) == 1:
            return f"; set {MOVED[str(path[0])].format(given[str(path[0])])}"
        near = did_you_mean(str(path[-1]), [*wanted.hints, *RESERVED])
        if near is not None:
            inner, value = (*path[:-1], near), given[str(path[-1])]
            while isinstance(value, dict) and len(value) == 1:
                ((name, value),) = value.items()
                inner = (*inner, name)
            return f"; did you mean {dotted(inner)}?"
        others = _leaves(self.cfg, without=dotted(path))
        elsewhere = {leaf.rpartition(".")[2]: leaf for leaf in others}
        near = did_you_mean(str(path[-1]), elsewhere, cutoff=0.8)
        if near is not None:
            return f"; did you mean {elsewhere[near]}?"
        return f"; it takes {', '.join(wanted.hints)}" if 0 < len(wanted.hints) <= 12 else ""

    def _sibling(self, path: KeyPath) -> str:
        """A hint at a neighbour of nearly the same name."""
        above: Any = self.get(dotted(path[:-1])) if len(path) > 1 else self.cfg
        others = [str(key) for key in above if key != path[-1]]
        near = did_you_mean(str(path[-1]), others)
        if near:
            return f"; did you mean {dotted((*path[:-1], near))}?"
        remedy = "=<option>" if len(path) == 1 else "._target_=<class>"
        return f", so no class is chosen; give {dotted(path)}{remedy}"


def is_class(target: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a target is a class, or a subclass of it."""
    return isinstance(target, type) and issubclass(target, kind)


def _wanted(error: Any) -> str:
    """The type or range that an error of pydantic names, as the end of "it must be"."""
    text = re.sub(r"^(Input|String|Value|List|Tuple)( error,)? (should (be )?)?", "", error["msg"])
    return text.split(", unable to")[0].split(", got a")[0].replace("None", "null")


def _place(path: KeyPath, loc: tuple[Any, ...], given: Any) -> KeyPath:
    """The path of an error, without the types of a union that pydantic names in it."""
    for part in loc:
        inside = isinstance(given, dict) and part in given
        if inside or (isinstance(given, list) and part in range(len(given))):
            given, path = given[part], (*path, part)
    return path


def _problem(mistake: Mistake) -> str:
    return mistake.text.partition("; ")[0]


def _leaves(cfg: DictConfig, without: str = "") -> list[str]:
    """The dotted names of all keys in a config, except for the key `without` and its inside."""

    def below(tree: Any, path: tuple[str, ...]) -> Iterator[str]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                name = ".".join((*path, str(key)))
                if name != without:
                    yield name
                    yield from below(value, (*path, str(key)))

    return list(below(OmegaConf.to_container(cfg, resolve=False), ()))
