"""What `train.py`, `evaluate.py` and search can be told, and check(): every mistake at once.

The root dataclasses give names and types; values stand in `conf/`. `check` compares a composed
config with them and with the signatures behind every `_target_`, then asks the rules, which see
what no single value shows. It reads source files and imports nothing heavy.

    python train.py trainer.max_step=5    ->  ... did you mean trainer.max_steps?   (exit code 2)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caravan.cli import usage
from caravan.cli.checking import walk
from caravan.cli.checking.walk import Mistake, dotted
from caravan.cli.rules import RULES
from caravan.encoding import Encoding, read_encoding
from caravan.errors import InputError

Node = Any
"""A mapping with a `_target_`, chosen from a group of conf/."""
OptionalNode = Any
"""A Node or null."""
NamedNode = Any
"""A Node or a name that the receiver knows, such as strategy "auto"."""
Nodes = Any
"""A mapping of names to Nodes, null where one is switched off."""
Names = Any
"""A name or a list of names."""


@dataclass
class Batching:
    """How queries become batches (`caravan.data.datamodule.DataModule`)."""

    queries_per_batch: int = MISSING
    token_budget: int | None = MISSING
    num_workers: int = MISSING


@dataclass
class Validation:
    """What the validation during training searches (`caravan.data.datamodule.DataModule`)."""

    passages: int | None = MISSING
    queries: int | None = MISSING
    train_queries: int | None = MISSING
    run: str | None = MISSING
    run_depth: int = MISSING
    read_lengths: list[int] = MISSING


@dataclass
class GradCaching:
    """How many texts are computed at a time (`caravan.training.gradcache.GradCache`)."""

    chunk: int | None = MISSING


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
    ignore_identical_ids: bool = MISSING
    encoding: Encoding = field(default_factory=Encoding)
    batching: Batching = field(default_factory=Batching)
    gradcache: GradCaching = field(default_factory=GradCaching)
    validation: Validation = field(default_factory=Validation)
    stage: Node = MISSING
    backbone: Node = MISSING
    peft: OptionalNode = MISSING
    loss: OptionalNode = MISSING
    sampler: OptionalNode = MISSING
    data: Node = MISSING
    index: Node = MISSING
    strategy: NamedNode = MISSING
    trainer: Node = MISSING
    optimizer: Node = MISSING
    logger: Nodes = MISSING
    callbacks: Nodes = MISSING


@dataclass
class Rerank:
    """How candidates are reranked (`caravan.retrieval.rerank.Reranking`)."""

    depth: int = MISSING
    weight: float = MISSING
    rest: str = MISSING
    judged: bool = MISSING
    block: int = MISSING
    query_length: int | None = MISSING
    passage_length: int | None = MISSING
    segment: str | None = MISSING
    segment_words: int = MISSING


@dataclass
class Pipeline:
    """Retrieve, fuse, rerank: what the roots of evaluate.yaml and search.yaml have in common."""

    name: str = MISSING
    run_dir: str = MISSING
    cache_dir: str = MISSING
    store: str = MISSING
    retriever: Names = MISSING
    reranker: str | None = MISSING
    rerank: Rerank = field(default_factory=Rerank)
    query_length: int | None = MISSING
    passage_length: int | None = MISSING
    token_budget: int | None = MISSING
    num_workers: int = MISSING
    precision: str = MISSING
    attention: str = MISSING
    trust_remote_code: bool = MISSING
    block: int = MISSING
    data: Node = MISSING
    index: Node = MISSING
    bm25: Node = MISSING
    fuse: Node = MISSING


@dataclass
class Evaluate(Pipeline):
    """The root of conf/evaluate.yaml."""

    measures: list[str] = MISSING
    collections: list[str] | None = MISSING
    ignore_identical_ids: bool = MISSING


@dataclass
class Search(Pipeline):
    """The root of conf/search.yaml."""

    model: str | None = MISSING
    show: int = MISSING
    reuse: str | None = MISSING


COMMAND = "CARAVAN_COMMAND"
"""The variable in which a program leaves how it was started, for its jobs in other processes."""

ROOTS: dict[str, type] = {"train": Train, "evaluate": Evaluate, "search": Search}


def register(typed: bool = True) -> None:
    """Make the roots known to Hydra as `train_schema`, `evaluate_schema` and `search_schema`.

    Args:
        typed: False leaves types and unknown keys to `check`, which tells all of them at once
            where Hydra stops at the first.
    """
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("begun_with", begun_with, replace=True)
    OmegaConf.register_new_resolver("groups", groups, replace=True)
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


def groups(name: str, _root_: Any) -> str:
    """The groups of a program and their options, for its --help."""
    sources = [
        Path(one.path) for one in _root_.hydra.runtime.config_sources if one.schema == "file"
    ]
    known = [key.name for key in fields(ROOTS[name])]
    return usage.groups(sources, name, [*known, "experiment", *["sweep"] * (name != "search")])


def folder_name(text: str) -> str:
    """A text as the name of one folder: no separators, at most 120 bytes, other for other texts.

    A digest tells apart what would be one name otherwise: without the characters that are replaced,
    cut, or on a file system that ignores case or composes accents.
    """
    plain = re.sub(r"(?<==)(['\"])([^'\"]*)\1(?=,|$)", r"\2", text)
    name = re.sub(r"[^\w.,=+@-]+", "_", plain)
    if name == text.lower() and name.isascii() and len(name) <= 120:
        return name
    start = name.encode()[:110].decode(errors="ignore")
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{start}~{digest}"


def begun_with(setting: str, otherwise: Any, _root_: Any) -> Any:
    """A setting of the encoding as `init_from` has it, if that is a retriever or was adapted.

    A reranker's prompts are of no use to a retriever, but which way its layers look stays with the
    weights.
    """
    folder = OmegaConf.select(_root_, "init_from")
    if not isinstance(folder, str):
        return otherwise
    try:
        encoding, _ = read_encoding(Path(folder))
    except InputError:
        return otherwise  # it is told where the folder is opened
    comes_along = encoding.kind == "retriever" or setting == "bidirectional"
    return getattr(encoding, setting) if comes_along else otherwise


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
        try:
            found += [mistake for mistake in rule(cfg) if mistake.path not in wrong]
        except OmegaConfBaseException:
            if not found:  # else the rule met a broken value, which is reported already
                raise
    return found


def recorded(cfg: DictConfig) -> str:
    """The resolved config as YAML, under the command that has asked for it where there was one."""
    text = OmegaConf.to_yaml(cfg, resolve=True)
    command = os.environ.get(COMMAND)
    return text if command is None else f"# {' '.join(command.split())}\n{text}"


def build(cfg: DictConfig, *names: str) -> dict[str, Any]:
    """The objects that nodes of the root describe; what has no `_target_` comes as plain data.

    Lists and mappings arrive as Python's own: a ListConfig in an adapter's settings, say, could not
    be saved with the adapter.
    """
    from hydra.utils import instantiate

    return {
        name: instantiate(cfg[name], _convert_="all")
        if isinstance(cfg[name], DictConfig)
        else cfg[name]
        for name in names
    }
