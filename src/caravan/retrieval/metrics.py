"""Metrics of a run by ir_measures: MRR, nDCG, recall, MAP and precision, by name ("nDCG@10").

All values equal trec_eval's: nDCG has linear gains (`ndcg_cut`), a passage is relevant from grade 1
on, or from grade n on where the name says so (`MRR(rel=2)@10`). The mean is over all judged
queries, as in `trec_eval -c` and `ir_measures.calc_aggregate`: a query that the run lacks, or that
has no relevant passage, counts 0. Relevant passages that the corpus lacks count as not found
(`Qrels.unknown`). Ties are broken before scoring, by `canonical`, because the providers of
ir_measures (https://ir-measur.es) break them differently.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import ir_measures
import numpy as np

from caravan import manifests
from caravan.data.runs import Run, canonical
from caravan.errors import InputError
from caravan.progress import progress

if TYPE_CHECKING:
    from caravan.data.collection import Qrels, Texts

log = logging.getLogger(__name__)

NAMES = ("MRR", "nDCG", "R", "MAP", "P")
OTHER_NAMES = {
    "rr": "MRR", "recall": "R", "ap": "MAP", "precision": "P", "prec": "P", "map_cut": "MAP",
    "ndcg_cut": "nDCG", "recip_rank": "MRR",
}  # fmt: skip
"""Names in other tools, for "did you mean"."""

QUERIES_AT_ONCE = 500
"""Queries in one call of ir_measures, which holds a run as dicts of strings."""
LISTED = 4
"""A mean over up to this many collections is named after them, over more after their number."""


@dataclass(frozen=True)
class Measure:
    """A parsed name: `MRR(rel=2)@10` is ("MRR", 10, 2)."""

    name: str
    cutoff: int
    rel: int = 1  # the lowest relevant grade; nDCG takes grades as they are

    def __str__(self) -> str:
        rel = f"(rel={self.rel})" if self.rel > 1 else ""
        return f"{self.name}{rel}@{self.cutoff}"


def parse_measure(text: str) -> Measure:
    """The measure behind a name such as "MRR@10", "nDCG@10", "R@1000", "MAP(rel=2)@1000".

    Raises:
        InputError: If the name is unknown; the message suggests the most similar one.

    >>> parse_measure("R(rel=2)@100")
    Measure(name='R', cutoff=100, rel=2)
    """
    match = re.fullmatch(r"(\w+)(?:\(rel=([1-9]\d*)\))?@([1-9]\d*)", str(text).strip())
    if match and match[1] in NAMES and not (match[1] == "nDCG" and match[2]):
        return Measure(match[1], int(match[3]), int(match[2] or 1))
    raise InputError(
        "unknown-measure",
        f"'{text}' is not a measure; did you mean '{_suggestion(str(text))}'? Supported are "
        f"{', '.join(f'{name}@k' for name in NAMES)}, and e.g. R(rel=2)@k for higher grades",
    )


def spelled(measures: Sequence[str], relevant_from: int) -> list[str]:
    """The measures with the lowest relevant grade of a split in their names, unless that is 1.

    In TREC DL, passages of grade 1 are related and do not answer; its binary measures count from
    grade 2 on. A measure that names its own grade, and nDCG, stay as they are.

    >>> spelled(["MRR@10", "nDCG@10", "R(rel=1)@100"], relevant_from=2)
    ['MRR(rel=2)@10', 'nDCG@10', 'R(rel=1)@100']
    """
    if relevant_from == 1:
        return list(measures)
    return [
        text
        if "(" in text or parse_measure(text).name == "nDCG"
        else text.replace("@", f"(rel={relevant_from})@")
        for text in measures
    ]


def deepest(measures: Sequence[str]) -> int:
    """The deepest cutoff of the measures; a search must return at least this many passages.

    >>> deepest(["MRR@10", "R@1000"])
    1000
    """
    return max((parse_measure(text).cutoff for text in measures), default=0)


def depth_of(run: Run, searched: int | None = None) -> int:
    """The depth of a run: its longest list, or the depth of the search that made it.

    Args:
        searched: depth of the search, if known. Queries may have fewer hits than that.
    """
    return max(int(run.counts.max(initial=0)), searched or 0)


def too_deep(measures: Sequence[str], depth: int, passages: int) -> list[str]:
    """The measures that look deeper than a run: R@1000 of 100 passages is R@100.

    Args:
        depth: of the run, see `depth_of`.
        passages: of the collection; a run that ranks all of them suits every measure.

    >>> too_deep(["MRR@10", "R@1000"], depth=100, passages=5_000)
    ['R@1000']
    """
    return [text for text in measures if min(parse_measure(text).cutoff, passages) > depth]


def per_query(run: Run, qrels: Qrels, measures: Sequence[str]) -> dict[str, np.ndarray]:
    """Each measure for each judged query that the collection has.

    The run is scored in its order; pass `canonical(run, corpus)` where scores may tie.

    Returns:
        For each measure float64 [Q], in the order of `qrels.queries`.
    """
    parsed = {text: parse_measure(text) for text in measures}
    wanted = {ir_measures.parse_measure(str(one)): one for one in parsed.values()}
    rows = qrels.queries
    values = {one: np.zeros(len(rows)) for one in wanted.values()}
    best = run.top(deepest(measures))
    unknown: dict[int, list[int]] = {}
    for row, grade in zip(qrels.unknown.query_rows, qrels.unknown.grades, strict=True):
        unknown.setdefault(int(row), []).append(int(grade))
    with progress("score", len(rows), "queries") as done:
        for start in range(0, len(rows), QUERIES_AT_ONCE):
            some = rows[start : start + QUERIES_AT_ONCE].tolist()
            judged, ranked = {}, {}
            for place, row in enumerate(some, start):
                passages, grades = qrels.of(row)
                known = zip(map(str, passages.tolist()), grades.tolist(), strict=True)
                gone = {f"-{i}": grade for i, grade in enumerate(unknown.get(row, []))}
                judged[str(place)] = {**dict(known), **gone}
                if len(found := best.of(row)[0]):
                    # Strictly falling scores: the order is given, and no provider sees a tie.
                    order = enumerate(found.tolist())
                    ranked[str(place)] = {str(passage): -float(i) for i, passage in order}
            for value in ir_measures.iter_calc(list(wanted), judged, ranked):
                values[wanted[value.measure]][int(value.query_id)] = value.value
            done(len(some))
    return {text: values[one] for text, one in parsed.items()}


def score_run(
    run: Run, qrels: Qrels, queries: Texts, corpus: Texts, measures: Sequence[str]
) -> dict[str, Any]:
    """The metrics of a run in canonical order.

    Returns:
        `overall`: {measure: mean}; `per_query`: {measure: {query id: value}}; `queries`, the number
        of judged queries, of which `missing` have no passage in the run and `without_relevant` no
        relevant passage (all of these count 0); `unknown_passages`, judgements of passages that the
        corpus lacks, and `unknown_queries`, judged queries without a text (among `queries` and
        `missing`); and `unjudged`, queries of the run that are not in the mean.

    Raises:
        InputError: If a measure is unknown, or no judged query has a relevant passage.
    """
    rows, unknown = qrels.queries, qrels.unknown
    relevant = np.union1d(
        qrels.query_rows[qrels.grades >= 1], unknown.query_rows[unknown.grades >= 1]
    )
    if not len(relevant):
        raise InputError(
            "no-relevant-passage",
            f"none of the {len(rows)} judged queries has a relevant passage (grade 1 or more), so "
            "there is nothing to average; check the qrels of this split",
        )
    found = run.query_rows[run.counts > 0]
    missing = len(np.setdiff1d(rows, found, assume_unique=True))
    if not len(found):
        log.warning("the run has no passage for any of the %d queries to score", missing)
    elif missing == len(rows):
        log.warning("the run has none of the %d queries to score: is it of this split?", missing)
    names = queries.ids(rows)
    scored = {
        text: {
            **dict(zip(names, values.tolist(), strict=True)),
            **dict.fromkeys(unknown.queries, 0.0),
        }
        for text, values in per_query(canonical(run, corpus), qrels, measures).items()
    }
    return {
        "overall": {text: float(np.mean(list(of.values()))) for text, of in scored.items()},
        "per_query": scored,
        "queries": len(rows) + len(unknown.queries),
        "without_relevant": len(rows) - len(relevant),
        "missing": missing + len(unknown.queries),
        "unknown_passages": len(unknown.grades),
        "unknown_queries": len(unknown.queries),
        "unjudged": len(np.setdiff1d(found, rows, assume_unique=True)),
    }


def mean_over_collections(
    records: Mapping[str, dict[str, Any]], groups: Mapping[str, str]
) -> dict[str, Any]:
    """The metrics.json of several collections, from the metrics of each finished one.

    All collections weigh the same, however many queries they have. BEIR's average (Thakur et al.
    2021, arXiv 2104.08663) counts CQADupStack's twelve forums as one collection, whose value is the
    mean of theirs.

    Args:
        records: by folder, what `caravan.retrieval.pipeline.evaluate` returns.
        groups: by folder, the group that counts once in the mean.
    """
    own = {
        folder: {
            "group": groups[folder],
            "digest": record["collection"]["digest"],
            "split": record["split"],
            "queries": record["queries"],
            "passages": record["passages"],
            "overall": record["overall"],
            "stages": {stage["stage"]: stage["overall"] for stage in record["stages"]},
            "depths": {stage["stage"]: stage.get("depth") for stage in record["stages"]},
            "seconds": record["seconds"],
        }
        for folder, record in records.items()
    }
    names = list(dict.fromkeys(groups[folder] for folder in records))
    every = list(records.values())
    first = every[0] if every else {"system": "", "stages": []}

    def mean(overall: Mapping[str, dict[str, float]]) -> dict[str, float]:
        return _mean((groups[folder], metrics) for folder, metrics in overall.items())

    stages = [
        {
            "stage": stage["stage"],
            "run": "",
            "run_xxh3": manifests.digest(
                [[one["run_xxh3"] for one in record["stages"]][i] for record in every]
            ),
            "depth": _shallowest(every, i),
            "overall": mean({name: of["stages"][i]["overall"] for name, of in records.items()}),
            "seconds": sum(record["stages"][i]["seconds"] for record in every),
        }
        for i, stage in enumerate(first["stages"])
    ]
    digests = {name: [of["collection"]["digest"], of["split"]] for name, of in records.items()}
    return {
        "system": first["system"],
        "collection": {
            "name": ", ".join(names) if len(names) <= LISTED else f"{len(names)} collections",
            "digest": manifests.digest(digests),
        },
        "split": ", ".join(sorted({record["split"] for record in every})),
        "queries": sum(record["queries"] for record in every),
        "passages": sum(record["passages"] for record in every),
        "run": "",  # each collection has its own
        "seconds": sum(record["seconds"] for record in every),
        "overall": mean({name: record["overall"] for name, record in records.items()}),
        "stages": stages,
        "collections": own,
    }


def _mean(metrics: Iterable[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """The mean, over groups, of each measure that all have; a group is the mean of its members.

    Measures differ where splits do: TREC DL's passages have MRR(rel=2)@10 where others have MRR@10.
    """
    groups: dict[str, list[dict[str, float]]] = {}
    for group, overall in metrics:
        groups.setdefault(group, []).append(overall)
    every = [overall for members in groups.values() for overall in members]
    names = [name for name in every[0] if all(name in one for one in every)] if every else []
    return {
        name: fmean(fmean(one[name] for one in members) for members in groups.values())
        for name in names
    }


def _shallowest(records: Sequence[dict[str, Any]], stage: int) -> int | None:
    """The depth of a stage's shallowest run; None where each ranks all passages.

    Evaluations of earlier versions have no depth.
    """
    found = [(record["stages"][stage].get("depth"), record["passages"]) for record in records]
    depths = [depth for depth, passages in found if depth is not None and depth < passages]
    return min(depths, default=None)


def _suggestion(text: str) -> str:
    """The most similar name, whatever its case, its separator or the tool that it comes from."""
    typed = re.match(r"\W*([A-Za-z_]*[A-Za-z])?", text)
    depth = re.search(r"([1-9]\d*)\W*$", text)
    known = {**OTHER_NAMES, **{name.lower(): name for name in NAMES}}
    word = (typed[1] if typed else None) or ""
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"{known[close[0]] if close else 'nDCG'}@{depth[1] if depth else 10}"
