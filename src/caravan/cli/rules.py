"""Rules between objects of a config, which no signature can state.

A rule is a function of a checked config that yields mistakes; `RULES` lists them by root. It reads
values with `config.get`, which gives None for a broken value (that is reported already), and asks
for classes with `config.is_a`, so that a user's subclass is treated as its base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from caravan.cli import schema, suite
from caravan.cli.check import Checker, KeyPath, Mistake, dotted
from caravan.cli.signatures import did_you_mean
from caravan.encoding import adoption, read_encoding
from caravan.errors import InputError
from caravan.models.remote_code import FACT, SETTING
from caravan.retrieval.metrics import parse_measure

Rule = Callable[[Checker], Iterator[Mistake]]


def measures_are_computed(config: Checker) -> Iterator[Mistake]:
    """Each measure is known, and the search is as deep: R@1000 of 100 results is R@100."""
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


def index_has_a_depth(config: Checker) -> Iterator[Mistake]:
    """`index.k` is read by every program, although the classes have a default for it."""
    index = config.get("index")
    if isinstance(index, DictConfig) and "k" not in index.keys():  # noqa: SIM118
        yield Mistake(("index", "k"), "it is removed, but needed; leave ~index.k out")


def retrievers_can_search(config: Checker) -> Iterator[Mistake]:
    """Exactly one setting of search names what searches, and each of several runs has a weight."""
    model, given = config.get("model"), config.get("retriever")
    if "model" in config.cfg:
        if given is None and not OmegaConf.is_missing(config.cfg, "retriever"):
            yield Mistake(("model",), "nothing searches; give a model folder, or retriever=bm25")
        elif model is not None and not OmegaConf.is_interpolation(config.cfg, "retriever"):
            yield Mistake(("model",), "retriever is given too; leave one of them out")
    weights = config.get("fuse.weights")
    several = isinstance(given, ListConfig) and len(given) > 1
    if several and isinstance(weights, ListConfig) and len(given) != len(weights):
        text = f"there are {len(weights)} weights for {len(given)} runs; give one for each"
        yield Mistake(("fuse", "weights"), text)


def folders_suit_their_stage(config: Checker) -> Iterator[Mistake]:
    """Model folders and runs are there and fit: reported before hours of encoding, not after."""
    given, place = config.get("retriever"), ("retriever",)
    if config.get("model") is not None:
        place = ("model",)
    for i, name in enumerate(given if isinstance(given, ListConfig) else [given]):
        refers = isinstance(given, ListConfig) and OmegaConf.is_interpolation(given, i)
        refers = refers or (
            place == ("retriever",) and OmegaConf.is_interpolation(config.cfg, "retriever")
        )
        if name != "bm25" and not (refers and config.get("collections")):  # a run of each of them
            yield from of_folder(config, place, "retriever", name)
    yield from of_folder(config, ("reranker",), "reranker", config.get("reranker"))


def of_folder(config: Checker, path: KeyPath, kind: str, name: Any) -> Iterator[Mistake]:
    """Whether a model folder is there, is of a kind, and may run what it needs."""
    if not isinstance(name, str):
        return
    searches, folder = kind == "retriever", Path(name)
    if not folder.exists():
        near = did_you_mean(name, ["bm25"]) if searches else None
        near = near or _neighbour(folder)
        stage = " stage=reranker" if kind == "reranker" else ""
        hint = f"; did you mean {near}?" if near else adoption(name, stage)
        also = " (nor run file, nor bm25)" if path == ("retriever",) else ""
        yield Mistake(path, f"there is no folder {name}{also}{hint}", "folder")
    elif folder.is_file():
        if not searches or "model" in config.cfg:
            text = f"{name} is a file; give the model folder of a {kind or 'training'}"
            yield Mistake(path, text, "folder")
    else:
        try:
            encoding, facts = read_encoding(folder)
        except InputError as error:
            yield Mistake(path, str(error), "folder")
            return
        if kind and encoding.kind != kind:
            text = f"{name} is a {encoding.kind}; give the folder of a {kind}"
            yield Mistake(path, text, "folder")
        setting = SETTING if kind else f"backbone.{SETTING}"
        if facts.get(FACT) and config.get(setting) is not True:
            text = f"{name} needs remote code: review that code, then set {setting}=true"
            yield Mistake(path, text, "folder")


def collections_are_there(config: Checker) -> Iterator[Mistake]:
    """Each entry of `collections` is a folder in data.path, or a pattern that matches some."""
    if config.get("collections") is None:
        return
    if "path" not in (config.get("data") or {}):
        text = "the data is one collection; choose data=beir data.path=<the folder of them all>"
        yield Mistake(("collections",), text)
    base, names = suite.asked(config.cfg)
    for i, name in enumerate(names if base.is_dir() else ()):
        missing = [
            one.name for one in suite.members(base, [name]) if not (base / one.name).is_dir()
        ]
        if (
            ".." in Path(name).parts or Path(name).is_absolute()
        ):  # its metrics would be elsewhere too
            text = f"{name} is not in {base}; set data.path to a folder above all of them"
            yield Mistake(("collections", i), text)
        elif missing or not suite.members(base, [name]):
            near = _neighbour(base / name)
            hint = f"; did you mean {near}?" if near else ""
            text = f"there is no collection {base / name} (a folder with corpus.jsonl){hint}"
            yield Mistake(("collections", i), text, "folder")


def _neighbour(path: Path) -> str | None:
    """The existing path that is most like one that does not exist."""
    while not path.parent.is_dir():
        path = path.parent
    near = did_you_mean(path.name, [one.name for one in path.parent.iterdir()])
    return str(path.parent / near) if near else None


SEARCHING: list[Rule] = [
    measures_are_computed,
    index_has_a_depth,
    retrievers_can_search,
    folders_suit_their_stage,
    collections_are_there,
]


def rules_of(root: type) -> list[Rule]:
    """The rules of a root; only those of training need Lightning."""
    if root is not schema.Train:
        return SEARCHING
    from caravan.cli import training_rules

    return [
        measures_are_computed,
        index_has_a_depth,
        *training_rules.RULES,
    ]
