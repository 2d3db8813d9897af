"""What runs have left as metrics.json, read without anything heavy, and how they are told of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.manifest import read_json


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """`metrics.json` of a run directory, None if there is none.

    Raises:
        InputError: it is no JSON object, or not what a command has written.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    metrics = read_json(path)
    if "overall" in metrics and not _is_evaluation(metrics):
        raise InputError(
            f"{path} is damaged: it lacks results, or has some of another kind; delete it, and run"
            " the same evaluation again"
        )
    return metrics


def _is_evaluation(metrics: dict[str, Any]) -> bool:
    """Whether what reports read of an evaluation has the types that `evaluate.py` writes."""
    stages, parts = metrics.get("stages", []), metrics.get("collections", {})
    if not isinstance(stages, list) or not isinstance(parts, dict):
        return False
    scored = [metrics, *stages, *parts.values()]
    return isinstance(metrics.get("collection", {}), dict) and all(
        isinstance(one, dict)
        and isinstance(one.get("overall"), dict)
        and all(type(value) in (int, float) for value in one["overall"].values())
        for one in scored
    )


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
