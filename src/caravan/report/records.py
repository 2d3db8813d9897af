"""Reads `metrics.json` of finished runs: checks its values, drops measures beyond a run's depth.

Every report reads it through `read_metrics`: a damaged file is an error of one sentence, and no
report shows R@1000 of a run with 100 passages a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from caravan.errors import InputError
from caravan.manifests import read_json
from caravan.retrieval.metrics import parse_measure, too_deep

JudgedOn = tuple[str, str, str]
"""A collection, its digest and a split."""

Records = dict[str, dict[str, Any]]
"""`metrics.json` of evaluations, or of the systems in them, by name."""


def _measure(name: str) -> str:
    parse_measure(name)
    return name


# Integers beyond the bounds cannot be printed as scores are.
Number = Annotated[float, Field(gt=-1e15, lt=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=10**15)]
Scores = dict[Annotated[str, AfterValidator(_measure)], Number]


class _Shape(BaseModel):
    """A JSON object whose values are not converted and that may have other keys."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Collection(_Shape):
    name: str
    digest: str


class _Stage(_Shape):
    stage: str
    run: str
    run_xxh3: str
    overall: Scores
    seconds: Number
    gain: Number | None = None
    queries_per_second: Number | None = None
    depth: Count | None = None


class _Reading(_Shape):
    query_length: Count | None
    passage_length: Count | None
    segment: Literal["first", "best"] | None
    segment_words: Count
    scores: dict[str, Number]
    tokens_per_query: Number | None = None
    tokens_per_passage: Number | None = None
    seconds: Number | None = None
    memory_gib: Number | None = None


class _Facts(_Shape):
    bytes_per_vector: Count | None = None


class _Run(_Shape):
    """Of a training or an evaluation, finished or not."""

    system: str | None = None
    base_model: str | None = None
    monitored: str | None = None
    best: float | None = None
    updates: Count | None = None
    passages: Count | None = None
    trained_parameters: Count | None = None
    train_seconds: Number | None = None
    memory_gib: Number | None = None
    overall: dict[str, Number] | None = None
    validation: dict[str, Number] | None = None
    train: dict[str, Number] | None = None
    read: list[_Reading] | None = None
    facts: _Facts | None = None
    stages: list[_Stage] | None = None


class _Member(_Shape):
    group: str
    stages: dict[str, Scores]
    digest: str | None = None
    split: str | None = None
    passages: Count | None = None
    depths: dict[str, Count | None] | None = None


class _Suite(_Run):
    collections: dict[str, _Member]
    failed: dict[str, str]


class _Evaluation(_Shape):
    """An evaluation that has scores."""

    collection: _Collection
    split: str
    run: str
    queries: Count
    passages: Count
    overall: Scores
    seconds: Number


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """`metrics.json` of a run directory as `to_depth` returns it, None if there is none.

    Raises:
        InputError: If it is not JSON, or a value has another type than a run writes.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    record = read_json(path)
    _validate(path, _Suite if "collections" in record else _Run, record)
    return to_depth({key: value for key, value in record.items() if value is not None})


def refuse_partial(folder: Path, record: dict[str, Any]) -> None:
    """Raise an InputError if an evaluation's record is not complete."""
    _validate(folder / "metrics.json", _Evaluation, record)


def _validate(path: Path, shape: type[_Shape], record: Any) -> None:
    try:
        shape.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        message = f"{path} is damaged: {place}: {first['msg']}; run its command again, or remove it"
        raise InputError("damaged-file", message) from None


def to_depth(record: dict[str, Any]) -> dict[str, Any]:
    """The record without scores by measures that look deeper than the run.

    The record and each of its stages get `too_deep`, the measures that were dropped, and the record
    the `depth` of its last stage. Without a recorded depth all scores stay.
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
    cut = {**scored, "too_deep": [*scored.get("too_deep", []), *dropped]}
    if dropped:
        cut["overall"] = {name: value for name, value in scores.items() if name not in dropped}
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
    stages = {name: one["overall"] for name, one in cut.items()}
    short = {name: one["too_deep"] for name, one in cut.items() if one["too_deep"]}
    return {**of, "stages": stages, "too_deep": {**of.get("too_deep", {}), **short}}


def has_scores(record: dict[str, Any]) -> bool:
    """Whether it is of an evaluation with scores, even if its run is too short for all of them."""
    return "run" in record and bool(record.get("overall") or record.get("too_deep"))


def bytes_per_vector(record: Mapping[str, Any]) -> int | None:
    """The bytes of a passage's vector that the search of an evaluation reads; None if unknown."""
    size: int | None = record.get("facts", {}).get("bytes_per_vector")
    return size


def judged_on(record: dict[str, Any]) -> JudgedOn:
    return record["collection"]["name"], record["collection"]["digest"], record["split"]


def refuse_mixed(judged_on: Mapping[str, JudgedOn], remedy: str) -> None:
    """Raise an InputError if systems are of different collections or splits."""
    if len({(digest, split) for _, digest, split in judged_on.values()}) > 1:
        found = ", ".join(
            f"{system} ({name} {split}, digest {digest[:12]})"
            for system, (name, digest, split) in judged_on.items()
        )
        message = f"these are of different collections or splits: {found}; {remedy}"
        raise InputError("mixed-collections", message)


def path_names(path: Path) -> list[str]:
    """The ends of a path, the shortest first: candidates for `distinct`.

    >>> path_names(Path("/runs/mine/bm25"))
    ['bm25', 'mine/bm25', 'runs/mine/bm25']
    """
    parts = path.as_posix().strip("/").split("/")
    return ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def distinct(candidates: Sequence[Sequence[str]]) -> list[str]:
    """A name for each that no other has: its first candidate, or a later one if names are equal.

    >>> distinct([["bm25"], ["bm25", "a/bm25"], ["bm25", "b/bm25"], ["fused", "b/fused"]])
    ['bm25', 'a/bm25', 'b/bm25', 'fused']
    """
    at = [0] * len(candidates)
    while True:
        names = [of[i] for of, i in zip(candidates, at, strict=True)]
        again = [n for n, of in enumerate(candidates) if names.count(names[n]) > 1]
        again = [n for n in again if at[n] + 1 < len(candidates[n])]
        if not again:
            return names
        for n in again:
            at[n] += 1
