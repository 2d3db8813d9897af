"""The state of each job of a sweep, as a file in its run directory.

    run_dir/job.json    {"overrides": {key: value}, "state": "running" | "finished" | "failed", ...}

Jobs may run in other processes and on other machines (Hydra's launchers), so only files can say at
the end of a sweep which jobs failed and why; `caravan.report.sweep` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.manifests import read_json, write_json

FILE = "job.json"
RUNNING, FINISHED, FAILED = "running", "finished", "failed"
SWEEP = ("multirun.yaml", "sweep.txt")
"""Files in the folder of a sweep: Hydra's when it starts, and its table when it has ended."""


def write(run_dir: Path, overrides: Sequence[str], state: str, error: str | None = None) -> None:
    """Record the state of a job.

    Args:
        overrides: of the job, as `key=value`.
        error: why it failed, in one sentence.
    """
    settings = {}
    for text in overrides:
        key, _, value = text.partition("=")
        quoted = re.fullmatch(r"(['\"])([^'\"]*)\1", value)
        settings[key.lstrip("+")] = quoted[2] if quoted else value
    write_json(run_dir / FILE, {"overrides": settings, "state": state, "error": error})


def read(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(run_dir, record) of every job below a folder, by name.

    Raises:
        InputError: If a record is damaged.
    """
    for path in sorted(folder.rglob(FILE)):
        record = read_json(path)
        overrides = record.get("overrides")
        texts = [record.get("state"), "" if record.get("error") is None else record["error"]]
        texts += overrides.values() if isinstance(overrides, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(
                "damaged-file",
                f"{path} is not the record of a job; delete it, and run the sweep's command again",
            )
        yield path.parent, {"error": None, **record}


def is_finished(run_dir: Path) -> bool:
    """Whether a job has ended there without a failure.

    Raises:
        InputError: If its record is damaged.
    """
    path = run_dir / FILE
    return path.is_file() and read_json(path).get("state") == FINISHED


def by_sweep(folder: Path) -> dict[Path, list[Path]]:
    """The run_dirs of the jobs below a folder, by the folder of their sweep.

    A job may lie several folders below its sweep, so that is the nearest folder above with a file
    of a sweep, or `folder` itself if there is none.
    """
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob(FILE)):
        above = [one for one in path.parent.parents if one != folder and one.is_relative_to(folder)]
        marked = (one for one in above if is_sweep(one))
        found.setdefault(next(marked, folder), []).append(path.parent)
    return found


def is_sweep(folder: Path) -> bool:
    """Whether a folder has a file of a sweep."""
    return any((folder / name).is_file() for name in SWEEP)
