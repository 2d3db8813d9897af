"""Rules for what is searched: models, runs, collections and folders that must be there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from caravan.cli import suite
from caravan.cli.checking.definitions import did_you_mean
from caravan.cli.checking.walk import Mistake, dotted
from caravan.cli.checking.walk import Path as KeyPath
from caravan.cli.rules.asking import (
    mappings,
    place_of_retriever,
    retrievers,
    value,
)
from caravan.encoding import adoption, read_encoding
from caravan.errors import InputError
from caravan.models.remote_code import FACT, SETTING

OF_HUB = ("HubTexts", "Tevatron", "FlagEmbedding")
"""Readers whose `path` may be a dataset of the Hugging Face hub."""
LIKE_PATHS, LIKE_FILES = ("/", "./", "../", "~"), (".jsonl", ".json", ".gz", ".tsv", ".txt")


def retrievers_are_names(cfg: DictConfig) -> Iterator[Mistake]:
    """bm25, a model folder or a run file, or a list of these."""
    if "retriever" not in cfg or OmegaConf.is_missing(cfg, "retriever"):
        return
    given = value(cfg, "retriever")
    names = list(given) if isinstance(given, ListConfig) else [given]
    if given is None and "model" in cfg:
        text = "nothing says what searches; give a model folder, or retriever=bm25"
        yield Mistake(("model",), text)
    elif not names or given is None:
        text = f"it must be bm25, a model folder, a run file, or a list of these, not {given}"
        yield Mistake(("retriever",), text)


def questions_are_searched_for(cfg: DictConfig) -> Iterator[Mistake]:
    """A question that is typed is in no run, and one setting says what searches for it."""
    if "model" not in cfg or value(cfg, "retriever") is None:
        return
    for name in retrievers(cfg):
        if isinstance(name, str) and Path(name).is_file():
            text = f"{name} is a file, and no run knows new questions; give a model folder or bm25"
            yield Mistake(place_of_retriever(cfg), text, "folder")
    if value(cfg, "model") is not None and not OmegaConf.is_interpolation(cfg, "retriever"):
        text = "retriever is given too, and says what searches; leave one of them out"
        yield Mistake(("model",), text)


def models_suit_their_stage(cfg: DictConfig) -> Iterator[Mistake]:
    """A retriever embeds and a reranker scores, as their folders say; told before any stage."""
    if "reranker" not in cfg:
        return
    places = [("retriever", place_of_retriever(cfg), name) for name in retrievers(cfg)]
    for wanted, place, name in [*places, ("reranker", ("reranker",), value(cfg, "reranker"))]:
        if not isinstance(name, str) or not Path(name).exists():
            continue  # told already
        if Path(name).is_file():
            if wanted == "reranker":
                text = f"{name} is a file; give the model folder of a reranker"
                yield Mistake(place, text, "folder")
            continue
        try:
            kind = read_encoding(Path(name))[0].kind
        except InputError as error:
            yield Mistake(place, str(error), "folder")
            continue
        if kind != wanted:
            yield Mistake(place, f"{name} is a {kind}; give the folder of a {wanted}", "folder")


def own_code_is_allowed(cfg: DictConfig) -> Iterator[Mistake]:
    """A model folder that wants code of its own (`caravan.models.remote_code`)."""
    trains = "init_from" in cfg
    place = ("backbone", SETTING) if trains else (SETTING,)
    if value(cfg, dotted(place)) is True:
        return
    names = [value(cfg, "init_from")] if trains else [*retrievers(cfg), value(cfg, "reranker")]
    for name in dict.fromkeys(map(str, names)):
        if not Path(name).is_dir():
            continue
        try:
            facts = read_encoding(Path(name))[1]
        except InputError:
            continue  # it is told where the folder is opened
        if facts.get(FACT):
            text = f"{name} wants code of its own: read that code, then set {dotted(place)}=true"
            yield Mistake(place, text, "folder")


def runs_can_be_fused(cfg: DictConfig) -> Iterator[Mistake]:
    """A weight for each run."""
    runs, weights = value(cfg, "retriever"), value(cfg, "fuse.weights")
    fused = isinstance(runs, ListConfig) and len(runs) > 1
    if fused and isinstance(weights, ListConfig) and len(weights) != len(runs):
        text = f"there are {len(weights)} weights for {len(runs)} runs; give one for each"
        yield Mistake(("fuse", "weights"), text)


def collections_are_there(cfg: DictConfig) -> Iterator[Mistake]:
    """Each entry of `collections` is a folder in data.path, or a pattern that finds some."""
    entries = value(cfg, "collections")
    if not isinstance(entries, ListConfig):
        return
    if not entries:
        yield Mistake(("collections",), "it is empty; name folders in data.path, or write null")
    if "path" not in (value(cfg, "data") or {}):
        text = "the data is one collection; choose data=beir data.path=<the folder they lie in>"
        yield Mistake(("collections",), text)
        return
    base, names = suite.asked(cfg)
    if not base.is_dir():
        return  # told already
    for i, name in enumerate(names):
        if ".." in Path(name).parts or Path(name).is_absolute():  # as would be its figures' folder
            text = f"{name} is not in {base}; set data.path to a folder above all of them"
            yield Mistake(("collections", i), text)
            continue
        found = suite.members(base, [name])
        if not found:
            text = f"{base / name} finds no collection (a folder with corpus.jsonl)"
            yield Mistake(("collections", i), text, "folder")
        for member in found:
            if not (base / member.name).is_dir():
                near = did_you_mean(member.name, [path.name for path in base.iterdir()])
                hint = f"; did you mean {near}?" if near else ""
                text = f"there is no folder {base / member.name}{hint}"
                yield Mistake(("collections", i), text, "folder")


def folders_exist(cfg: DictConfig) -> Iterator[Mistake]:
    """The collection, and the models and runs that are read."""
    data = value(cfg, "data")
    places: list[tuple[KeyPath, Any]] = [
        ((*path, "path"), value(node, "path"))
        for path, node in mappings(data, ("data",))
        if "path" in node and not _is_hub_id(node)
    ]
    places += [((name,), value(cfg, name)) for name in ("init_from", "reranker")]
    searches = place_of_retriever(cfg)
    of_suite = suite.asked(cfg)[1] and not OmegaConf.is_missing(cfg, "retriever")
    for one in suite.each(cfg).values() if of_suite else [cfg]:
        places += [(searches, name) for name in retrievers(one) if (searches, name) not in places]
    for path, given in places:
        of_retriever = path == searches
        if not isinstance(given, str) or (of_retriever and given == "bm25"):
            continue
        if not Path(given).exists():
            also = " (nor run file, nor bm25)" if path == ("retriever",) else ""
            near = _nearest(given, "bm25") if of_retriever else _nearest(given)
            hint = f"; did you mean {near}?" if near else ""
            if path[0] != "data" and not hint:
                hint = adoption(given, " stage=reranker" if path[0] == "reranker" else "")
            kind = "file or folder" if path[0] == "data" else "folder"
            yield Mistake(path, f"there is no {kind} {given}{also}{hint}", "folder")


def _is_hub_id(node: DictConfig) -> bool:
    """Whether `path` may name a dataset of the hub, and does not look like a path."""
    of_hub = str(value(node, "_target_")).rpartition(".")[2] in OF_HUB
    path = str(value(node, "path"))
    of_path = path.startswith(LIKE_PATHS) or path.endswith(LIKE_FILES) or path.count("/") > 1
    return of_hub and not of_path


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
