"""Metrics of a run by ir_measures: MRR, nDCG, recall, MAP and precision, by name ("nDCG@10").

All values equal trec_eval's: nDCG has linear gains (`ndcg_cut`), a passage is relevant from grade 1
on, or from grade n on where the name says so (`MRR(rel=2)@10`). The mean is over all judged
queries, as in `trec_eval -c` and `ir_measures.calc_aggregate`: a query that the run lacks, or that
has no relevant passage, counts 0. Relevant passages that the corpus lacks count as not found
(`Qrels.unknown`). Ties are broken before scoring, by `canonical`, because the providers of
ir_measures (https://ir-measur.es) break them differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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

QUERIES_AT_ONCE = 500
"""Queries in one call of ir_measures, which holds a run as dicts of strings."""
LISTED = 4
"""A mean over up to this many collections is named after them, over more after their number."""


def parse_measure(name: str) -> ir_measures.Measure:
    """The measure of ir_measures with a name such as "MRR@10", "nDCG@10", "MAP(rel=2)@1000".

    Raises:
        InputError: "unknown-measure".

    >>> parse_measure("R(rel=2)@100")["cutoff"]
    100
    """
    if not re.fullmatch(r"(nDCG|(MRR|R|MAP|P)(\(rel=[1-9][0-9]*\))?)@[1-9][0-9]*", name):
        raise InputError(
            "unknown-measure",
            f"{name!r} is not a measure; there are MRR@k, nDCG@k, R@k, MAP@k and P@k, and"
            " R(rel=2)@k for passages from grade 2 on (not for nDCG)",
        )
    return ir_measures.parse_measure(name)


def spelled(measures: Sequence[str], relevant_from: int) -> list[str]:
    """The measures with the lowest relevant grade of a split in their names, unless that is 1.

    TREC DL counts passages from grade 2 on. A measure that names its own grade, and nDCG, stay.

    >>> spelled(["MRR@10", "nDCG@10", "R(rel=1)@100"], relevant_from=2)
    ['MRR(rel=2)@10', 'nDCG@10', 'R(rel=1)@100']
    """
    grade = f"(rel={relevant_from})" if relevant_from > 1 else ""
    return [
        name if "(" in name or name.startswith("nDCG") else name.replace("@", f"{grade}@")
        for name in measures
    ]


def deepest(measures: Sequence[str]) -> int:
    """The deepest cutoff of the measures; a search must return at least this many passages.

    >>> deepest(["MRR@10", "R@1000"])
    1000
    """
    return max((parse_measure(name)["cutoff"] for name in measures), default=0)


def depth_of(run: Run, searched: int | None = None) -> int:
    """The depth of a run: its longest list, or the depth of the search that made it, if known."""
    return max(int(run.counts.max(initial=0)), searched or 0)


def too_deep(measures: Sequence[str], depth: int, passages: int) -> list[str]:
    """The measures that look deeper than a run: R@1000 of 100 passages is R@100.

    A run that ranks all `passages` of the collection suits every measure.

    >>> too_deep(["MRR@10", "R@1000"], depth=100, passages=5_000)
    ['R@1000']
    """
    return [name for name in measures if min(deepest([name]), passages) > depth]


def per_query(run: Run, qrels: Qrels, measures: Sequence[str]) -> dict[str, np.ndarray]:
    """Each measure [Q] float64 for each judged query of the collection, in their order.

    The run is scored in its order; pass `canonical(run, corpus)` where scores may tie.
    """
    wanted = {name: parse_measure(name) for name in measures}
    if not wanted:  # ir_measures needs one
        return {}
    rows, best = qrels.queries, run.top(deepest(measures))
    values = {measure: np.zeros(len(rows)) for measure in wanted.values()}
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
            for value in ir_measures.iter_calc(list(values), judged, ranked):
                values[value.measure][int(value.query_id)] = value.value
            done(len(some))
    return {name: values[measure] for name, measure in wanted.items()}


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
    names = queries.ids(rows)
    zero = dict.fromkeys(unknown.queries, 0.0)
    scored = {
        text: dict(zip(names, values.tolist(), strict=True)) | zero
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
    """The metrics.json of several collections, from the metrics of each finished one by folder.

    All groups weigh the same, however many queries they have. BEIR's average (Thakur et al. 2021,
    arXiv 2104.08663) counts CQADupStack's twelve forums as one collection: the mean of theirs.

    Args:
        groups: by folder, the group that counts once in the mean.
    """
    every = list(records.values())
    names = list(dict.fromkeys(groups[folder] for folder in records))

    def mean(overall: Sequence[dict[str, float]]) -> dict[str, float]:
        """The means of the measures that all have: TREC DL has MRR(rel=2)@10, others MRR@10."""
        of: dict[str, list[dict[str, float]]] = {}
        for folder, metrics in zip(records, overall, strict=True):
            of.setdefault(groups[folder], []).append(metrics)
        common = [name for name in overall[0] if all(name in one for one in overall)]
        return {
            name: fmean(fmean(one[name] for one in members) for members in of.values())
            for name in common
        }

    stages = []
    for parts in zip(*(record["stages"] for record in every), strict=True):
        stages.append(
            {
                "stage": parts[0]["stage"],
                "run": "",
                "run_xxh3": manifests.digest([part["run_xxh3"] for part in parts]),
                "overall": mean([part["overall"] for part in parts]),
                "seconds": sum(part["seconds"] for part in parts),
            }
        )
    digests = {name: [of["collection"]["digest"], of["split"]] for name, of in records.items()}
    return {
        "system": every[0]["system"] if every else "",
        "collection": {
            "name": ", ".join(names) if len(names) <= LISTED else f"{len(names)} collections",
            "digest": manifests.digest(digests),
        },
        "split": ", ".join(sorted({record["split"] for record in every})),
        "queries": sum(record["queries"] for record in every),
        "passages": sum(record["passages"] for record in every),
        "run": "",  # each collection has its own
        "seconds": sum(record["seconds"] for record in every),
        "overall": mean([record["overall"] for record in every]) if every else {},
        "stages": stages,
        "collections": {
            folder: {
                "group": groups[folder],
                "digest": record["collection"]["digest"],
                **{key: record[key] for key in ("split", "queries", "passages", "overall")},
                "stages": {stage["stage"]: stage["overall"] for stage in record["stages"]},
                "seconds": record["seconds"],
            }
            for folder, record in records.items()
        },
    }
