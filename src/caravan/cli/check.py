"""Check a composed config: every mistake at once, each with its key and its remedy.

Each `_target_` is imported, and a pydantic model of its signature validates the arguments, so that
the classes of a user are checked as those of Caravan. The root and its sections are the dataclasses
of `caravan.cli.schema`. A class states its own constraints, as annotations (`Literal`,
`pydantic.PositiveInt`); rules between objects are in `caravan.cli.train` and `.evaluate`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ValidationError

from caravan.cli.signatures import did_you_mean, locate, takes, takes_object
from caravan.encoding import adoption, read_encoding
from caravan.errors import InputError, first_line
from caravan.models.remote_code import SETTING, is_allowed
from caravan.retrieval.metrics import parse_measure

KeyPath = tuple[str | int, ...]
UNKNOWN = {"_target_": None}
"""Stands for a missing or unresolvable value; as a node, it is not validated again."""
NO_OBJECT = {"no_object", "needs_python_object", "callable_type"}
"""Types of pydantic's errors where an object is expected, which JSON cannot have."""


@dataclass(frozen=True)
class Mistake:
    """An error in a key of the config, and how to fix it.

    `kind` is "missing" (a `???` to fill in), "unquoted" (a number where a text is expected, such as
    the name 2024), "folder" (a file or folder that does not exist, or not yet), or "wrong".
    """

    key: str
    text: str
    kind: str = "wrong"


def dotted(path: KeyPath) -> str:
    """A path as it is written on the command line."""
    words = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(words).removeprefix(".")


