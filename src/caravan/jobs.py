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

from caravan.errors import InputError
from caravan.manifest import write_json

FILE = "job.json"
RUNNING, FINISHED, FAILED = "running", "finished", "failed"
SWEEP = ("multirun.yaml", "sweep.txt")
"""What a sweep's own folder holds: Hydra's file when it begins, its table when it has ended."""


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
    """(run_dir, record) of every job below a folder, by name.

    Raises:
        InputError: a file is not what `write` writes.
    """
    for path in sorted(folder.rglob(FILE)):
        yield path.parent, _record(path)


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
        overrides, state, error = record["overrides"], record["state"], record.get("error")
        texts = [*overrides.values(), state, "" if error is None else error]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path} is damaged; remove it, or run its job again")
    return record


def by_sweep(folder: Path) -> dict[Path, list[Path]]:
    """The run_dirs of the jobs below a folder, by the folder of their sweep.

    A job may lie deeper than its sweep's folder by any number of folders, so it is the nearest one
    with a file of a sweep's; the folder itself where none below it has one.
    """
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob(FILE)):
        above = [one for one in path.parent.parents if one != folder and one.is_relative_to(folder)]
        marked = (one for one in above if is_sweep(one))
        found.setdefault(next(marked, folder), []).append(path.parent)
    return found


def is_sweep(folder: Path) -> bool:
    """Whether a folder says of itself that it is a sweep's."""
    return any((folder / name).is_file() for name in SWEEP)
