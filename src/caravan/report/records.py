"""`metrics.json` of finished runs, checked and cut to the depth of each run, and jobs of sweeps.

Every report reads it through `read_metrics`: a damaged file is an error of one sentence, and no
report shows R@1000 of a run with 100 passages a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    """Mean scores of a run.

    Attributes:
        depth: of the run; None if unknown.
        too_deep: the measures that look deeper than the run, whose scores are left out.
    """

    overall: Scores
    seconds: Number = 0.0
    depth: Count | None = None
    too_deep: list[str] = []

    def cut(self, passages: int) -> Self:
        """Leave out the scores beyond the depth; without a depth all stay."""
        if self.depth is not None:
            self.too_deep = too_deep(list(self.overall), self.depth, passages)
            kept = {name: of for name, of in self.overall.items() if name not in self.too_deep}
            self.overall = kept
        return self


class Stage(Scored):
    """A stage of an evaluation, which wrote a run."""

    stage: str
    run: str
    run_xxh3: str
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
    def _to_depth(self) -> Self:
        for stage in self.stages:
            first = next(iter(stage.overall), None)
            stage.cut(self.passages)
            if first in stage.too_deep:
                stage.gain = None
        self.depth = self.stages[-1].depth if self.stages else None
        return self.cut(self.passages)

    @property
    def where(self) -> str:
        """Name and split of the collection."""
        return f"{self.collection.name} {self.split}"


class Member(_Shape):
    """A collection of a suite, with scores and depths by stage."""

    group: str
    digest: str
    split: str
    stages: dict[str, Scores]
    depths: dict[str, Count | None] = {}
    passages: Count = 0

    def scored(self) -> dict[str, Scored]:
        return {
            name: Scored(overall=scores, depth=self.depths.get(name)).cut(self.passages)
            for name, scores in self.stages.items()
        }


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


def read_jobs(folder: Path) -> tuple[dict[Path, Job], list[Path]]:
    """The jobs below a folder, and the folders of other sweeps, whose jobs are left out.

    Returns:
        The jobs by run_dir, in order, and the folders below this one that are sweeps.

    Raises:
        InputError: If the file of a job is damaged.
    """
    marked = {path.parent for name in jobs.SWEEP for path in folder.rglob(name)} - {folder}
    found, others = {}, set()
    for path in sorted(folder.rglob(jobs.FILE)):
        if inside := marked.intersection(path.parents):
            others |= inside
        else:
            found[path.parent] = _checked(Job, read_json(path), path)
    return found, sorted(others)


def _checked(kind: type[Shape], record: dict[str, Any], path: Path) -> Shape:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = f"{path} is damaged: {place}: {first['msg']}; run its command again, or remove it"
        raise InputError("damaged-file", message) from None


def refuse_mixed(evaluations: Mapping[str, Evaluation], remedy: str) -> None:
    """Raise an InputError if evaluations are of different collections or splits."""
    if len({(one.collection.digest, one.split) for one in evaluations.values()}) > 1:
        found = ", ".join(
            f"{name} ({one.where}, digest {one.collection.digest[:12]})"
            for name, one in evaluations.items()
        )
        message = f"these are of different collections or splits: {found}; {remedy}"
        raise InputError("mixed-collections", message)


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
