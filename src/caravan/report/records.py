"""`metrics.json` of finished runs, checked, and jobs of sweeps.

Every report reads it through `read_metrics`: a damaged file is an error of one sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from caravan.errors import InputError
from caravan.manifests import read_json
from caravan.report import jobs
from caravan.retrieval.metrics import parse_measure, too_deep


def _measure(name: str) -> str:
    parse_measure(name)
    return name


# Integers beyond the bounds cannot be printed as scores are.
Number = Annotated[float, Field(gt=-1e15, lt=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=10**15)]
Scores = dict[Annotated[str, AfterValidator(_measure)], Number]


class _Shape(BaseModel):
    """A JSON object whose values are not converted; keys that no report reads are left out."""

    model_config = ConfigDict(strict=True)


Shape = TypeVar("Shape", bound=_Shape)


class Scored(_Shape):
    """Mean scores of a run; a measure that looks deeper than the run is missing."""

    overall: Scores
    seconds: Number = 0.0


class Stage(Scored):
    """A stage of an evaluation, which wrote a run."""

    stage: str
    run: str
    run_xxh3: str
    depth: Count | None = None  # of the run
    seconds: Number
    gain: Number | None = None  # in the first measure
    queries_per_second: Number | None = None


class _Collection(_Shape):
    name: str
    digest: str


class _Facts(_Shape):
    bytes_per_vector: Count | None = None


class Evaluation(Scored):
    """An evaluation of one collection; its scores are those of the last stage."""

    stages: list[Stage] = []
    system: str
    collection: _Collection
    split: str
    run: str  # relative to the run directory; empty for a suite
    queries: Count
    passages: Count
    seconds: Number
    facts: _Facts = _Facts()

    @model_validator(mode="after")
    def _leave_out_too_deep(self) -> Self:
        """Earlier versions wrote measures that look deeper than the run."""
        for stage in self.stages:
            if stage.depth is not None:
                for name in too_deep(list(stage.overall), stage.depth, self.passages):
                    stage.overall.pop(name)
                    if stage is self.stages[-1]:
                        self.overall.pop(name, None)
        return self

    @property
    def where(self) -> str:
        """Name and split of the collection."""
        return f"{self.collection.name} {self.split}"


class Member(_Shape):
    """A collection of a suite, with scores by stage."""

    group: str
    digest: str
    split: str
    stages: dict[str, Scores]


class Suite(Evaluation):
    """An evaluation of several collections; its scores are their mean."""

    collections: dict[str, Member]
    failed: dict[str, str]


class Reading(_Shape):
    """Scores of a trained model with other text lengths, and their cost."""

    query_length: Count | None
    passage_length: Count | None
    segment: Literal["first", "best"] | None
    segment_words: Count
    scores: dict[str, Number]
    tokens_per_query: Number | None = None
    tokens_per_passage: Number | None = None
    seconds: Number | None = None
    memory_gib: Number | None = None


class Training(_Shape):
    updates: Count = 0
    base_model: str | None = None
    collection: str | None = None
    monitored: str | None = None
    best: float | None = None
    trained_parameters: Count | None = None
    train_seconds: Number | None = None
    memory_gib: Number | None = None
    validation: dict[str, Number] = {}
    train: dict[str, Number] = {}
    read: list[Reading] = []


class Job(_Shape):
    """A job of a sweep (`caravan.report.jobs`)."""

    overrides: dict[str, str]
    state: str
    error: str | None = None


def read_metrics(folder: Path) -> Training | Evaluation | None:
    """`metrics.json` of a run directory, None if there is none.

    Raises:
        InputError: If it is not JSON, or a value is missing or has another type than a run writes.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    record = read_json(path)
    if "overall" not in record:
        return _checked(Training, record, path)
    return _checked(Suite if "collections" in record else Evaluation, record, path)


def read_jobs(folder: Path) -> dict[Path, Job]:
    """The jobs below a folder by run_dir, in order, without those of sweeps in folders below.

    Raises:
        InputError: If the file of a job is damaged.
    """
    others = {path.parent for name in jobs.SWEEP for path in folder.rglob(name)} - {folder}
    return {
        path.parent: _checked(Job, read_json(path), path)
        for path in sorted(folder.rglob(jobs.FILE))
        if others.isdisjoint(path.parents)
    }


def measures_of(scored: Iterable[Scored]) -> list[str]:
    """The measures of several systems or stages, each once, in the order met."""
    return list(dict.fromkeys(measure for one in scored for measure in one.overall))


def _checked(kind: type[Shape], record: dict[str, Any], path: Path) -> Shape:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = f"{path} is damaged: {place}: {first['msg']}; run its command again, or remove it"
        raise InputError("damaged-file", message) from None


def refuse_repeated(paths: Sequence[Path]) -> None:
    """Raise an InputError if a file or folder is given twice."""
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise InputError("given-twice", f"{path} is given twice; name each one once")


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
