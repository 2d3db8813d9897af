"""What became of each job of a sweep, as a file in its folder.

    run_dir/job.json    {"overrides": {key: value}, "state": "running" | "finished" | "failed", ...}

Jobs may run in other processes and on other machines (Hydra's launchers), so the end of a sweep
learns from files alone which job failed and why; `caravan.report.sweep` joins them into a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caravan.manifest import write_json

FILE = "job.json"
RUNNING, FINISHED, FAILED = "running", "finished", "failed"


def write(run_dir: Path, overrides: Sequence[str], state: str, error: str | None = None) -> None:
    """Record the state of a job.

    Args:
        overrides: of the job, as `key=value`.
        error: why it failed, a sentence.
    """
    settings = {}
    for text in overrides:
        key, _, value = text.partition("=")
        settings[key.lstrip("+")] = value
    write_json(run_dir / FILE, {"overrides": settings, "state": state, "error": error})


def read(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(run_dir, record) of every job below a folder, by name."""
    for path in sorted(folder.rglob(FILE)):
        yield path.parent, json.loads(path.read_text("utf-8"))
