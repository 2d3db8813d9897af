"""What runs have left as metrics.json, read without anything heavy, and how they are told of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caravan.errors import InputError


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """`metrics.json` of a run directory, None if there is none.

    Raises:
        InputError: it is not JSON.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); run the evaluation again") from None
    return record if isinstance(record, dict) else None


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
