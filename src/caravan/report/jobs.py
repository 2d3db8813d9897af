"""The state of each job of a sweep, as a file in its run directory.

    run_dir/job.json    {"overrides": {key: value}, "state": "running" | "finished" | "failed", ...}

Jobs may run in other processes and on other machines (Hydra's launchers), so only files show at the
end of a sweep which jobs failed and why; `caravan.report.records.read_jobs` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from caravan.manifests import read_json, write_json

FILE = "job.json"
RUNNING, FINISHED, FAILED = "running", "finished", "failed"
TABLE = "sweep.csv"
SWEEP = ("multirun.yaml", TABLE)
"""Files in the folder of a sweep: Hydra's when it starts, and its table when it has ended."""


def write(run_dir: Path, overrides: Sequence[str], state: str, error: str | None = None) -> None:
    """Record the state of a job; `overrides`: as `key=value`."""
    settings = {}
    for text in overrides:
        key, _, value = text.partition("=")
        quoted = re.fullmatch(r"(['\"])([^'\"]*)\1", value)
        settings[key.lstrip("+")] = quoted[2] if quoted else value
    write_json(run_dir / FILE, {"overrides": settings, "state": state, "error": error})


def is_finished(run_dir: Path) -> bool:
    """Whether a job has ended there without a failure.

    Raises:
        InputError: If its record is damaged.
    """
    path = run_dir / FILE
    return path.is_file() and read_json(path).get("state") == FINISHED
