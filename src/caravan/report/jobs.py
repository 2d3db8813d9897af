"""The state of each job of a sweep, as a file in its run directory.

    run_dir/job.json    {"overrides": {key: value}, "state": "running" | "finished" | "failed", ...}

Jobs may run in other processes and on other machines (Hydra's launchers), so only files show at the
end of a sweep which jobs failed and why; `caravan.report.sweep` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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


def read(folder: Path) -> tuple[dict[Path, dict[str, Any]], list[Path]]:
    """The jobs below a folder, and the folders of other sweeps, whose jobs are left out.

    Returns:
        The records by run_dir, in order, and the folders below this one that are sweeps.

    Raises:
        InputError: If a record is damaged.
    """
    marked = {path.parent for name in SWEEP for path in folder.rglob(name)} - {folder}
    found, others = {}, set()
    for path in sorted(folder.rglob(FILE)):
        if inside := marked.intersection(path.parents):
            others |= inside
        else:
            found[path.parent] = _read(path)
    return found, sorted(others)


def _read(path: Path) -> dict[str, Any]:
    record = {"error": None, **read_json(path)}
    overrides = record.get("overrides")
    texts = [record.get("state"), record["error"] or ""]
    texts += overrides.values() if isinstance(overrides, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        message = f"{path} is not the record of a job; delete it, and repeat the sweep's command"
        raise InputError("damaged-file", message)
    return record


def is_finished(run_dir: Path) -> bool:
    """Whether a job has ended there without a failure.

    Raises:
        InputError: If its record is damaged.
    """
    path = run_dir / FILE
    return path.is_file() and read_json(path).get("state") == FINISHED
