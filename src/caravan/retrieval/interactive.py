"""A question at a time: an evaluation's stages, loaded once and kept, with nothing written.

    ask = asker(cfg)
    stages = ask("which function splits a path?")

What a question finds is what the same text as a query of the collection finds in `evaluate.py`:
queries are embedded, ranked, fused and reranked by the same code.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from caravan.cli.schema import build
from caravan.data.collection import Collection
from caravan.data.runs import Run, canonical
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.retrieval import store
from caravan.retrieval.folders import Folders

log = logging.getLogger(__name__)

ROW = np.zeros(1, dtype=np.int64)  # the one query of a question's runs


@dataclass(frozen=True)
class Found:
    """What one stage makes of a question."""

    stage: str
    run: Run  # of the one query, row 0
    seconds: float

    def ranks(self) -> dict[int, tuple[int, float]]:
        """(rank from 1, score) of each passage row."""
        rows, scores = self.run.of(0)
        ranked = enumerate(zip(rows.tolist(), scores.tolist(), strict=True), start=1)
        return {row: (rank, score) for rank, (row, score) in ranked}


@dataclass(frozen=True)
class First:
    """A first stage: a question to its run."""

    name: str
    search: Callable[[str], Run]


class _Asked:
    """One question where a table of queries belongs."""

    def __init__(self, question: str) -> None:
        self.question = question

    def get(self, rows: Sequence[int]) -> list[tuple[str, str]]:
        return [("", self.question) for _ in rows]


class Asker:
    """Answers questions over a collection.

    Args:
        firsts: stages that search the corpus, one or more.
        fuse: makes one run of several (`caravan.retrieval.fusion`).
        scorer: `caravan.retrieval.rerank.Scorer`, or None.
        k: depth of the fused run.
    """

    def __init__(
        self, collection: Collection, firsts: list[First], fuse: Any, scorer: Any, k: int
    ) -> None:
        self.collection = collection
        self.firsts = firsts
        self.fuse = fuse
        self.scorer = scorer
        self.k = k

    def __call__(self, question: str) -> list[Found]:
        """What each stage finds, in their order; the last one's run is the answer."""
        stages = [self._timed(one.name, partial(one.search, question)) for one in self.firsts]
        if len(stages) > 1:
            runs = [stage.run for stage in stages]
            stages.append(self._timed("fused", lambda: self.fuse(runs).top(self.k)))
        if self.scorer is not None:
            candidates = stages[-1].run
            asked: Any = _Asked(question)
            stages.append(
                self._timed(
                    "reranked",
                    lambda: self.scorer.rerank(candidates, asked, self.collection.corpus),
                )
            )
        return stages

    def _timed(self, name: str, search: Callable[[], Run]) -> Found:
        started = time.monotonic()
        run = canonical(search(), self.collection.corpus)
        return Found(name, run, time.monotonic() - started)


def asker(cfg: Any) -> Asker:
    """The stages of a composed and checked config of `conf/search.yaml`, ready to answer.

    The corpus is embedded or indexed unless that has been done with the same model and settings.
    """
    from omegaconf import OmegaConf

    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = build(cfg, "data", "index", "fuse")
    collection = parts["data"].collection(Path(cfg.cache_dir))
    if not len(collection.corpus):
        raise InputError(f"{collection.name} has no passage to search; choose another data=")
    asked = settings["retriever"]
    names = list(map(str, asked if isinstance(asked, list) else [asked]))
    _folders(settings).refuse_lengths(names, settings["reranker"], settings["rerank"])
    firsts: list[First] = []
    for name in names:
        kind = "bm25" if name == "bm25" else "retriever"
        number = sum(one.name.partition("-")[0] == kind for one in firsts) + 1
        stage = kind if number == 1 else f"{kind}-{number}"
        make = _lexical if name == "bm25" else _dense
        firsts.append(First(stage, make(name, cfg, settings, collection)))
    scorer = None
    if settings["reranker"] is not None:
        folders = _folders({**settings, "num_workers": 0})
        scorer = folders.scorer(Path(settings["reranker"]), settings["rerank"])
        _ = scorer.loaded  # now, so that no question waits for it
    return Asker(collection, firsts, parts["fuse"], scorer, parts["index"].k)


def _lexical(
    name: str, cfg: Any, settings: dict[str, Any], collection: Collection
) -> Callable[[str], Run]:
    parts = build(cfg, "bm25", "index")
    inputs = store.bm25_inputs(collection, settings["bm25"])
    folder = _place(settings, name, inputs)
    store.open_bm25(parts["bm25"], collection, folder, inputs)
    return lambda question: parts["bm25"].search([question], ROW, parts["index"].k)


def _tell_of_another(model: Path, collection: Collection) -> None:
    """`data=` that was left out stands for the embedded collection, which takes long to embed."""
    trained_on = read_encoding(model)[1].get("collection")
    if trained_on and trained_on.rpartition(" ")[0] != collection.name:
        log.warning(
            "what is searched is %s, and %s was trained on %s; data= chooses another collection",
            *(collection.name, model, trained_on.rpartition(" ")[0]),
        )


def _dense(
    name: str, cfg: Any, settings: dict[str, Any], collection: Collection
) -> Callable[[str], Run]:
    folders = _folders(settings)
    model, corpus = Path(name), collection.corpus
    _tell_of_another(model, collection)
    encoder = folders.encoder(model)
    inputs = {
        **store.embedding_inputs(collection, folders, model),
        "length": folders.lengths.get("passage_length"),
    }
    folder = _place(settings, "passages", encoder.inputs(inputs))
    passages = encoder.encode(corpus, np.arange(len(corpus)), "passage", folder, inputs)
    index = build(cfg, "index")["index"]  # of its own: there may be several models
    index.build(passages)
    encoder.queries(["ready?"])  # the weights load now, so that no question waits for them
    k = min(index.k, passages.rows)

    def search(question: str) -> Run:
        return Run.from_topk(ROW, *index.search(encoder.queries([question]), k))

    return search


def _folders(settings: dict[str, Any]) -> Folders:
    """Of its own for each model: all of them stay loaded."""
    given = {key: settings[key] for key in ("query_length", "passage_length")}
    lengths = {key: length for key, length in given.items() if length is not None}
    return Folders(
        lengths=lengths,
        **{key: settings[key] for key in ("precision", "token_budget", "block")},
        **{key: settings[key] for key in ("num_workers", "attention", "trust_remote_code")},
    )


def _place(settings: dict[str, Any], name: str, inputs: dict[str, Any]) -> Path:
    folder, reuse = Path(settings["store"]), settings["reuse"]
    return store.place(folder, None if reuse is None else Path(reuse), name, inputs)
