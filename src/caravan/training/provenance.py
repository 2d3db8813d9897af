"""What a run's weights depend on, and whether a run_dir may be gone on with.

Inputs are settings, the collection's digest, and the content of every run and model that is read.
The same inputs mean the same weights: a finished run is not done again. Other inputs mean another
run, which must neither overwrite the first nor take its name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caravan import manifests
from caravan.data.collection import Collection
from caravan.errors import InputError, OccupiedError
from caravan.models.digests import files_digest, folder_digest

log = logging.getLogger(__name__)

# Settings that change how a run is done, not what comes out of it.
_NO_INPUTS = (
    *("resume", "cache_dir", "run_dir", "name", "logger"),
    *("batching.num_workers", "callbacks.progress", "callbacks.lines"),
    "trainer.enable_progress_bar",
)
# What a resumed run may change: how long it trains, where, and how it is watched. Anything else
# would give the weights of one run the name of another.
_MAY_CHANGE = (
    *("trainer.max_steps", "trainer.max_epochs", "strategy"),
    *("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "batching.token_budget"),
    *("callbacks", "validation", "ignore_identical_ids", "index"),
    *("trainer.log_every_n_steps", "trainer.enable_model_summary"),
)


def inputs_of(settings: dict[str, Any], collection: Collection | None) -> dict[str, Any]:
    """What determines the weights: settings, collection, and the content of all that is read."""
    from caravan.models import hardware

    kept = _pruned(settings)
    kept["precision"] = hardware.resolve(settings["precision"])
    searched = settings["validation"]["run"]
    kept["validation"] = {
        **settings["validation"],
        "run_digest": None if searched is None else _run_digest(searched, collection),
    }
    name = settings["backbone"].get("name")
    weights = files_digest(Path(name)) if name and Path(name).is_dir() else None
    begun_with = settings["init_from"]
    inputs = {
        "collection": collection.digest if collection else None,
        "runs": {
            str(path): _run_digest(path, collection) for path in _sampled(settings["sampler"] or {})
        },
        "backbone_digest": weights,
        "init_from_digest": begun_with and folder_digest(Path(begun_with)),
        **kept,
    }
    # Where things are written is no input either.
    return _without(inputs, str(settings["run_dir"]))


def _sampled(sampler: dict[str, Any]) -> list[str]:
    """The runs that a sampler reads."""
    return [*(sampler.get("runs") or ()), *filter(None, [sampler.get("teacher")])]


def _pruned(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without `_NO_INPUTS`."""
    kept = {key: value for key, value in settings.items() if key not in _NO_INPUTS}
    for group, _, key in (name.partition(".") for name in _NO_INPUTS):
        if key and isinstance(kept.get(group), dict):
            kept[group] = {name: value for name, value in kept[group].items() if name != key}
    return kept


def _run_digest(name: str, collection: Collection | None) -> str:
    path = name if collection is None else collection.run_path(name)
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such run; write it with evaluate.py (retriever=bm25 or a model"
            " folder) over the same collection"
        )
    return manifests.content_digest(Path(path))


def _without(tree: Any, run_dir: str) -> Any:
    if isinstance(tree, dict):
        return {key: _without(value, run_dir) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without(value, run_dir) for value in tree]
    return tree.replace(run_dir, "<run_dir>") if isinstance(tree, str) else tree


def file_digests(model_dir: Path) -> dict[str, str]:
    """Digests of `metrics.json` and of the model's files, by path relative to the model folder.

    The model card is left out, since it may be written again.
    """
    files = [path for path in sorted(model_dir.rglob("*")) if path.name != "README.md"]
    return {
        os.path.relpath(path, model_dir): manifests.content_digest(path)
        for path in (model_dir.with_name("metrics.json"), *files)
        if path.is_file()
    }


def finished(model_dir: Path, inputs: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The facts of a finished training from these inputs; None if there is none.

    Raises:
        InputError: its metrics or files of its model folder are missing or have changed, and
            `resume`, which writes them again, is off.
    """
    if not manifests.matches(model_dir, inputs):
        return None
    facts = _section(manifests.read(model_dir), "facts")
    if "best" not in facts:
        return None
    there, recorded = file_digests(model_dir), _section(facts, "files")
    damaged = [name for name, digest in recorded.items() if there.get(name) != digest]
    if damaged:
        path = os.path.normpath(model_dir / damaged[0])
        told = f"{path} is missing or has changed since the training wrote it"
        if not resume:
            raise InputError(
                f"{told}; write it again with resume=true, or put back a copy of the file"
            )
        log.warning("%s; it is written again", told)
        return None
    changed = _other_versions(facts)
    if changed:
        log.info("%s was trained under other versions: %s", model_dir, changed)
    return facts


def _section(record: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """A mapping within a manifest; empty where it is missing or something else."""
    found = (record or {}).get(name)
    return found if isinstance(found, dict) else {}


def _other_versions(facts: dict[str, Any]) -> str:
    """How the versions in a manifest's facts differ from those of now: `torch 2.9.0 -> 2.13.0`."""
    before, now = _section(facts, "versions"), manifests.versions()
    return ", ".join(
        f"{name} {before.get(name, 'unknown')} -> {version}"
        for name, version in now.items()
        if before.get(name) != version
    )


def refuse_other_run(run_dir: Path, begun: Path, inputs: dict[str, Any], resume: bool) -> None:
    """Neither overwrite a run or an evaluation, nor continue a run that is another.

    Raises:
        OccupiedError: run_dir is not this run's.
    """
    kept = ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "model")
    if not any((run_dir / name).exists() for name in kept):
        if _is_of_evaluation(run_dir, begun):
            raise OccupiedError(
                f"{run_dir} holds an evaluation; choose another name= for the training"
            )
        return  # it failed before there was anything to lose
    changed = manifests.differences(begun, inputs)
    if not resume:
        raise OccupiedError(
            f"{run_dir} holds a run already"
            + (f" (it differs in {'; '.join(changed[:3])})" if changed else ", not finished")
            + "; continue it with resume=true, choose another name=, or remove the folder"
        )
    another = [line for line in changed if not _is_of(line, _MAY_CHANGE + _NO_INPUTS)]
    if another:
        raise OccupiedError(
            f"{run_dir} cannot be resumed, for it holds another run: {'; '.join(another[:3])}"
            + (f" and {len(another) - 3} more" if len(another) > 3 else "")
            + "; give the settings and data of that one, choose another name=, or remove the folder"
        )
    for line in changed:
        if not _is_of(line, _NO_INPUTS):
            log.warning("resumed with another setting: %s", line)
    versions = _other_versions(_section(manifests.read(begun), "facts"))
    if versions:
        log.warning(
            "resumed under other versions, so the weights may differ from those of an uninterrupted"
            " run: %s",
            versions,
        )


def _is_of_evaluation(run_dir: Path, begun: Path) -> bool:
    """Whether a run_dir without weights has the record or, without a record, metrics of one."""
    record = manifests.read(begun)
    if record is None:
        return (run_dir / "metrics.json").exists()
    inputs = _section(record, "inputs")
    return "retriever" in inputs or "collections" in inputs  # see `caravan.retrieval.inputs`


def _is_of(difference: str, places: Sequence[str]) -> bool:
    """Whether a line of `manifests.differences` is about one of these settings."""
    key = difference.partition(": ")[0]
    return any(key == place or key.startswith(f"{place}.") for place in places)
