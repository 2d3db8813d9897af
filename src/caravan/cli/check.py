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
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from caravan.cli.schema import MOVED
from caravan.cli.signatures import RESERVED, did_you_mean, locate, takes
from caravan.encoding import adoption, read_encoding
from caravan.errors import InputError, first_line
from caravan.models.remote_code import SETTING, is_allowed
from caravan.retrieval.metrics import parse_measure

KeyPath = tuple[str | int, ...]
UNKNOWN = {"_target_": None}
"""Stands for a missing or unresolvable value; as a node, it is not validated again."""
CIRCULAR = "it refers to itself"
OBJECT = "a mapping with a _target_"
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
        self._found: dict[str, Mistake] = {}
        self.references: set[str] = set()
        self.values: dict[str, Any] = self._plain(cfg, ())
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
            name = values["_target_"]
            self.targets[path] = None
            try:
                self.targets[path] = None if name == UNKNOWN else locate(str(name))
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
        except OmegaConfBaseException as error:
            raw: Any = OmegaConf.to_container(parent, resolve=False)
            self._broken(key, str(raw[name]), error)
            return UNKNOWN
        if refers or referred:
            self.references.add(key)
        if not isinstance(value, DictConfig | ListConfig):
            return value
        if refers and referred:  # it may contain itself
            return UNKNOWN
        return self._plain(value, path, refers or referred)

    def _broken(self, key: str, raw: str, error: OmegaConfBaseException) -> None:
        """An interpolation without a value; one that refers to a broken value is left out."""
        text = first_line(error)
        lost = re.fullmatch("Interpolation key '(.+)' not found", text)
        if "Recursive interpolation" in text:
            if all(one.text != CIRCULAR for one in self._found.values()):
                self.add(key, CIRCULAR)
        elif lost is None and not isinstance(error, InterpolationToMissingValueError):
            reason = text.partition("raised while resolving interpolation: ")[2] or text
            self.add(key, f"it has no value: {reason}")
        elif lost and lost[1] in raw:
            self.add(key, f"${{{lost[1]}}} does not refer to a setting")

    def _validate(self, path: KeyPath, target: Any) -> None:
        """Validate the arguments of a node, or the keys of the root."""
        model, given = takes(target, node=bool(path)), self._at(path)
        if model is None:
            return
        places: dict[KeyPath, list[Any]] = {}
        try:
            data = json.dumps(given, ensure_ascii=False, default=str)
            valid = model.model_validate_json(data.encode(errors="replace"))
            for name, value in vars(valid).items() if path else ():
                # A mapping with the keys of a class would reach the target as a mapping.
                items = value if isinstance(value, list | tuple) else [value]
                if any(is_dataclass(one) or isinstance(one, BaseModel) for one in items):
                    self._no_object((*path, name.removeprefix("field_")))
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

    def _explain(self, path: KeyPath, errors: list[Any]) -> None:
        """Add the mistake of a key; the type of a union has an error for each of its members."""
        key, kinds, first = dotted(path), {one["type"] for one in errors}, errors[0]
        above, node = self._at(path[:-1]), path[:-1] in self.targets
        owner = above["_target_"] if node else dotted(path[:-1]) or "the config"
        value, text = first["input"], " or ".join(dict.fromkeys(map(_wanted, errors)))
        if first["type"] == "missing" and isinstance(above, list):  # of a tuple
            self.add(dotted(path[:-1]), "it has too few values")
        elif first["type"] == "missing":
            if above.get("_partial_") is not True and "_args_" not in above:
                self.add(key, f"{owner} needs it; give {key}=<value>")
        elif kinds & {"extra_forbidden", "unexpected_keyword_argument"}:
            names = self._neighbours(path)
            listed = f"; it takes {', '.join(sorted(names))}" if 0 < len(names) <= 12 else ""
            hint = self._meant(path, names | RESERVED.keys() if node else names) or listed
            self.add(key, f"{owner} has no setting {path[-1]!r}{hint}")
        elif isinstance(value, dict) and kinds & NO_OBJECT:
            self._no_object(path)
        elif isinstance(value, list) and kinds == {"needs_python_object"}:
            # A collection of objects is no value of JSON; its items must be nodes.
            if not all(isinstance(one, dict) and "_target_" in one for one in value):
                self.add(key, f"it must be {OBJECT}, or a list of these, not a list of values")
        elif kinds == {"value_error"} and text.startswith(f"{key}."):  # of a section's dataclass
            for problem in re.split(rf"; (?={re.escape(key)}\.)", text):
                inner, _, rest = problem.partition(" ")
                self.add(inner, f"it {rest}")
        elif kinds == {"value_error"}:
            self.add(key, f"it {text}; it is {value!r}")
        elif "string_type" in kinds and isinstance(value, bool | int | float):
            kind = "wrong" if isinstance(path[-1], int) else "unquoted"
            text = f"it must be {text}, not {value!r}; for a text put it into quotes"
            self.add(key, f"{text}: \"{key}='...'\"", kind)
        else:
            words = {dict: "a mapping", list: "a list", type(None): "null"}
            choices = [name for one in errors for name in re.findall(r"'([^']*)'", one["msg"])]
            near = did_you_mean(str(value), choices)
            hint = f"; did you mean {near}?" if near else ""
            self.add(key, f"it must be {text}, not {words.get(type(value), repr(value))}{hint}")

    def _no_object(self, path: KeyPath) -> None:
        """A mapping where a node is expected; it is empty if no option of a group is chosen."""
        key, empty = dotted(path), self._at(path) == {}
        hint = f"; give {key}=<option>" if empty else self._meant(path, self._neighbours(path))
        hint = hint or f"; give {key}._target_=<class>"
        text = f"it has no _target_, so no class is chosen{hint}"
        self.add(key, text, "missing" if empty else "wrong")

    def _neighbours(self, path: KeyPath) -> set[str]:
        """The keys that may be beside a key: those of the config, and arguments of a target."""
        model, keys = takes(self.targets.get(path[:-1]), node=False), self._at(path[:-1])
        names = {str(one.alias) for one in model.model_fields.values()} if model else set()
        return (names | {str(one) for one in keys}) - {str(path[-1]), *RESERVED}

    def _meant(self, path: KeyPath, names: set[str]) -> str:
        """A hint at the key that was meant: one of `names` beside it, or one elsewhere."""
        name = str(path[-1])
        if len(path) == 1 and name in MOVED:
            return f"; set {MOVED[name].format(self._at(path))}"
        if near := did_you_mean(name, names):
            return f"; did you mean {dotted((*path[:-1], near))}?"
        others = [one for one in _paths(self.values) if one[: len(path)] != path]
        elsewhere = {str(one[-1]): dotted(one) for one in others}
        near = did_you_mean(name, elsewhere, cutoff=0.8)
        return f"; did you mean {elsewhere[near]}?" if near else ""


