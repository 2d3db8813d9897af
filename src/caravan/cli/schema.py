"""The settings of `train.py` and `evaluate.py`: names, types and ranges of the root keys.

Values are in `conf/`. `register` makes the roots known to Hydra; in a notebook, call it first:

    schema.register()
    with hydra.initialize_config_dir("/path/to/caravan/conf", version_base="1.3"):
        cfg = hydra.compose("train", ["experiment=quickstart/retriever"])
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from pydantic import (
    AfterValidator,
    AllowInfNan,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic_core import PydanticCustomError

from caravan.encoding import Encoding


def _chosen(value: Any) -> Any:
    """The validator of what a group of conf/ chooses."""
    if not isinstance(value, dict) or "_target_" not in value:
        raise PydanticCustomError("no_object", "a mapping with a _target_")
    return value


def _printable(text: str) -> str:
    if not text.strip() or re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("must have visible characters, and no control characters")
    return text


def _named(text: str) -> str:
    if not text.strip("/ ."):
        raise ValueError("must not be empty: each run needs a separate folder")
    return text


NODE = Annotated[Any, AfterValidator(_chosen)]
NODES = dict[str, NODE | None]
"""Nodes by name; null switches one off."""
PATH = Annotated[str, AfterValidator(_printable)]
NAME = Annotated[PATH, AfterValidator(_named)]
NAMES = str | Annotated[list[str], MinLen(1)]
PRECISION = Literal["auto", "bf16", "float32"]
LENGTH = Annotated[int, Ge(4)]


@dataclass
class Batching:
    """How queries become batches (`caravan.training.datamodule.DataModule`)."""

    queries_per_batch: PositiveInt
    token_budget: PositiveInt | None
    num_workers: NonNegativeInt | None


@dataclass(kw_only=True)
class Read:
    """How much of a text is read (`caravan.data.segments.Reading`)."""

    query_length: LENGTH | None = None
    passage_length: LENGTH | None = None
    segment: Literal["first", "best"] | None = None
    segment_words: PositiveInt = 150


@dataclass
class Validation:
    """What the validation during training searches (`caravan.training.datamodule.DataModule`)."""

    passages: PositiveInt | None
    queries: PositiveInt | None
    train_queries: PositiveInt | None
    run: str | None
    run_depth: PositiveInt
    readings: list[Read]


@dataclass
class GradCaching:
    """How many texts are computed at a time (`caravan.training.gradcache.GradCache`)."""

    chunk: PositiveInt | None


@dataclass
class Distilling:
    """A teacher's embeddings to learn (`caravan.training.distillation.Distillation`)."""

    teacher: str | None
    loss: Literal["cosine", "mse"]
    weight: Annotated[PositiveFloat, AllowInfNan(False)]
    scores_weight: Annotated[NonNegativeFloat, AllowInfNan(False)]
    projection: bool


@dataclass
class Train:
    """The root of conf/train.yaml."""

    name: NAME
    run_dir: PATH
    cache_dir: PATH
    seed: Annotated[int, Ge(0), Lt(2**32)]
    resume: bool
    precision: PRECISION
    ignore_identical_ids: bool
    encoding: Encoding
    batching: Batching
    gradcache: GradCaching
    distillation: Distilling
    validation: Validation
    stage: NODE
    backbone: NODE
    peft: NODE | None
    loss: NODE | None
    sampler: NODE | None
    data: NODE
    index: NODE
    strategy: str | NODE
    trainer: NODE
    optimizer: NODE
    logger: NODES
    callbacks: NODES


@dataclass(kw_only=True)
class Rerank(Read):
    """How candidates are reranked (`caravan.retrieval.rerank.Reranking`)."""

    depth: PositiveInt
    weight: Annotated[float, Gt(0), Le(1)]
    normalise: Literal["minmax", "zscore", "none"]
    rest: Literal["drop", "keep"]
    judged: bool
    block: PositiveInt


@dataclass(kw_only=True)
class Evaluate(Read):
    """The root of conf/evaluate.yaml: retrieve, fuse, rerank, score."""

    name: NAME
    run_dir: PATH
    cache_dir: PATH
    store: PATH
    dim: NonNegativeInt | None
    reranker: str | None
    rerank: Rerank
    token_budget: PositiveInt | None
    num_workers: NonNegativeInt | None
    precision: PRECISION
    attention: str
    trust_remote_code: bool
    block: PositiveInt
    data: NODE
    index: NODE
    bm25: NODE
    fuse: NODE
    retriever: NAMES
    measures: Annotated[list[str], MinLen(1)]
    collections: Annotated[list[str], MinLen(1)] | None
    ignore_identical_ids: bool
    engine: Literal["local", "ray"]


ROOTS: dict[str, type] = {"train": Train, "evaluate": Evaluate}
COMMAND = "CARAVAN_COMMAND"
"""The environment variable with the command line, for jobs of a sweep in other processes."""


def register() -> None:
    """Make the keys of the roots known to Hydra, as `train_schema` and so on, and the resolver.

    The keys have no types, because `caravan.cli.check` reports all mistakes where Hydra stops at
    the first. The signature of a `_target_` decides which keys its node may have.
    """
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    for name, root in ROOTS.items():
        keys: dict[str, Any] = {}
        for key, hint in get_type_hints(root, include_extras=True).items():
            has_keys = is_dataclass(hint) or hint in (NODE, NODES) or NODE in get_args(hint)
            keys[key] = DictConfig({}, flags={"struct": False}) if has_keys else MISSING
        ConfigStore.instance().store(f"{name}_schema", keys)


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


def build(cfg: DictConfig, name: str) -> Any:
    """The object that a node of the root describes; a value without `_target_` is plain data.

    Lists and mappings become Python's own: an adapter could not save a ListConfig, for example.
    """
    from hydra.utils import instantiate

    node = cfg[name]
    return instantiate(node, _convert_="all") if isinstance(node, DictConfig) else node
