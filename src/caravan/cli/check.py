"""Check a composed config: every mistake at once, each with its key and its remedy.

Each `_target_` is imported, and a pydantic model of its signature validates the arguments, so that
the classes of a user are checked as those of Caravan. The root and its sections are the dataclasses
of `caravan.cli.schema`. A class states its own constraints, as annotations (`Literal`,
`pydantic.PositiveInt`); rules between objects are in `caravan.cli.train` and `.evaluate`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ValidationError

from caravan.cli.schema import MOVED, Node
from caravan.cli.signatures import RESERVED, did_you_mean, locate, takes
from caravan.cli.sources import KeyPath, dotted
from caravan.encoding import adoption, read_encoding
from caravan.errors import InputError, first_line
from caravan.models.remote_code import FACT, SETTING
from caravan.retrieval.metrics import parse_measure

CIRCULAR = "it refers to itself"
UNKNOWN = Node(None)
"""In the place of a value that is broken, or is checked where it stands."""
CLASS_ERRORS = {"value_error", "is_instance_of", "dataclass_exact_type", "model_type"}


@dataclass(frozen=True)
class Mistake:
    """What is wrong at a place in the config, with its remedy.

    `kind` is "missing" (a `???` to fill in), "unquoted" (a number where a text is expected, such as
    the name 2024), "folder" (a file or folder that is not there, or not yet), or "wrong".
    """

    path: KeyPath
    text: str
    kind: str = "wrong"


class Checker:
    """Walks a config, and collects its mistakes and the targets of its nodes.

    Args:
        cfg: the config, its interpolations unresolved.
        root: the dataclass of its root.
    """

    def __init__(self, cfg: DictConfig, root: type) -> None:
        self.cfg = cfg
        self.targets: dict[KeyPath, Any] = {}
        self._found: list[Mistake] = []
        self._references: set[KeyPath] = set()
        self._arguments(cfg, (), root, "the config")

    def mistakes(self) -> list[Mistake]:
        """What was found; mistakes in references are left out if there are others."""
        own = [one for one in self._found if one.path not in self._references]
        return list(dict.fromkeys(own or self._found))

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
        self._found.append(Mistake(path, text, kind))

    def _arguments(
        self, node: DictConfig, path: KeyPath, target: Any, owner: str
    ) -> dict[str, Any]:
        """Check the keys and values of a node, a section or the root; returns the values."""
        model, hints = takes(target, node=path in self.targets)
        given = {
            str(key): self._value(node, key, (*path, str(key)), hints.get(str(key))) for key in node
        }
        try:
            if model is not None:
                model.model_validate(given)
        except ValidationError as error:
            self._explain(error, path, given, owner, list(hints))
        return given

    def _value(self, parent: Any, key: Any, path: KeyPath, hint: Any = None) -> Any:
        """A value as plain data, with `Node` where a node or a section is."""
        if OmegaConf.is_missing(parent, key):
            self._add(path, f"it is not set (???); give {dotted(path)}=<value>", "missing")
            return UNKNOWN
        try:
            value = parent[key]
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
            kind = next(iter(get_args(hint)), None)
            return [self._value(value, i, (*path, i), kind) for i in range(len(value))]
        if "_target_" in value.keys():  # noqa: SIM118  `in` denies what is ???
            return self._node(value, path)
        if is_dataclass(hint):
            self._section(value, path, hint)
            return UNKNOWN
        return {str(name): self._value(value, name, (*path, str(name))) for name in value}

    def _node(self, node: DictConfig, path: KeyPath) -> Node:
        name, target = "", None
        try:
            name = "" if OmegaConf.is_missing(node, "_target_") else str(node["_target_"])
            target = locate(name) if name else None
        except LookupError as error:
            self._add((*path, "_target_"), str(error))
        except OmegaConfBaseException:
            pass  # a broken interpolation, reported with the other keys
        self.targets[path] = target
        self._arguments(node, path, target, name)
        return Node(target)

    def _section(self, value: DictConfig, path: KeyPath, kind: Any) -> None:
        """A section, and the constraints between its keys, which its dataclass checks."""
        before = len(self._found)
        given = self._arguments(value, path, kind, dotted(path))
        if len(self._found) > before or UNKNOWN in given.values():
            return
        try:
            kind(**given)
        except InputError as error:
            for problem in re.split(rf"; (?={re.escape(dotted(path))}\.)", str(error)):
                key, _, text = problem.partition(" ")
                self._add(tuple(key.split(".")), f"it {text}")

    def _broken(self, parent: Any, key: Any, path: KeyPath, error: OmegaConfBaseException) -> None:
        """An interpolation without a value; one that refers to a broken value is left out."""
        text = first_line(error)
        lost = re.fullmatch(r"Interpolation key '(.+)' not found", text)
        if isinstance(error, InterpolationToMissingValueError):
            return  # reported where the value stands
        if "Recursive interpolation" in text:
            if all(one.text != CIRCULAR for one in self._found):  # once for the whole circle
                self._add(path, CIRCULAR)
        elif lost is None:
            reason = text.partition("raised while resolving interpolation: ")[2] or text
            self._add(path, f"its value cannot be found: {reason}")
        else:
            raw: Any = OmegaConf.to_container(parent, resolve=False)
            if lost[1] in str(raw[key]):
                self._add(path, f"${{{lost[1]}}} refers to no setting")

    def _explain(
        self,
        error: ValidationError,
        path: KeyPath,
        given: dict[str, Any],
        owner: str,
        names: list[str],
    ) -> None:
        """Add a mistake for each value that pydantic refuses."""
        problems: dict[KeyPath, list[Any]] = {}
        for one in error.errors(include_url=False):
            name, inner = str(one["loc"][0]), (*path, str(one["loc"][0]))
            if isinstance(one["input"], Node):
                continue
            if one["type"] == "extra_forbidden":
                hint = self._meant(inner, given[name], names)
                self._add(inner, f"{owner} has no setting {name!r}{hint}")
            elif one["type"] != "missing":
                problems.setdefault(_place(path, one["loc"], given), []).append(one)
            elif "_target_" not in given:
                self._add(inner, f"it is removed, but needed; leave ~{dotted(inner)} out")
            elif given.get("_partial_") is not True and "_args_" not in given:
                self._add(path, f"{owner} needs {name!r}; give {dotted(inner)}=<value>")
        for place, ones in problems.items():
            inside = any(other != place and other[: len(place)] == place for other in problems)
            if not inside:
                self._refused(place, ones)

    def _refused(self, path: KeyPath, ones: list[Any]) -> None:
        """Add the mistake of one value; a union has an error for each of its types."""
        value, kinds = ones[0]["input"], {one["type"] for one in ones}
        text = " or ".join(dict.fromkeys(map(_wanted, ones)))
        if value == {}:
            self._add(path, f"nothing is chosen; give {dotted(path)}=<option>", "missing")
        elif isinstance(value, dict) and kinds & CLASS_ERRORS:
            above: Any = self.get(dotted(path[:-1])) if len(path) > 1 else self.cfg
            near = did_you_mean(str(path[-1]), [str(key) for key in above if key != path[-1]])
            place = dotted((*path[:-1], near)) if near else f"{dotted(path)}._target_=<class>"
            hint = f"did you mean {place}?" if near else f"give {place}"
            self._add(path, f"it has no _target_, so no class is chosen; {hint}")
        elif kinds == {"value_error"}:
            self._add(path, f"it {text}; it is {value!r}")
        elif "string_type" in kinds and isinstance(value, bool | int | float):
            kind = "wrong" if isinstance(path[-1], int) else "unquoted"
            text = f"it must be {text}, not {value!r}; for a text put it into quotes"
            self._add(path, f"{text}: \"{dotted(path)}='...'\"", kind)
        else:
            words = {dict: "a mapping", list: "a list", type(None): "null"}
            choices = [name for one in ones for name in re.findall(r"'([^']*)'", one["msg"])]
            near = did_you_mean(str(value), choices)
            hint = f"; did you mean {near}?" if near else ""
            self._add(path, f"it must be {text}, not {words.get(type(value), repr(value))}{hint}")

    def _meant(self, path: KeyPath, value: Any, names: list[str]) -> str:
        """A hint at the key that was meant: a neighbour, or one of that name elsewhere."""
        name = str(path[-1])
        if len(path) == 1 and name in MOVED:
            return f"; set {MOVED[name].format(value)}"
        if near := did_you_mean(name, [*names, *RESERVED]):
            return f"; did you mean {dotted((*path[:-1], near))}?"
        elsewhere = {
            leaf.rpartition(".")[2]: leaf for leaf in _leaves(self.cfg, without=dotted(path))
        }
        if near := did_you_mean(name, elsewhere, cutoff=0.8):
            return f"; did you mean {elsewhere[near]}?"
        return f"; it takes {', '.join(names)}" if 0 < len(names) <= 12 else ""


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


def _leaves(cfg: DictConfig, without: str) -> list[str]:
    """The dotted names of all keys in a config, except for the key `without` and its inside."""

    def below(tree: Any, path: tuple[str, ...]) -> Iterator[str]:
        for key, value in tree.items() if isinstance(tree, dict) else ():
            name = ".".join((*path, str(key)))
            if name != without:
                yield name
                yield from below(value, (*path, str(key)))

    return list(below(OmegaConf.to_container(cfg, resolve=False), ()))


Rule = Callable[[Checker], Iterator[Mistake]]
"""A rule between objects, which no signature can state; see `RULES` of `.train` and `.evaluate`.

