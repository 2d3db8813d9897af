"""What an evaluation's results depend on, and whether a run_dir may be used for it.

The same inputs give the same results: what is finished is reused, what was interrupted continues.
Other inputs make another evaluation, which must not replace the results of the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caravan import manifests
from caravan.cli.suite import Member
from caravan.data.collection import Collection
from caravan.encoding import FILE
from caravan.errors import InputError, OccupiedError
from caravan.retrieval.folders import Folders


def inputs_of(
    settings: dict[str, Any], collection: Collection, split: str, folders: Folders
) -> dict[str, Any]:
    """The data, systems and settings that determine the results of an evaluation.

    Measures are left out, since they only score the runs, and so is what changes nothing but the
    last digits: how much is computed at a time, and the versions. Each stage's manifest has those.
    """
    asked = settings["retriever"]
    names = [str(name) for name in (asked if isinstance(asked, list) else [asked])]
    systems = {str(number): _system(name, folders) for number, name in enumerate(names, start=1)}
    inputs: dict[str, Any] = {
        "collection": collection.digest,
        "split": split,
        "ignore_identical_ids": settings["ignore_identical_ids"],
        "retriever": systems,
        "k": settings["index"]["k"],
    }
    dense = any(_is_model(Path(name)) for name in names)
    if "bm25" in names:
        inputs["bm25"] = settings["bm25"]
    if dense:
        inputs |= {key: settings[key] for key in ("index", "query_length", "passage_length")}
    if len(names) > 1:
        inputs["fuse"] = settings["fuse"]
    if (reranker := settings["reranker"]) is not None:
        inputs["reranker"] = _system(str(reranker), folders)
        inputs["rerank"] = {k: v for k, v in settings["rerank"].items() if k != "block"}
    if dense or reranker is not None:
        inputs |= {key: settings[key] for key in ("precision", "attention")}
    return inputs


def suite_inputs(members: list[Member]) -> dict[str, Any]:
    """The collections of a mean, and what counts as one of them; each has its own inputs."""
    return {"collections": {member.folder: member.group for member in members}}


def _is_model(path: Path) -> bool:
    return path.is_dir() or path.name == FILE


def _system(name: str, folders: Folders) -> str:
    """BM25, or the content of a model folder or a run."""
    path = Path(name)
    if name == "bm25" or not path.exists():  # the stage reports what is missing
        return name
    return folders.digest(path) if _is_model(path) else manifests.content_digest(path)


def refuse_another(run_dir: Path, inputs: dict[str, Any]) -> None:
    """Refuse a run_dir that holds the results of another evaluation, or a training.

    An evaluation that failed, or was interrupted before it had metrics, may be started again with
    other settings: its embeddings and scores stay in the store.

    Raises:
        OccupiedError: it holds a training, or the metrics of other data, systems or settings.
    """
    if (run_dir / "checkpoints").exists() or (run_dir / "model").exists():
        raise OccupiedError(
            f"{run_dir} holds a training run; choose another name= for the evaluation"
        )
    metrics = run_dir / "metrics.json"
    if not metrics.exists() or manifests.matches(record_of(run_dir), inputs):
        return
    if "collections" in inputs and _failed(metrics):
        return
    lines = manifests.differences(record_of(run_dir), inputs)
    lines.sort(key=lambda line: "unset" in line)
    differs = f"it differs in {'; '.join(lines[:3])}"
    if manifests.read(record_of(run_dir)) is None:
        differs = "no record there says of which data, systems and settings"
    raise OccupiedError(
        f"{run_dir} holds another evaluation already ({differs});"
        " choose another name=, or remove the folder"
    )


def record_of(run_dir: Path) -> Path:
    """The file whose manifest has the inputs of the evaluation."""
    return run_dir / "config.yaml"


def _failed(metrics: Path) -> bool:
    """Whether collections that failed are missing from the existing mean."""
    try:
        return bool(manifests.read_json(metrics).get("failed"))
    except InputError:
        return True
