"""The settings of `train.py`, `evaluate.py` and search: names, types and ranges of the root keys.

Values are in `conf/`. `register` makes the roots known to Hydra; in a notebook, call it first:

    schema.register()
    with hydra.initialize_config_dir("/path/to/caravan/conf", version_base="1.3"):
        cfg = hydra.compose("train", ["experiment=quickstart/retriever"])
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from caravan.encoding import Encoding


@dataclass(frozen=True)
class As:
    """Check a root key as another type than OmegaConf's, which has no Literal and no Union."""

    type: Any


@dataclass(frozen=True)
class Valid:
    """A check of a root key, which raises ValueError."""

    check: Callable[[Any], Any]


@dataclass(frozen=True)
class Node:
    """A mapping with a `_target_`, chosen from a group of conf/, in the place that is checked."""

    target: Any  # what `_target_` names; None where that is unknown


def _chosen(value: Any) -> Any:
    """The validator of what a group of conf/ chooses."""
    if isinstance(value, Node):
        return value
    if isinstance(value, Mapping) and value:
        raise ValueError("has no _target_, so no class is chosen")
    raise ValueError("nothing is chosen")


def _printable(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    if CONTROL.search(text):
        raise ValueError("has a control character")
    return text


def _named(text: str) -> str:
    if not text.strip("/ ."):
        raise ValueError("is empty, so the run would have the folder of all runs")
    return text


CONTROL = re.compile(r"[\x00-\x1f\x7f]")
NODE = Annotated[Any, Valid(_chosen)]
OPTIONAL_NODE = Annotated[Any, As(NODE | None)]
NAMED_NODE = Annotated[Any, As(str | NODE)]
"""A node, or a name that the receiver knows, such as strategy "auto"."""
NODES = Annotated[Any, As(dict[str, NODE | None])]
"""Nodes by name; null switches one off."""
NAMES = Annotated[Any, As(str | Annotated[list[str], MinLen(1)])]
OPTIONAL_NAMES = Annotated[Any, As(str | Annotated[list[str], MinLen(1)] | None)]
PRECISION = Annotated[str, As(Literal["auto", "bf16", "float32"])]
PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
LENGTH = Annotated[int, Ge(4)]
SEED = Annotated[int, Ge(0), Lt(2**32)]
PATH = Annotated[str, Valid(_printable)]
NAME = Annotated[PATH, Valid(_named)]
MEASURES = Annotated[list[str], MinLen(1)]


@dataclass
class Batching:
    """How queries become batches (`caravan.data.datamodule.DataModule`)."""

    queries_per_batch: PositiveInt = MISSING
    token_budget: PositiveInt | None = MISSING
    num_workers: NonNegativeInt = MISSING


@dataclass
class Validation:
    """What the validation during training searches (`caravan.data.datamodule.DataModule`)."""

    passages: PositiveInt | None = MISSING
    queries: PositiveInt | None = MISSING
    train_queries: PositiveInt | None = MISSING
    run: str | None = MISSING
    run_depth: PositiveInt = MISSING
    read_lengths: list[LENGTH] = MISSING


@dataclass
class GradCaching:
    """How many texts are computed at a time (`caravan.training.gradcache.GradCache`)."""

    chunk: PositiveInt | None = MISSING


@dataclass
class Train:
    """The root of conf/train.yaml."""

    name: NAME = MISSING
    run_dir: PATH = MISSING
    cache_dir: PATH = MISSING
    seed: SEED = MISSING
    resume: bool = MISSING
    precision: PRECISION = MISSING
    ignore_identical_ids: bool = MISSING
    encoding: Encoding = field(default_factory=Encoding)
    batching: Batching = field(default_factory=Batching)
    gradcache: GradCaching = field(default_factory=GradCaching)
    validation: Validation = field(default_factory=Validation)
    stage: NODE = MISSING
    backbone: NODE = MISSING
    peft: OPTIONAL_NODE = MISSING
    loss: OPTIONAL_NODE = MISSING
    sampler: OPTIONAL_NODE = MISSING
    data: NODE = MISSING
    index: NODE = MISSING
    strategy: NAMED_NODE = MISSING
    trainer: NODE = MISSING
    optimizer: NODE = MISSING
    logger: NODES = MISSING
    callbacks: NODES = MISSING


@dataclass
class Rerank:
    """How candidates are reranked (`caravan.retrieval.rerank.Reranking`)."""

    depth: PositiveInt = MISSING
    weight: Annotated[float, Gt(0), Le(1)] = MISSING
    rest: Annotated[str, As(Literal["drop", "keep"])] = MISSING
    judged: bool = MISSING
    block: PositiveInt = MISSING
    query_length: LENGTH | None = MISSING
    passage_length: LENGTH | None = MISSING
    segment: Annotated[str | None, As(Literal["first", "best"] | None)] = MISSING
    segment_words: PositiveInt = MISSING


@dataclass
class Pipeline:
    """Retrieve, fuse, rerank: what the roots of evaluate.yaml and search.yaml have in common."""

    name: NAME = MISSING
    run_dir: PATH = MISSING
    cache_dir: PATH = MISSING
    store: PATH = MISSING
    retriever: NAMES = MISSING
    reranker: str | None = MISSING
    rerank: Rerank = field(default_factory=Rerank)
    query_length: LENGTH | None = MISSING
    passage_length: LENGTH | None = MISSING
    token_budget: PositiveInt | None = MISSING
    num_workers: NonNegativeInt = MISSING
    precision: PRECISION = MISSING
    attention: str = MISSING
    trust_remote_code: bool = MISSING
    block: PositiveInt = MISSING
    data: NODE = MISSING
    index: NODE = MISSING
    bm25: NODE = MISSING
    fuse: NODE = MISSING


@dataclass
class Evaluate(Pipeline):
    """The root of conf/evaluate.yaml."""

    measures: MEASURES = MISSING
    collections: Annotated[list[str], MinLen(1)] | None = MISSING
    ignore_identical_ids: bool = MISSING


@dataclass
class Search(Pipeline):
    """The root of conf/search.yaml."""

    model: str | None = MISSING
    retriever: OPTIONAL_NAMES = MISSING  # refers to `model`
    show: PositiveInt = MISSING
    reuse: str | None = MISSING


ROOTS: dict[str, type] = {"train": Train, "evaluate": Evaluate, "search": Search}
MOVED = {"init_from": "backbone=from_folder backbone.folder={}"}
"""Former settings, and what to type instead."""
COMMAND = "CARAVAN_COMMAND"
"""The environment variable with the command line, for jobs of a sweep in other processes."""


def register() -> None:
    """Make the keys of the roots known to Hydra, as `train_schema` and so on, and the resolvers.

    The keys have no types, because `caravan.cli.check` reports all mistakes where Hydra stops at
    the first. The signature of a `_target_` decides which keys its node may have.
    """
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("groups", groups, replace=True)
    for name, root in ROOTS.items():
        schema: Any = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(root)))
        for key in fields(root):
            if key.type in ("NODE", "OPTIONAL_NODE", "NAMED_NODE", "NODES"):
                schema[key.name] = DictConfig({}, flags={"struct": False})
            elif isinstance(section := schema.get(key.name), DictConfig):
                OmegaConf.set_struct(section, False)
        ConfigStore.instance().store(f"{name}_schema", schema)