def is_class(target: Any, *kinds: type) -> bool:
    """Whether a target is one of some classes, which may be protocols, or derived from one."""
    return isinstance(target, type) and not set(kinds).isdisjoint(target.__mro__)


def _wanted(error: Any) -> str:
    """The type or range that an error of pydantic names, as the end of "it must be"."""
    if error["type"] in NO_OBJECT:
        return OBJECT
    text = re.sub("^(Input|Value|List)( error,)? (should (be )?)?", "", error["msg"])
    text = text.split(" after validation")[0]
    text = text.replace("valid array", "list").replace("an object", "a mapping")
    return text.replace("None", "null")


def _place(loc: tuple[Any, ...], given: Any) -> KeyPath | None:
    """Where an error is, without types of a union that pydantic names; None inside of a node."""
    place: KeyPath = ()
    for part in loc:
        in_list = isinstance(given, list) and part in range(len(given))
        if in_list or (isinstance(given, dict) and part in given):
            given, place = given[part], (*place, part)
            if isinstance(given, dict) and "_target_" in given:
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
            kept = [f'"{one}"' if "(" in one else one for one in depths if depths[one] <= depth]
            fewer = f"'{key}measures=[{','.join(kept)}]' or " if kept else ""
            text = f"they need a depth of {deepest}, but the search returns k={depth}; set {fewer}"
            config.add(f"{key}measures", f"{text}index.k={deepest}")


def model_folder(config: Config, key: str, kind: str = "", setting: str = SETTING) -> None:
    """A model folder exists, has the right kind, and may run the remote code that it needs.

    Args:
        key: of its path; for a "retriever" also bm25, a run file (not in a search), or a list.
        kind: of the model; "" for any.
        setting: the key that allows remote code.
    """
    given, runs = config.get(key), kind == "retriever" and "model" not in config.values
    names = {f"{key}[{i}]": name for i, name in enumerate(given)} if isinstance(given, list) else {}
    for place, name in (names or {key: given}).items():
        of_each = place in config.references and config.get("collections")  # a run of each
        if name in (None, "bm25") or of_each:
            continue
        text, folder = "", Path(name)
        if not folder.exists():
            bm25 = did_you_mean(name, ["bm25"] if kind == "retriever" else [])
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