class Config:
    """A composed config as plain data, with its mistakes.

    Args:
        cfg: the config, its interpolations unresolved.
        root: the dataclass of its root.

    Attributes:
        values: plain data, with `UNKNOWN` for what is missing or cannot be resolved.
        targets: the class or function of each node, None where it cannot be imported.
        references: the keys whose values are interpolations.
    """

    def __init__(self, cfg: DictConfig, root: type) -> None:
        self.targets: dict[KeyPath, Any] = {}
        self.references: set[str] = set()
        self._found: dict[str, Mistake] = {}
        self._unresolved: dict[str, tuple[str, str]] = {}  # raw text, and why it has no value
        self.values: dict[str, Any] = self._plain(cfg, ())
        self._add_unresolved()
        for path, target in {(): root, **self.targets}.items():
            self._validate(path, target)

    @property
    def mistakes(self) -> list[Mistake]:
        """What was found; mistakes in references are left out if there are others."""
        own = [one for key, one in self._found.items() if key not in self.references]
        return own or list(self._found.values())

    def add(self, key: str, text: str, kind: str = "wrong") -> None:
        """Add a mistake, unless the key has one."""
        self._found.setdefault(key, Mistake(key, text, kind))

    def get(self, key: str) -> Any:
        """A value as plain data; None where there is none, or where something is wrong with it."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        wrong = any(re.match(rf"{re.escape(key)}\b", other) for other in self._found)
        return None if wrong or value == UNKNOWN else value

    def nodes(self, group: str | None = None) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """(key, target, values) of all nodes, or of those that a key of the root holds."""
        for path, target in self.targets.items():
            if group in (None, path[0]):
                yield dotted(path), target, self._at(path)

    def is_a(self, group: str, *kinds: type) -> bool:
        """Whether a node of the root makes an object of a class, or of a subclass."""
        return is_class(self.targets.get((group,)), *kinds)

    def _at(self, path: KeyPath) -> Any:
        value: Any = self.values
        for part in path:
            value = value[part]
        return value

    def _plain(self, node: Any, path: KeyPath, referred: bool = False) -> Any:
        """A container as plain data; collects its nodes and what cannot be resolved."""
        if isinstance(node, ListConfig):
            return [self._value(node, i, (*path, i), referred) for i in range(len(node))]
        values = {str(key): self._value(node, key, (*path, str(key)), referred) for key in node}
        if "_target_" in values and path and not referred:
            self.targets[path] = None
            try:
                if values["_target_"] != UNKNOWN:
                    self.targets[path] = locate(str(values["_target_"]))
            except LookupError as error:
                self.add(dotted((*path, "_target_")), str(error))
        return values

    def _value(self, parent: Any, name: Any, path: KeyPath, referred: bool) -> Any:
        key, refers = dotted(path), OmegaConf.is_interpolation(parent, name)
        if OmegaConf.is_missing(parent, name):
            self.add(key, f"it is not set (???); give {key}=<value>", "missing")
            return UNKNOWN
        try:
            value = parent[name]
        except InterpolationToMissingValueError:
            return UNKNOWN  # the missing value is a mistake itself
        except OmegaConfBaseException as error:
            raw: Any = OmegaConf.to_container(parent, resolve=False)
            self._unresolved[key] = str(raw[name]), first_line(error)
            return UNKNOWN
        if refers or referred:
            self.references.add(key)
        if not isinstance(value, DictConfig | ListConfig):
            return value
        if refers and referred:  # it may contain itself
            return UNKNOWN
        return self._plain(value, path, refers or referred)

    def _add_unresolved(self) -> None:
        """Add interpolations without a value, but not those that only refer to another of them."""

        def refers(key: str) -> bool:
            return any(f"${{{other}" in self._unresolved[key][0] for other in self._unresolved)

        reasons = set()
        for key in sorted(self._unresolved, key=refers):
            raw, why = self._unresolved[key]
            if not refers(key) or why not in reasons:  # in a circle, all of them refer to others
                self.add(key, f"{raw} has no value: {why}")
            reasons.add(why)

    def _validate(self, path: KeyPath, target: Any) -> None:
        """Validate the arguments of a node, or the keys of the root."""
        model, given = takes(target), self._at(path)
        if model is None:
            return
        places: dict[KeyPath, list[Any]] = {}
        try:
            data = json.dumps(given, ensure_ascii=False, default=str)
            model.model_validate_json(data.encode(errors="replace"))
        except ValidationError as error:
            for one in error.errors(include_url=False):
                place = _place(one["loc"], given)
                if place is not None:
                    last = one["loc"][-1:] if one["type"] == "missing" else ()
                    places.setdefault((*path, *place, *last), []).append(one)
        for place, errors in places.items():
            inside = any(other != place and other[: len(place)] == place for other in places)
            if not inside:
                self._explain(place, errors)
        for field in model.model_fields.values() if path else ():
            # pydantic accepts a mapping for a dataclass, but it reaches the target as a mapping.
            value = given.get(field.alias)
            items = value if isinstance(value, list) else [value]
            plain = any(isinstance(one, dict) and not _is_node(one) for one in items)
            if plain and takes_object(field.annotation):
                self._no_object((*path, str(field.alias)))

    def _explain(self, path: KeyPath, errors: list[Any]) -> None:
        """Add the mistake of a key; the type of a union has an error for each of its members."""
        key, types, value = dotted(path), {one["type"] for one in errors}, errors[0]["input"]
        above, owner = self._at(path[:-1]), dotted(path[:-1]) or "the config"
        if path[:-1] in self.targets:
            owner = above["_target_"]
        if "missing" in types:
            given = above if isinstance(above, dict) else {}
            if given.get("_partial_") is not True and "_args_" not in given:
                self.add(key, f"{owner} needs it; give {key}=<value>")
        elif types & {"extra_forbidden", "unexpected_keyword_argument"}:
            self.add(key, f"{owner} has no setting {path[-1]!r}{self._meant(path)}")
        elif types & NO_OBJECT and isinstance(value, dict):
            self._no_object(path)
        elif not (types & NO_OBJECT and isinstance(value, list) and all(map(_is_node, value))):
            # A collection of objects is no value of JSON.
            self._explain_value(path, errors)

    def _no_object(self, path: KeyPath) -> None:
        """A mapping where an object is expected; it is empty if no option of a group is chosen."""
        key = dotted(path)
        hint = self._meant(path) or f"; give {key}=<option> or {key}._target_=<class>"
        kind = "wrong" if self._at(path) else "missing"
        self.add(key, f"it has no _target_, so no class is chosen{hint}", kind)

    def _explain_value(self, path: KeyPath, errors: list[Any]) -> None:
        """Add the mistake in a value: its type, its range, or what a validator of a class says."""
        key, value = dotted(path), errors[0]["input"]
        objects = dict.fromkeys(NO_OBJECT, "Input should be an object, with a _target_")
        wanted = [objects.get(one["type"], one["msg"]) for one in errors]
        text = " or ".join(dict.fromkeys(wanted)).removeprefix("Value error, ")
        number = isinstance(value, bool | int | float)
        if text.startswith(f"{key}."):  # the class of a section names the keys itself
            for problem in re.split(rf"; (?={re.escape(key)}\.)", text):
                inner, _, rest = problem.partition(" ")
                self.add(inner, f"it {rest}")
        elif number and any(one["type"] == "string_type" for one in errors):
            kind = "wrong" if isinstance(path[-1], int) else "unquoted"
            hint = f"put a text into quotes: \"{key}='...'\""
            self.add(key, f"{text}, not {value!r}; {hint}", kind)
        else:
            near = did_you_mean(str(value), re.findall(r"'([^']*)'", text))
            self.add(key, f"{text}, not {value!r}" + (f"; did you mean {near}?" if near else ""))

    def _meant(self, path: KeyPath) -> str:
        """A hint at the key that was meant: one beside it, or one elsewhere."""
        *_, name = path
        model = takes(self.targets.get(path[:-1]))
        beside = {str(one.alias) for one in model.model_fields.values()} if model else set()
        beside |= {str(one) for one in self._at(path[:-1])}
        beside.discard(str(name))
        if near := did_you_mean(str(name), beside):
            return f"; did you mean {dotted((*path[:-1], near))}?"
        others = [one for one in _paths(self.values) if one[: len(path)] != path]
        elsewhere = {str(one[-1]): dotted(one) for one in others}
        near = did_you_mean(str(name), elsewhere, cutoff=0.8)
        return f"; did you mean {elsewhere[near]}?" if near else ""


def is_class(target: Any, *kinds: type) -> bool:
    """Whether a target is one of some classes, which may be protocols, or derived from one."""
    return isinstance(target, type) and not set(kinds).isdisjoint(target.__mro__)


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _place(loc: tuple[Any, ...], given: Any) -> KeyPath | None:
    """Where an error is, without types of a union that pydantic names; None inside of a node."""
    place: KeyPath = ()
    for part in loc:
        in_list = isinstance(given, list) and part in range(len(given))
        if in_list or (isinstance(given, dict) and part in given):
            given, place = given[part], (*place, part)
            if _is_node(given):
                return None
    return place


def _paths(tree: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths of all keys in plain data."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*path, key)
        yield from _paths(value, (*path, key))


Rule = Callable[[Config], None]
"""A rule between objects, which no signature can state; see `RULES` of `.train` and `.evaluate`.

