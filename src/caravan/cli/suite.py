"""A suite: several collections in one evaluation, such as BEIR.

    python evaluate.py retriever=bm25 data=beir data.path=/data/beir 'collections=[scifact,quora]'

`data.path` is the folder with the collections. An entry of `collections` is the name of a folder or
a pattern (`*`), optionally with a split (`msmarco:dev`). A folder of collections (BEIR's
cqadupstack) is expanded to all of them, which count as one in the mean.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from caravan.files import listed

CORPUS = ("corpus.jsonl", "corpus.jsonl.gz")


@dataclass(frozen=True)
class Member:
    """A collection of a suite."""

    name: str  # its folder, relative to data.path
    split: str | None  # None: data.split
    group: str  # the folder that counts as one in the mean; `name` if it is a collection itself
    folder: str  # folder of its evaluation, relative to that of the suite


def members(base: Path, entries: list[str]) -> list[Member]:
    """Expand the entries of `collections`, without duplicates.

    A name without a folder is kept, so that opening it raises an error; a pattern without matches
    is dropped.
    """
    found: dict[tuple[str, str], str] = {}
    for entry in entries:
        text, _, split = entry.partition(":")
        for name in _named(base, text.strip("/")):
            parts = [name] if _is_one(base / name) else _parts(base, name) or [name]
            for part in parts:
                found.setdefault((part, split), name)
    names = [name for name, _ in found]

    def folder(name: str, split: str) -> str:
        """The evaluation folder; a collection with several splits has one folder per split."""
        return f"{name}.{split}" if split and names.count(name) > 1 else name

    return [
        Member(name, split or None, group, folder(name, split))
        for (name, split), group in found.items()
    ]


def each(cfg: DictConfig) -> dict[Member, DictConfig]:
    """The config of each collection: the suite's config with its path, name, split and folders.

    Interpolations of `data.name` and `data.split`, such as in the path of a run, are resolved per
    collection.
    """
    base, entries = asked(cfg)
    configs = {}
    for member in members(base, entries):
        one = copy.deepcopy(cfg)
        with open_dict(one):
            one.collections = None
            one.run_dir = str(Path(cfg.run_dir) / member.folder)
            one.store = str(Path(cfg.store) / member.name)
            one.data.path = str(base / member.name)
            one.data.name = member.name
            if member.split is not None:
                one.data.split = member.split
        configs[member] = one
    return configs


def asked(cfg: DictConfig) -> tuple[Path, list[str]]:
    """The folder of the collections and the entries of `collections`; no entries if not a suite.

    Accepts a config that has not been checked; invalid values are ignored here.
    """
    entries = cfg.get("collections")
    try:
        path = OmegaConf.select(cfg, "data.path", throw_on_missing=False)
    except OmegaConfBaseException:
        path = None
    if not isinstance(entries, ListConfig) or not isinstance(path, str):
        return Path(), []
    return Path(path), [entry for entry in entries if isinstance(entry, str)]


def _named(base: Path, text: str) -> Iterator[str]:
    """The folders that match a name or a pattern."""
    if not set("*?[") & set(text):
        yield text
        return
    for path in sorted(base.glob(text)):
        if path.name.startswith("."):
            continue
        name = str(path.relative_to(base))
        if _is_one(path) or (path.is_dir() and _parts(base, name)):
            yield name


def _parts(base: Path, name: str) -> list[str]:
    """The collections in a folder that is not a collection itself."""
    if not (base / name).is_dir():
        return []
    return [f"{name}/{path.name}" for path in listed(base / name) if _is_one(path)]


def _is_one(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CORPUS)
