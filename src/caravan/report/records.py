"""What runs have left as metrics.json, read without anything heavy, and how they are told of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caravan import manifest
from caravan.errors import InputError


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """`metrics.json` of a run directory, None if there is none.

    Raises:
        InputError: it is damaged: no JSON object, or not what its manifest recorded.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    metrics = manifest.read_json(path)
    written = (manifest.read(path) or {}).get("facts", {}).get("xxh3")
    if written not in (None, manifest.content_digest(path)):
        raise InputError(f"{path} is not as it was written; run the same evaluation again")
    return metrics


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