It reads values with `config.get`, which gives None for a broken value (that is reported already),
and asks for classes with `config.is_a`, so that a user's subclass is treated as its base.
"""


def measures_are_computed(config: Checker) -> Iterator[Mistake]:
    """Each measure is known, and the search is as deep: R@1000 of 100 results is R@100."""
    index = config.get("index")
    if isinstance(index, DictConfig) and index and "k" not in index:
        yield Mistake(("index", "k"), "it is removed, but needed; leave ~index.k out")
    for path, node in [((), config.cfg), *((path, node) for path, _, node in config.nodes())]:
        measures = config.get(dotted((*path, "measures")))
        depths = [0]
        for i, measure in enumerate(measures if isinstance(measures, ListConfig) else ()):
            try:
                depths.append(parse_measure(measure).cutoff)
            except InputError as error:
                yield Mistake((*path, "measures", i), str(error))
        depth = config.get(dotted((*path, "index", "k")))
        if "index" in node and isinstance(depth, int) and depth < max(depths):
            text = f"they need a depth of {max(depths)}, but the search returns k={depth}"
            yield Mistake((*path, "measures"), f"{text}; set index.k={max(depths)}")


def model_folder(
    config: Checker, path: KeyPath, name: Any, kind: str = "", files: bool = False
) -> Iterator[Mistake]:
    """Whether a model folder is there, suits its stage, and may run the code that it needs.

    Args:
        name: the value at `path`.
        kind: of the model; "" for any.
        files: it may also be a run file.
    """
    if not isinstance(name, str):
        return
    folder, text = Path(name), ""
    if not folder.exists():
        near = did_you_mean(name, ["bm25"]) if kind == "retriever" else None
        near = near or neighbour(folder)
        stage = " stage=reranker" if kind == "reranker" else ""
        hint = f"; did you mean {near}?" if near else adoption(name, stage)
        text = f"there is no folder {name}{' (nor run file, nor bm25)' if files else ''}{hint}"
    elif folder.is_file():
        text = "" if files else f"{name} is a file; give the model folder of a {kind or 'training'}"
    else:
        try:
            encoding, facts = read_encoding(folder)
        except InputError as error:
            text = str(error)
        else:
            setting = SETTING if kind else f"backbone.{SETTING}"
            if kind and encoding.kind != kind:
                text = f"{name} is a {encoding.kind}; give the folder of a {kind}"
            elif facts.get(FACT) and config.get(setting) is not True:
                text = f"{name} needs remote code: review that code, then set {setting}=true"
    if text:
        yield Mistake(path, text, "folder")


def neighbour(path: Path) -> str | None:
    """The existing path that is most like one that does not exist."""
    while not path.parent.is_dir():
        path = path.parent
    near = did_you_mean(path.name, [one.name for one in path.parent.iterdir()])
    return str(path.parent / near) if near else None
