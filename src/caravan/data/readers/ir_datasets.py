"""Any collection that ir_datasets knows, by its id (MacAvaney et al. 2021, arXiv 2103.02280).

It fetches and repairs the files of several hundred test collections. It is an extra: pip install
"caravan-retrieval[ir_datasets]". Some collections must be requested by hand; its error says so.

    python evaluate.py retriever=bm25 data=ir_datasets data.id=beir/scifact
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.data.collection import Collection
from caravan.data.qrels import Judgement, UnknownIds
from caravan.data.source import Source, Stream, Streams, cache_key, cached_collection
from caravan.data.texts import Record, unique_records
from caravan.errors import InputError, first_line

SPLITS = ("train", "dev", "test")
BODIES = ("text", "body", "contents")

log = logging.getLogger(__name__)


@dataclass
class IrDatasets(Source):
    """A corpus of ir_datasets with the queries and qrels of some of its ids.

    Args:
        id: whose corpus is searched, such as beir/scifact or msmarco-passage.
        splits: the id of each split, below `id`: {dev: dev/small, dl19: trec-dl-2019/judged}; None
            takes train, dev and test, and as test the judgements of `id` itself.
        name: what reports call the collection; the id by default.
        train_split, dev_split, split, unknown_ids: as for `caravan.data.readers.labelled.Folder`.
    """

    id: str
    splits: Mapping[str, str] | None = None
    name: str | None = None
    train_split: str = "train"
    dev_split: str = "dev"
    split: str = "test"
    unknown_ids: UnknownIds = "refuse"

    def collection(self, cache_dir: str | Path) -> Collection:
        try:
            import ir_datasets
        except ImportError:
            raise InputError(
                "not-installed", "data=ir_datasets needs a package: pip install ir_datasets"
            ) from None
        known, id_ = ir_datasets.registry, self.id.strip("/")
        corpus = _dataset(known, id_)
        if not corpus.has_docs():
            raise InputError(
                "missing-corpus", f"{id_} of ir_datasets has no corpus: choose another data.id"
            )
        ids = self._splits(known, id_)
        splits = {split: _dataset(known, name) for split, name in ids.items()}
        streams = _streams(f"{id_} of ir_datasets", corpus, splits)
        graded = {split: 2 for split, one in splits.items() if _official_from_2(one)}
        name, settings = self.name or id_, {"unknown_ids": self.unknown_ids}

        def build(folder: Path) -> Collection:
            try:
                return streams.write(folder, name, relevant_from=graded, **settings)
            except (OSError, RuntimeError) as error:  # what its downloads raise
                raise InputError(
                    "dataset-not-loaded",
                    f"ir_datasets cannot load {id_}: {first_line(error)}: see its page at"
                    " https://ir-datasets.com, or fetch the files and read them with another data=",
                ) from None

        key = cache_key("ir_datasets", ir_datasets.__version__, id_, ids, self.unknown_ids)
        return cached_collection(cache_dir, name, key, build, resumes=True)

    def _splits(self, known: Any, id_: str) -> dict[str, str]:
        """The id of each split."""
        if self.splits is not None:
            return {split: f"{id_}/{name}".rstrip("/") for split, name in self.splits.items()}
        found = {split: f"{id_}/{split}" for split in SPLITS if _judged(known, f"{id_}/{split}")}
        if "test" not in found and _judged(known, id_):
            found["test"] = id_
        return found


def _streams(source: str, corpus: Any, splits: dict[str, Any]) -> Streams:
    def passages() -> Iterator[tuple[str, Record]]:
        for doc in corpus.docs_iter():
            yield f"{source}, document {doc.doc_id}", (doc.doc_id, *_text_of(doc))

    def queries() -> Iterator[tuple[str, Record]]:
        found = (
            (f"{source}, {split}", (query.query_id, "", query.default_text() or ""))
            for split, one in splits.items()
            for query in one.queries_iter()
        )
        return unique_records(found, "queries")

    qrels: dict[str, Stream[Judgement]] = {
        split: functools.partial(_judgements, one, f"{source}, qrels/{split}")
        for split, one in splits.items()
    }
    return Streams(source, passages, queries, qrels)


def _dataset(known: Any, name: str) -> Any:
    try:
        return known[name]
    except KeyError:
        raise InputError(
            "unknown-dataset",
            f"ir_datasets knows no {name}: choose one of https://ir-datasets.com",
        ) from None


def _judged(known: Any, name: str) -> bool:
    try:
        one = known[name]
    except KeyError:
        return False
    return bool(one.has_queries() and one.has_qrels())


def _text_of(doc: Any) -> tuple[str, str]:
    """Title and text of a document; without a body, what ir_datasets takes for its text."""
    field = next((field for field in BODIES if hasattr(doc, field)), None)
    body = None if field is None else getattr(doc, field) or ""
    if isinstance(body, str):
        title = getattr(doc, "title", None) or ""
        if isinstance(title, str):
            return title, body
    elif hasattr(doc, "default_text"):
        return "", doc.default_text() or ""
    raise InputError(
        "missing-text",
        f"the document {doc.doc_id} of ir_datasets has no text (its fields are"
        f" {', '.join(getattr(doc, '_fields', ()))}): choose another data.id",
    )


def _judgements(one: Any, place: str) -> Iterator[tuple[str, Judgement]]:
    """The judgements of a split; those by subtopic (TrecSubQrel) as the highest of their grades."""
    by_subtopic: dict[tuple[str, str], int] = {}
    for n, judgement in enumerate(one.qrels_iter(), 1):
        grade = judgement.relevance
        if not isinstance(grade, int | float) or not float(grade).is_integer():
            raise InputError(
                "invalid-grade",
                f"{place}, judgement {n}: the grade {grade!r} is not an integer, and rounding would"
                " change what is relevant: choose splits with other judgements (data.splits)",
            )
        pair = judgement.query_id, judgement.doc_id
        if hasattr(judgement, "subtopic_id"):
            by_subtopic[pair] = max(int(grade), by_subtopic.get(pair, int(grade)))
        else:
            yield f"{place}, judgement {n}", (*pair, int(grade))
    if by_subtopic:
        log.warning(
            "%s: judgements are by subtopic; a passage gets the highest of its grades", place
        )
    yield from ((place, (*pair, grade)) for pair, grade in by_subtopic.items())


def _official_from_2(one: Any) -> bool:
    """Whether the official measures of a collection count grade 1 as not relevant."""
    documented = one.documentation() if hasattr(one, "documentation") else None
    return any("rel=2" in str(name) for name in (documented or {}).get("official_measures", ()))
