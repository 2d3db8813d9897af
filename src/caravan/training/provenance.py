"""Inputs that determine a run's weights, and whether a run_dir is finished, resumable or another's.

Inputs are settings, the collection's digest, and the content of every run and model that is read.
They are recorded beside config.yaml when training starts and beside the model folder when it ends
(`caravan.manifests`). Equal inputs mean equal weights: a finished run is not repeated. Other inputs
mean another run, which must neither overwrite the first nor continue it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caravan import manifests
from caravan.data.mixture import Part
from caravan.errors import InputError, OccupiedError
from caravan.models import hardware
from caravan.models.digests import files_digest, folder_digest

log = logging.getLogger(__name__)

NOT_INPUTS = (
    "resume", "cache_dir", "run_dir", "name", "logger", "batching.num_workers",
    "callbacks.progress", "callbacks.progress_log", "trainer.enable_progress_bar",
)  # fmt: skip
"""Settings that have no effect on the weights; not recorded."""
MAY_CHANGE = (
    "trainer.max_steps", "trainer.max_epochs", "trainer.devices", "trainer.num_nodes",
    "trainer.accelerator", "trainer.log_every_n_steps", "trainer.enable_model_summary", "strategy",
    "batching.token_budget", "callbacks", "validation", "ignore_identical_ids", "index",
)  # fmt: skip
"""Settings that a resumed run may change: how long it trains, where, and how it is monitored."""


def inputs_of(settings: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """The inputs that determine the weights, from the resolved config as plain data."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            value = {name: of for name, of in value.items() if f"{key}.{name}" not in NOT_INPUTS}
        if key not in NOT_INPUTS:
            kept[key] = value
    if not settings["distillation"]["teacher"]:
        del kept["distillation"]  # as in trainings of older versions
    if kept.get("peft") and not kept["peft"].get("bf16_norms"):
        kept["peft"].pop("bf16_norms", None)  # likewise
    each = {part.name: _digests(settings, part) for part in parts} or {"": _digests(settings)}
    digests = each.get("") or {  # of a mixture: by the names of its collections
        key: {name: of[key] for name, of in each.items()}
        for key in ("collection", "runs", "validation")
    }
    name, model_dir = settings["backbone"].get("name"), settings["backbone"].get("folder")
    inputs = {
        "collection": digests["collection"],
        "runs": digests["runs"],
        "backbone_digest": files_digest(Path(name)) if name and Path(name).is_dir() else None,
        "folder_digest": model_dir and folder_digest(Path(model_dir)),
        **kept,
        "precision": hardware.resolve(settings["precision"]),
        "validation": {**settings["validation"], "run_digest": digests["validation"]},
    }
    found: dict[str, Any] = _without(inputs, str(settings["run_dir"]))
    return found


def _digests(settings: dict[str, Any], part: Part | None = None) -> dict[str, Any]:
    """Digests of a collection, of the runs over its queries, and of its candidates."""
    sampler, candidates = settings["sampler"] or {}, settings["validation"]["run"]
    runs, collection = sampler.get("runs") or (), None
    if part is not None:
        collection, candidates = part.collection, part.entry.validation_run or candidates
        runs = runs if part.entry.runs is None else part.entry.runs
    runs = [*runs, *filter(None, [sampler.get("teacher")])]
    return {
        "collection": collection.digest if collection else None,
        "runs": {str(run): _run_digest(run, collection) for run in runs},
        "validation": None if candidates is None else _run_digest(candidates, collection),
    }


def _without(tree: Any, run_dir: str) -> Any:
    """The inputs with the run_dir in texts replaced: where a run is written is no input."""
    if isinstance(tree, dict):
        return {key: _without(value, run_dir) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without(value, run_dir) for value in tree]
    return tree.replace(run_dir, "<run_dir>") if isinstance(tree, str) else tree


def _run_digest(name: str, collection: Any) -> str:
    path = Path(name if collection is None else collection.run_path(name))
    if not path.is_file():
        raise InputError(
            "file-not-found",
            f"{path}: no such run; write it with evaluate.py (retriever=bm25 or a model folder)"
            " over the same collection",
        )
    return manifests.content_digest(path)


def file_digests(model_dir: Path) -> dict[str, str]:
    """Digests of `metrics.json` and the model's files, by path relative to the model folder.

    The model card is left out, since it may be rewritten.
    """
    files = [path for path in sorted(model_dir.rglob("*")) if path.name != "README.md"]
    return {
        os.path.relpath(path, model_dir): manifests.content_digest(path)
        for path in (model_dir.with_name("metrics.json"), *files)
        if path.is_file()
    }


def finished(model_dir: Path, inputs: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The facts of a finished training with these inputs; None if there is none.

    Raises:
        InputError: Its metrics or model files are missing or have changed, and without `resume`
            they are not written again.
    """
    if not manifests.matches(model_dir, inputs):
        return None
    facts, present = manifests.facts(model_dir), file_digests(model_dir)
    if "best" not in facts:
        return None
    damaged = [name for name, of in facts.get("files", {}).items() if present.get(name) != of]
    if damaged:
        path = os.path.normpath(model_dir / damaged[0])
        problem = f"{path} is missing or has changed since the training wrote it"
        if not resume:
            raise InputError(
                "changed-file",
                f"{problem}; write it again with resume=true, or put back a copy of the file",
            )
        log.warning("%s; writing it again", problem)
        return None
    if changed := _other_versions(facts):
        log.info("%s was trained under other versions: %s", model_dir, changed)
    return facts


def refuse_other_run(run_dir: Path, config: Path, inputs: dict[str, Any], resume: bool) -> None:
    """Neither overwrite a run or an evaluation, nor resume another run.

    Args:
        config: the config.yaml, whose manifest has the inputs of the run that started here.

    Raises:
        OccupiedError: run_dir holds another run.
    """
    code, record = "run-dir-occupied", manifests.read(config)
    kept = ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "model")
    if not any((run_dir / name).exists() for name in kept):
        lost = record is None and (run_dir / "metrics.json").exists()
        of = record["inputs"] if record else {}  # `caravan.retrieval.systems`
        if lost or "retriever" in of or "collections" in of:
            text = f"{run_dir} holds an evaluation; choose another name= for the training"
            raise OccupiedError(code, text)
        return  # it failed before there was anything to lose
    changed = manifests.differences(config, inputs)
    if not resume:
        state = f"it differs in {'; '.join(changed[:3])}" if changed else "not finished"
        raise OccupiedError(
            code,
            f"{run_dir} already holds a run ({state}); continue it with resume=true, choose another"
            " name=, or remove the folder",
        )
    allowed = tuple(f"{key}." for key in MAY_CHANGE)
    other = [line for line in changed if not f"{line.partition(': ')[0]}.".startswith(allowed)]
    if other:
        raise OccupiedError(
            code,
            f"{run_dir} cannot be resumed, for it holds another run: {'; '.join(other[:3])}; give"
            " the settings and data of that one, choose another name=, or remove the folder",
        )
    for line in changed:
        log.warning("resumed with another setting: %s", line)
    if versions := _other_versions(manifests.facts(config)):
        log.warning(
            "resumed under other versions, so the weights may differ from those of an uninterrupted"
            " run: %s",
            versions,
        )


def _other_versions(facts: dict[str, Any]) -> str:
    """The versions that differ from a manifest's, such as `torch 2.9.0 -> 2.13.0`."""
    before, now = facts.get("versions", {}), manifests.versions()
    return ", ".join(
        f"{name} {before.get(name, 'unknown')} -> {version}"
        for name, version in now.items()
        if before.get(name) != version
    )
