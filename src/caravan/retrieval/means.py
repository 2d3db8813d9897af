"""Means over the collections of a suite: each folder that was asked for counts once.

BEIR's average (Thakur et al. 2021, arXiv 2104.08663) takes CQADupStack's twelve forums as one
collection, whose figure is the mean of theirs; all collections weigh the same, however many queries
they have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from caravan.cli.suite import Member

LISTED = 4
"""Collections that a mean is named by; of more it is named by their number."""


def means(records: dict[Member, dict[str, Any]]) -> dict[str, Any]:
    """What a suite's metrics.json holds, from those of its finished collections."""
    own = {
        member.folder: {
            "group": member.group,
            "digest": record["collection"]["digest"],
            "split": record["split"],
            "queries": record["queries"],
            "passages": record["passages"],
            "overall": record["overall"],
            "stages": {stage["stage"]: stage["overall"] for stage in record["stages"]},
            "depths": {stage["stage"]: stage.get("depth") for stage in record["stages"]},
            "seconds": record["seconds"],
        }
        for member, record in records.items()
    }
    groups = list(dict.fromkeys(member.group for member in records))
    digests = {m.folder: [r["collection"]["digest"], r["split"]] for m, r in records.items()}
    last = next(iter(records.values()), {"system": "", "stages": []})
    runs = [[stage["run_xxh3"] for stage in record["stages"]] for record in records.values()]
    stages = [
        {
            "stage": stage["stage"],
            "run": "",
            "run_xxh3": _digest([run[i] for run in runs]),
            "depth": _depth(records.values(), i),
            "overall": _mean(
                (member.group, record["stages"][i]["overall"]) for member, record in records.items()
            ),
            "seconds": sum(record["stages"][i]["seconds"] for record in records.values()),
        }
        for i, stage in enumerate(last["stages"])
    ]
    return {
        "system": last["system"],
        "collection": {
            "name": ", ".join(groups) if len(groups) <= LISTED else f"{len(groups)} collections",
            "digest": _digest(digests),
        },
        "split": ", ".join(sorted({record["split"] for record in records.values()})),
        "queries": sum(record["queries"] for record in records.values()),
        "passages": sum(record["passages"] for record in records.values()),
        "run": "",  # each collection has its own
        "seconds": sum(record["seconds"] for record in records.values()),
        "overall": _mean((member.group, record["overall"]) for member, record in records.items()),
        "stages": stages,
        "collections": own,
    }


def _mean(figures: Iterable[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """The mean, over groups, of each measure that all have; a group is the mean of its members.

    Measures differ where splits do: TREC DL's passages have MRR(rel=2)@10 where others have MRR@10.
    """
    groups: dict[str, list[dict[str, float]]] = {}
    for group, overall in figures:
        groups.setdefault(group, []).append(overall)
    every = [overall for members in groups.values() for overall in members]
    names = [name for name in every[0] if all(name in one for one in every)] if every else []
    return {
        name: fmean(fmean(one[name] for one in members) for members in groups.values())
        for name in names
    }


def _depth(records: Iterable[dict[str, Any]], stage: int) -> int | None:
    """The depth of a stage's shallowest run; None where each ranks all passages of its collection.

    Evaluations of earlier versions have no depth.
    """
    found = [(record["stages"][stage].get("depth"), record["passages"]) for record in records]
    return min(
        (depth for depth, passages in found if depth is not None and depth < passages),
        default=None,
    )


def _digest(data: Any) -> str:
    import xxhash

    return xxhash.xxh3_128(json.dumps(data, sort_keys=True).encode()).hexdigest()