def groups(name: str, _root_: Any) -> str:
    """The groups of a program and their options, for its --help.

    The experiments and sweeps are those whose first comment shows a command of the program; search
    takes those of evaluate.py.
    """
    command = f"# python {'evaluate' if name == 'search' else name}.py"
    options: dict[str, set[str]] = {}
    for source in _root_.hydra.runtime.config_sources:
        for group in [*(key.name for key in fields(ROOTS[name])), "experiment", "sweep"]:
            for file in Path(source.path, group).rglob("*.yaml") if source.schema == "file" else ():
                whole = group in ("experiment", "sweep")
                if not whole or command in file.read_text("utf-8", errors="replace"):
                    folder = file.parent.relative_to(source.path).as_posix()
                    options.setdefault(folder, set()).add(file.stem)
    if name == "search":
        options.pop("sweep", None)
    return "".join(f"{group}: {', '.join(sorted(options[group]))}\n" for group in sorted(options))


def folder_name(text: str) -> str:
    """A text as a folder name: no separators, at most 120 bytes, different for different texts.

    A digest separates texts that would have one name otherwise: by the characters that are
    replaced or cut, or on a file system that ignores case or composes accents.
    """
    plain = re.sub(r"(?<==)(['\"])([^'\"]*)\1(?=,|$)", r"\2", text)
    name = re.sub(r"[^\w.,=+@-]+", "_", plain)
    if name == text.lower() and name.isascii() and len(name) <= 120:
        return name
    start = name.encode()[:110].decode(errors="ignore")
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{start}~{digest}"


def recorded(cfg: DictConfig) -> str:
    """The resolved config as YAML, with the command line as its first line where there was one."""
    text = OmegaConf.to_yaml(cfg, resolve=True)
    command = os.environ.get(COMMAND)
    return text if command is None else f"# {' '.join(command.split())}\n{text}"


def build(cfg: DictConfig, *names: str) -> dict[str, Any]:
    """The objects that nodes of the root describe; a value without `_target_` is plain data.

    Lists and mappings become Python's own: an adapter could not save a ListConfig, for example.
    """
    from hydra.utils import instantiate

    return {
        name: instantiate(cfg[name], _convert_="all")
        if isinstance(cfg[name], DictConfig)
        else cfg[name]
        for name in names
    }
