"""What `train.py` and `evaluate.py` can be told, and check(): every mistake in it at once.

The two root dataclasses give names and types; values stand in `conf/`. `check` compares a composed
config with them and with the signatures behind every `_target_`, then asks the rules below, which
see what no single value shows. It reads source files and imports nothing heavy.

    python train.py trainer.max_step=5    ->  ... did you mean trainer.max_steps?   (exit code 2)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caravan.checking import walk
from caravan.checking.annotations import is_int
from caravan.checking.definitions import did_you_mean
from caravan.checking.signatures import signature
from caravan.checking.walk import Mistake, dotted
from caravan.contract import Contract
from caravan.errors import InputError

Node = Any
"""A mapping with a `_target_`, chosen from a group of conf/."""
OptionalNode = Any
"""A Node or null."""
NamedNode = Any
"""A Node or a name that the receiver knows, such as strategy "auto"."""
Nodes = Any
"""A mapping of names to Nodes, null where one is switched off."""


@dataclass
class Batching:
    """How queries become batches (`caravan.data.datamodule.DataModule`)."""

    queries_per_batch: int = MISSING
    token_budget: int = MISSING
    num_workers: int = MISSING


@dataclass
class Validation:
    """What the validation during training searches (`caravan.data.datamodule.DataModule`)."""

    passages: int | None = MISSING
    queries: int | None = MISSING
    run: str | None = MISSING
    run_depth: int = MISSING


@dataclass
class Train:
    """The root of conf/train.yaml."""

    name: str = MISSING
    run_dir: str = MISSING
    cache_dir: str = MISSING
    seed: int = MISSING
    resume: bool = MISSING
    init_from: str | None = MISSING
    precision: str = MISSING
    contract: Contract = field(default_factory=Contract)
    batching: Batching = field(default_factory=Batching)
    validation: Validation = field(default_factory=Validation)
    stage: Node = MISSING
    backbone: Node = MISSING
    peft: OptionalNode = MISSING
    loss: Node = MISSING
    sampler: OptionalNode = MISSING
    data: Node = MISSING
    index: Node = MISSING
    strategy: NamedNode = MISSING
    trainer: Node = MISSING
    optimizer: Node = MISSING
    logger: Nodes = MISSING
    callbacks: Nodes = MISSING


@dataclass
class Evaluate:
    """The root of conf/evaluate.yaml."""

    name: str = MISSING
    run_dir: str = MISSING
    cache_dir: str = MISSING
    store: str = MISSING
    seed: int = MISSING
    retriever: str = MISSING
    measures: list[str] = MISSING
    query_length: int | None = MISSING
    passage_length: int | None = MISSING
    token_budget: int = MISSING
    num_workers: int = MISSING
    precision: str = MISSING
    block: int = MISSING
    data: Node = MISSING
    index: Node = MISSING
    bm25: Node = MISSING


ROOTS: dict[str, type] = {"train": Train, "evaluate": Evaluate}


def register(typed: bool = True) -> None:
    """Make the roots known to Hydra as `train_schema` and `evaluate_schema`.

    Args:
        typed: False leaves types and unknown keys to `check`, which tells all of them at once
            where Hydra stops at the first.
    """
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    for name, root in ROOTS.items():
        schema = OmegaConf.structured(root)
        if not typed:
            schema = OmegaConf.create(OmegaConf.to_container(schema))
        for key in fields(root):
            if key.type in walk.MARKERS:
                # Open: which keys a node takes is said by what its _target_ names, not by the file.
                schema[key.name] = DictConfig({}, flags={"struct": False})
            elif isinstance(section := schema.get(key.name), DictConfig):
                OmegaConf.set_readonly(section, None)  # a frozen dataclass makes it so
                OmegaConf.set_struct(section, None if typed else False)
        ConfigStore.instance().store(f"{name}_schema", schema)


def folder_name(text: str) -> str:
    """A text as the name of one folder: no separators, at most 120 characters, still unique."""
    name = re.sub(r"[^\w.,=+@-]+", "_", text)
    if len(name) <= 120:
        return name
    return f"{name[:110]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check(
    cfg: DictConfig, root: type = Train, place: Callable[[walk.Path], str] | None = None
) -> list[str]:
    """Every mistake in a composed config, a line each: where, what, and the remedy.

    Args:
        cfg: the composed config, without Hydra's own node; interpolations need not be resolved.
        root: the dataclass that says what the root may hold.
        place: tells for a path which file and line, or which override, its value comes from.
    """
    lines = []
    for mistake in mistakes(cfg, root):
        where = place(mistake.path) if place else ""
        lines.append(f"{dotted(mistake.path)}{where and f' ({where})'}: {mistake.text}")
    return lines


def mistakes(cfg: DictConfig, root: type = Train) -> list[Mistake]:
    """What `check` tells, as data."""
    found = walk.mistakes(cfg, root)
    wrong = {mistake.path for mistake in found}
    for rule in RULES:
        found += [mistake for mistake in rule(cfg) if mistake.path not in wrong]
    return found


# --- rules: what no single value shows --------------------------------------------------------

Rule = Callable[[DictConfig], Iterator[Mistake]]
PRECISIONS = ("auto", "bf16", "float32")
AT_LEAST = {
    "batching.queries_per_batch": 1,
    "batching.token_budget": 1,
    "batching.num_workers": 0,
    "validation.passages": 1,
    "validation.queries": 1,
    "validation.run_depth": 1,
    "query_length": 4,
    "passage_length": 4,
    "token_budget": 1,
    "num_workers": 0,
    "block": 1,
    "index.k": 1,
}


def value(cfg: DictConfig, place: str) -> Any:
    """A value, or None where there is none, it is `???`, or its interpolation is broken."""
    try:
        return OmegaConf.select(cfg, place)
    except OmegaConfBaseException:
        return None


def contract_holds(cfg: DictConfig) -> Iterator[Mistake]:
    """Pooling, temperature, lengths and templates, as `Contract` wants them."""
    settings = value(cfg, "contract")
    if not isinstance(settings, DictConfig):
        return
    try:
        Contract(
            **{key.name: settings[key.name] for key in fields(Contract) if key.name in settings}
        )
    except InputError as error:
        for problem in str(error).split("; contract."):
            setting, _, text = problem.removeprefix("contract.").partition(" ")
            yield Mistake(("contract", setting), f"it {text}")
    except (TypeError, OmegaConfBaseException):
        return  # the walk tells those


def numbers_are_large_enough(cfg: DictConfig) -> Iterator[Mistake]:
    """Lengths, counts and budgets."""
    for place, least in AT_LEAST.items():
        given = value(cfg, place)
        if is_int(given) and given < least:
            yield Mistake(tuple(place.split(".")), f"it must be at least {least}, not {given}")


def precision_is_known(cfg: DictConfig) -> Iterator[Mistake]:
    """The names that `caravan.models.precision` knows."""
    given = value(cfg, "precision")
    if isinstance(given, str) and given not in PRECISIONS:
        near = did_you_mean(given, PRECISIONS)
        hint = f"; did you mean {near}?" if near else ""
        yield Mistake(("precision",), f"it must be one of {', '.join(PRECISIONS)}{hint}")


def search_is_deep_enough(cfg: DictConfig) -> Iterator[Mistake]:
    """No measure looks deeper than the search beside it: R@1000 of 100 results is R@100."""
    for path, node in _mappings(cfg, ()):
        index, measures = value(node, "index"), value(node, "measures")
        if not isinstance(index, DictConfig) or not isinstance(measures, ListConfig):
            continue
        cutoffs = [re.search(r"@(\d+)$", str(measure)) for measure in measures]
        depth = max((int(cutoff[1]) for cutoff in cutoffs if cutoff), default=0)
        kept = _given_or_default(index, "k")
        if is_int(kept) and kept < depth:
            yield Mistake(
                (*path, "measures"),
                f"they ask for depth {depth} but search keeps k={kept}; set index.k={depth}",
            )


def folders_exist(cfg: DictConfig) -> Iterator[Mistake]:
    """The collection, the model to start from, and the model to evaluate."""
    data = value(cfg, "data")
    places = [path for path, node in _mappings(data, ("data",)) if "path" in node]
    named = [(*path, "path") for path in places] + [("init_from",), ("retriever",)]
    for path in named:
        given = value(cfg, dotted(path))
        if not isinstance(given, str) or (path == ("retriever",) and given == "bm25"):
            continue
        if not Path(given).exists():
            also = " (nor bm25)" if path == ("retriever",) else ""
            near = _nearest(given) if path != ("retriever",) else _nearest(given, "bm25")
            hint = f"; did you mean {near}?" if near else ""
            yield Mistake(path, f"there is no folder {given}{also}{hint}", "folder")


RULES: list[Rule] = [
    contract_holds,
    numbers_are_large_enough,
    precision_is_known,
    search_is_deep_enough,
    folders_exist,
]


def _mappings(node: Any, path: walk.Path) -> Iterator[tuple[walk.Path, DictConfig]]:
    """A mapping and all mappings in it, those behind interpolations left out."""
    if not isinstance(node, DictConfig):
        return
    yield path, node
    for key in map(str, node):
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            yield from _mappings(node.get(key), (*path, key))


def _given_or_default(node: DictConfig, name: str) -> Any:
    """An argument as the config gives it, else the default of what `_target_` names."""
    given = value(node, name)
    if given is not None:
        return given
    try:
        parameter = signature(str(value(node, "_target_"))).parameters[name]
    except LookupError:
        return None
    return getattr(parameter.default, "value", None)


def _nearest(path: str, *others: str) -> str | None:
    """The existing path, or one of `others`, that is most like a path that does not exist."""
    near = did_you_mean(path, others)
    if near is not None:
        return near
    above = Path(path)
    while not above.exists() and above != above.parent:
        above, below = above.parent, above.name
    if above.is_dir() and (near := did_you_mean(below, os.listdir(above), cutoff=0.7)):
        return str(above / near)
    return None
