"""Reads `metrics.json` of finished runs: checks its shape, drops measures beyond a run's depth.

All reports read records through `read_metrics`. So a damaged file is reported in one sentence, and
no report shows R@1000 of a run that has 100 passages a query.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.retrieval.metrics import parse_measure, too_deep

TEXT, COUNT, NUMBER, FLOAT = "a text", "a whole number", "a finite number", "a number"
SCORES, MEASURES = "a number for each name", "a number for each measure"
LENGTHS = "scores for each length"
Shape = str | list[Any] | dict[str, Any]
"""A kind of value; a list of one shape; or shapes by key, `key?` where it may be left out or null,
`*` where any key may stand."""

STAGE: Shape = {
    "stage": TEXT,
    "run": TEXT,
    "run_xxh3": TEXT,
    "overall": MEASURES,
    "seconds": NUMBER,
    "gain?": NUMBER,
    "queries_per_second?": NUMBER,
    "depth?": COUNT,
}
MEMBER: Shape = {
    "group": TEXT,
    "stages": {"*": MEASURES},
    "digest?": TEXT,
    "split?": TEXT,
    "passages?": COUNT,
    "depths?": {"*?": COUNT},
}
RUN: Shape = {
    "overall?": SCORES,
    "stages?": [STAGE],
    "system?": TEXT,
    "facts?": {},
    "base_model?": TEXT,
    "updates?": COUNT,
    "monitored?": TEXT,
    "best?": FLOAT,
    "train_seconds?": NUMBER,
    "trained_parameters?": COUNT,
    "memory_gib?": NUMBER,
    "validation?": SCORES,
    "train?": SCORES,
    "read?": LENGTHS,
}
"""Of a training or an evaluation."""
SUITE: Shape = {"collections": {"*": MEMBER}, "failed": {"*": TEXT}}
EVALUATION: Shape = {
    "collection": {"name": TEXT, "digest": TEXT},
    "split": TEXT,
    "queries": COUNT,
    "passages": COUNT,
    "run": TEXT,
    "overall": MEASURES,
    "seconds": NUMBER,
}
"""Of an evaluation that has scores."""


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """`metrics.json` of a run directory as `to_depth` returns it, None if there is none.

    Raises:
        InputError: it is not JSON, or its values are not those that a run writes.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); run the evaluation again") from None
    wrong = next(_mistakes(record, RUN), None)
    if wrong is None and "collections" in record:
        wrong = next(_mistakes(record, SUITE), None)
    if wrong:
        raise _damaged(path, wrong)
    return to_depth({key: value for key, value in record.items() if value is not None})


def refuse_partial(folder: Path, record: dict[str, Any]) -> None:
    """Nothing, if an evaluation's record has all that goes with its scores.

    Raises:
        InputError: something is missing.
    """
    wrong = next(_mistakes(record, EVALUATION), None)
    if wrong:
        raise _damaged(folder / "metrics.json", wrong)


def _damaged(path: Path, wrong: str) -> InputError:
    return InputError(f"{path} is damaged: {wrong}; run its command again, or remove the file")


def to_depth(record: dict[str, Any]) -> dict[str, Any]:
    """The record without scores by measures that look deeper than the run they score.

    The record and each of its stages get `too_deep`, the measures that were dropped, and the record
    the `depth` of its last stage. Records of earlier versions name no depth and keep all scores.
    """
    passages = record.get("passages", 0)
    stages = [_cut(stage, stage.get("depth"), passages) for stage in record.get("stages", ())]
    depth = stages[-1].get("depth") if stages else None
    cut = _cut({**record, "depth": depth}, depth, passages)
    if "stages" in record:
        cut["stages"] = stages
    if "collections" in record:
        cut["collections"] = {name: _member(of) for name, of in record["collections"].items()}
    return cut


def _cut(scored: dict[str, Any], depth: int | None, passages: int) -> dict[str, Any]:
    scores = scored.get("overall", {})
    dropped = [] if depth is None else too_deep(list(scores), depth, passages)
    if not dropped:
        return {**scored, "too_deep": []}
    kept = {name: value for name, value in scores.items() if name not in dropped}
    cut = {**scored, "overall": kept, "too_deep": dropped}
    if next(iter(scores)) in dropped:  # a gain is in the first measure
        cut["gain"] = None
    return cut


def _member(of: dict[str, Any]) -> dict[str, Any]:
    """A collection of a suite, whose stages are scores by name."""
    depths = of.get("depths") or {}
    cut = {
        name: _cut({"overall": scores}, depths.get(name), of.get("passages") or 0)
        for name, scores in of["stages"].items()
    }
    return {
        **of,
        "stages": {name: one["overall"] for name, one in cut.items()},
        "too_deep": {name: one["too_deep"] for name, one in cut.items() if one["too_deep"]},
    }


def has_scores(record: dict[str, Any]) -> bool:
    """Whether it is of an evaluation with scores, even if its run is too short for all of them."""
    return "run" in record and bool(record.get("overall") or record.get("too_deep"))


def listed(found: Sequence[tuple[str, str, str, str]]) -> str:
    """Systems with what they were evaluated on, such as `bm25 (scifact test), mine (scifact dev)`.

    Args:
        found: (system, collection, its digest, split); digests are shown where they alone differ.
    """
    alike = len({(name, split) for _, name, _, split in found}) == 1
    return ", ".join(
        f"{system} ({name} {split}{f', digest {digest[:12]}' if alike else ''})"
        for system, name, digest, split in found
    )


# --- the shape of a record ----------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    # NaN compares false; integers beyond float cannot be printed as scores are.
    return type(value) in (int, float) and -1e15 < value < 1e15


def _is_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_measure(name: str) -> bool:
    try:
        parse_measure(name)
    except InputError:
        return False
    return True


KINDS: dict[str, Callable[[Any], bool]] = {
    TEXT: lambda value: isinstance(value, str),
    COUNT: lambda value: type(value) is int and 0 <= value < 1e15,
    NUMBER: _is_number,
    FLOAT: lambda value: type(value) in (int, float),
    SCORES: _is_scores,
    MEASURES: lambda value: _is_scores(value) and all(map(_is_measure, value)),
    LENGTHS: lambda value: (
        isinstance(value, dict) and all(k.isdecimal() and _is_scores(of) for k, of in value.items())
    ),
}


def _mistakes(value: Any, shape: Shape, place: str = "") -> Iterator[str]:
    """Where a value has another shape, such as `stages[1].seconds is not a number`."""
    if isinstance(shape, str):
        if not KINDS[shape](value):
            yield f"{place} is not {shape}"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{place} is not a list"
            return
        for i, one in enumerate(value):
            yield from _mistakes(one, shape[0], f"{place}[{i}]")
    elif not isinstance(value, dict):
        yield f"{place or 'it'} is not a JSON object"
    else:
        for pattern, inner in shape.items():
            key, optional = pattern.removesuffix("?"), pattern.endswith("?")
            for name in value if key == "*" else [key]:
                where = f"{place}.{name}" if place else name
                if value.get(name) is not None:
                    yield from _mistakes(value[name], inner, where)
                elif not optional:
                    yield f"{where} is missing"