It reads values with `config.get`, classes with `config.is_a` (also subclasses), and calls `add`.
"""


def measures_are_computed(config: Config) -> None:
    """Measures are known, and the search is deep enough: R@1000 of 100 results would be R@100."""
    if config.get("index") and "k" not in config.values["index"]:
        config.add("index.k", "it is needed; give index.k=<depth>")
    for key in ("", *(f"{key}." for key, _, node in config.nodes() if "measures" in node)):
        depths: dict[str, int] = {}
        for i, measure in enumerate(config.get(f"{key}measures") or ()):
            try:
                depths[measure] = parse_measure(measure)["cutoff"]
            except InputError as error:
                config.add(f"{key}measures[{i}]", str(error))
        depth, deepest = config.get(f"{key}index.k"), max(depths.values(), default=0)
        if depth is not None and depth < deepest:
            text = f"they need a depth of {deepest}, but the search returns k={depth}"
            config.add(f"{key}measures", f"{text}; set index.k={deepest}")


def model_folder(config: Config, key: str, kind: str = "", setting: str = SETTING) -> None:
    """A model folder exists, has the right kind, and may run the remote code that it needs.

    Args:
        key: of its path; for a "retriever" also bm25, a run file, or a list.
        kind: of the model; "" for any.
        setting: the key that allows remote code.
    """
    given, runs = config.get(key), kind == "retriever"
    names = {f"{key}[{i}]": name for i, name in enumerate(given)} if isinstance(given, list) else {}
    for place, name in (names or {key: given}).items():
        of_each = place in config.references and config.get("collections")  # a run of each
        if name in (None, "bm25") or of_each:
            continue
        text, folder = "", Path(name)
        if not folder.exists():
            bm25 = did_you_mean(name, ["bm25"] if runs else [])
            near = bm25 or neighbour(folder)
            hint = f"; did you mean {near}?" if near else adoption(name)
            text = f"there is no folder {'or run file ' if runs else ''}{name}{hint}"
        elif folder.is_file():
            if not runs:
                text = f"{name} is a file; give the model folder of a {kind or 'training'}"
        else:
            try:
                encoding, facts = read_encoding(folder)
                is_allowed(folder, encoding, facts, config.get(setting) is True)
                if kind not in ("", encoding.kind):
                    text = f"{name} is a {encoding.kind}; give the folder of a {kind}"
            except InputError as error:
                text = str(error)
        if text:
            config.add(place, text, "folder")


def neighbour(path: Path) -> str | None:
    """The existing path that is most like one that does not exist."""
    while not path.parent.is_dir():
        path = path.parent
    near = did_you_mean(path.name, [one.name for one in path.parent.iterdir()])
    return str(path.parent / near) if near else None
