"""Any collection that ir_datasets knows, by its id (MacAvaney et al. 2021, arXiv 2103.02280).

ir_datasets fetches and repairs the files of several hundred test collections; this streams corpus,
queries and qrels into a collection. It is an extra: pip install "caravan-retrieval[ir_datasets]".
Some collections have to be asked for by hand, which it tells.

    python evaluate.py retriever=bm25 data=ir_datasets data.id=beir/scifact
"""

from __future__ import annotations

import difflib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caravan.data.byid import Judgement
from caravan.data.cached import cache_key, cached_collection
from caravan.data.collection import Collection, write_collection
from caravan.data.seen import Seen
from caravan.data.texts import Record
from caravan.errors import InputError

SPLITS = ("train", "dev", "test")
BATCH = 8192
BODIES = ("text", "body", "contents")

log = logging.getLogger(__name__)


class IrDatasets:
    """A corpus of ir_datasets with the queries and qrels of some of its ids.

    Args:
        id: whose corpus is searched, such as beir/scifact or msmarco-passage.
        splits: the id of each split, below `id`: {dev: dev/small, dl19: trec-dl-2019/judged}; None
            takes those called train, dev and test, and as test the judgements of `id` itself.
        name: what reports call the collection; the id by default.
        train_split, dev_split, split: to train on, to validate on, and to score.
        unknown_ids: "refuse" judgements of unknown queries or passages, or "count" them: training
            leaves them out, measures count them as not found.
    """

    def __init__(
        self,
        id: str,
        splits: Mapping[str, str] | None = None,
        name: str | None = None,
        train_split: str = "train",
        dev_split: str = "dev",
        split: str = "test",
        unknown_ids: str = "refuse",
    ) -> None:
        self.id = id.strip("/")
        self.splits = None if splits is None else dict(splits)
        self.name = name or self.id
        self.train_split, self.dev_split, self.split = train_split, dev_split, split
        self.unknown_ids = unknown_ids

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: ir_datasets is not installed, or does not know an id, or cannot fetch it.
        """
        try:
            import ir_datasets
        except ImportError:
            raise InputError(
                "data=ir_datasets needs a package that is not installed: pip install ir_datasets"
            ) from None
        known = ir_datasets.registry
        corpus, splits = self._opened(known)
        ids = {split: self._below(name) for split, name in splits.items()}
        key = cache_key("ir_datasets", ir_datasets.__version__, self.id, ids, self.unknown_ids)
        return cached_collection(
            cache_dir,
            self.name,
            key,
            lambda to: self._build(to, corpus, {split: known[id_] for split, id_ in ids.items()}),
        )

    def _opened(self, known: Any) -> tuple[Any, dict[str, str]]:
        """The dataset behind the id, and the splits that are read."""
        for name in (self.id, *(self._below(name) for name in (self.splits or {}).values())):
            try:
                known[name]
            except KeyError:
                near = difflib.get_close_matches(name, map(str, known), n=1)
                hint = f"did you mean {near[0]}? All are" if near else "its ids are"
                raise InputError(
                    f"ir_datasets knows no {name}: {hint} at https://ir-datasets.com"
                ) from None
        corpus = known[self.id]
        if not corpus.has_docs():
            raise InputError(f"{self.id} of ir_datasets has no corpus: give one that has, data.id")
        if self.splits is not None:
            return corpus, self.splits
        there = [split for split in SPLITS if _judged(known, self._below(split))]
        found = {split: split for split in there}
        if "test" not in found and _judged(known, self.id):
            found["test"] = ""
        return corpus, found

    def _below(self, name: str) -> str:
        return f"{self.id}/{name}".rstrip("/")

    def _build(self, folder: Path, corpus: Any, splits: dict[str, Any]) -> Collection:
        facts: Counter[str] = Counter(empty_passages=0, repeated_queries=0)
        try:
            return write_collection(
                folder,
                self.name,
                _passages(corpus, facts),
                _queries(splits, facts),
                {
                    split: _judgements(one, f"{self.id} of ir_datasets, qrels/{split}", facts)
                    for split, one in splits.items()
                },
                facts=facts,
                where=lambda part, n: f"{self.id} of ir_datasets, {part}, record {n + 1}",
                unknown_ids=self.unknown_ids,
                relevant_from={split: 2 for split, one in splits.items() if _official_from_2(one)},
            )
        except (OSError, RuntimeError) as error:  # what its downloads raise
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"ir_datasets cannot give {self.id}: {told}: see its page at "
                f"https://ir-datasets.com, or fetch the files and read them with another data="
            ) from None


def _judged(known: Any, name: str) -> bool:
    try:
        one = known[name]
    except KeyError:
        return False
    return bool(one.has_queries() and one.has_qrels())


def _passages(corpus: Any, facts: Counter[str]) -> Iterator[Record]:
    for doc in corpus.docs_iter():
        title, text = _text_of(doc)
        facts["empty_passages"] += not (title or text).strip()
        yield doc.doc_id, title, text


def _text_of(doc: Any) -> tuple[str, str]:
    """Title and text of a document; without a body, all that ir_datasets takes for its text.

    Raises:
        InputError: the document has neither, such as an image.
    """
    field = next((field for field in BODIES if hasattr(doc, field)), None)
    body = None if field is None else getattr(doc, field) or ""
    if isinstance(body, str):
        title = getattr(doc, "title", None) or ""
        if isinstance(title, str):
            return title, body
    elif hasattr(doc, "default_text"):
        return "", doc.default_text() or ""
    raise InputError(
        f"the document {doc.doc_id} of ir_datasets has no text (its fields are "
        f"{', '.join(getattr(doc, '_fields', ()))}): give another id, data.id"
    )


def _queries(splits: dict[str, Any], facts: Counter[str]) -> Iterator[Record]:
    every = itertools.chain.from_iterable(one.queries_iter() for one in splits.values())
    seen = Seen()
    while batch := list(itertools.islice(every, BATCH)):
        texts = [query.default_text() or "" for query in batch]
        new, other = seen.add([query.query_id for query in batch], texts)
        for at, query in enumerate(batch):
            if other[at]:
                raise InputError(
                    f"the query {query.query_id} has several texts in the splits "
                    f"{', '.join(splits)}: read one of them alone (data.splits)"
                )
            if new[at]:
                yield query.query_id, "", texts[at]
            else:
                facts["repeated_queries"] += 1


def _judgements(one: Any, place: str, facts: Counter[str]) -> Iterator[Judgement]:
    """The judgements of a split; those by subtopic (TrecSubQrel) as the highest of their grades.

    Raises:
        InputError: a grade is not a whole number.
    """
    by_subtopic: dict[tuple[str, str], int] = {}
    for n, judgement in enumerate(one.qrels_iter(), 1):
        grade = judgement.relevance
        if not isinstance(grade, int | float) or not float(grade).is_integer():
            raise InputError(
                f"{place}, judgement {n}: the grade {grade!r} is not an integer, and rounding would"
                " change what is relevant: give splits with other judgements (data.splits)"
            )
        query, passage = judgement.query_id, judgement.doc_id
        if hasattr(judgement, "subtopic_id"):
            facts["judgements_by_subtopic"] += 1
            others = by_subtopic.get((query, passage), int(grade))
            by_subtopic[query, passage] = max(int(grade), others)
        else:
            yield query, passage, int(grade)
    if by_subtopic:
        log.warning(
            "%s: judgements are by subtopic; a passage gets the highest of its grades", place
        )
    for (query, passage), grade in by_subtopic.items():
        yield query, passage, grade


def _official_from_2(one: Any) -> bool:
    """Whether the official measures of a collection count grade 1 as not relevant."""
    documented = one.documentation() if hasattr(one, "documentation") else None
    return any("rel=2" in str(name) for name in (documented or {}).get("official_measures", ()))
