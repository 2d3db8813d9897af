"""Damaged files of runs: each report works on what is whole, or says in a sentence what is not."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.report.conftest import Evaluations
from torch.utils.tensorboard import SummaryWriter

from caravan.errors import CONTROLS
from caravan.report import __main__ as command
from caravan.report import jobs

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, 1e308, float("nan"), "", "x", "\x1b[2J", "../..", "\udcff"),
    *([], [[]], [None], {}, {"x": {}}, {"overall": []}),
)
BYTES = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\x1b[31m",
    b"{",
    b"[" * 5000,
    b"\n\n",
    b"nan",
    b"\t",
    b"\x1f\x8b",
)


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [pair for key in keys for pair in [(tree, key), *_nodes(tree[key])]]


def _mutated_json(path: Path, rng: random.Random) -> None:
    """Another value, or none, in one or two places."""
    record = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 2])):
        container, key = rng.choice(_nodes(record) or [({"": None}, "")])
        if isinstance(container, dict) and rng.random() < 0.3:
            del container[key]
        else:
            container[key] = rng.choice(VALUES)
    path.write_text(json.dumps(record))


def _mutated_bytes(path: Path, rng: random.Random) -> None:
    """Cut, overwritten, or doubled."""
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    junk = rng.choice(BYTES)
    path.write_bytes(
        rng.choice(
            [
                data[:at],
                data[:at] + junk + data[at:],
                data[:at] + junk + data[at + len(junk) :],
                junk,
            ]
        )
    )


def _mutated_lines(path: Path, rng: random.Random) -> None:
    """A line with a column more, less or other; a line twice."""
    lines = path.read_text().splitlines()
    i = rng.randrange(len(lines))
    columns = lines[i].split()
    j = rng.randrange(len(columns))
    junk = rng.choice(["", "x", "nan", "-1", "1e999", "\u2028", "\x1b[2J"])
    changed = [columns[:j], [*columns, junk], [*columns[:j], junk, *columns[j + 1 :]]]
    lines[i] = " ".join(rng.choice(changed))
    path.write_text("\n".join([*lines, rng.choice(lines)]) + "\n")


def _missing(path: Path, rng: random.Random) -> None:
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()


MUTATIONS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(_mutated_json, _mutated_json, _mutated_bytes, _mutated_lines, _missing),
)


def _home(evaluations: Evaluations, folder: Path) -> Path:
    """Two evaluations, a training, a suite and the jobs of a sweep, with all that reports read."""
    home = folder / "runs"
    for name in ("bm25", "pipeline"):
        target = home / "mine" / name
        shutil.copytree(evaluations.folder / name, target, ignore=shutil.ignore_patterns("store"))
    theirs = gzip.compress(evaluations.theirs.read_bytes())
    (home / "theirs.trec.gz").write_bytes(theirs)
    (home / "qrels.txt").write_text((evaluations.beir / "qrels/train.tsv").read_text())
    training = home / "train"
    writer = SummaryWriter(str(training / "tensorboard"))
    for step in (2, 4):
        writer.add_scalar("train/loss", 4 - step / 2, step)
    writer.close()
    record = {"name": "r", "base_model": "tiny", "collection": "data (abc)", "updates": 5}
    record |= {"monitored": "val/MRR@10", "best": 0.4, "train_seconds": 2.5, "memory_gib": 0.1}
    (training / "metrics.json").write_text(json.dumps(record))
    (training / "config.yaml").write_text(
        "# python train.py name=r\nseed: 7\nloss: {_target_: a.B}\n"
    )
    for seed in (1, 2):
        job = home / "sweep" / f"seed={seed}"
        jobs.write(job, ["lr=1", f"seed={seed}"], jobs.FINISHED)
        (job / "metrics.json").write_text(json.dumps({**record, "read": {"16": {"MRR@10": 0.1}}}))
    own = {"group": "a", "digest": "d", "split": "test", "stages": {"bm25": {"MRR@10": 0.1}}}
    suite = {"collections": {"a": own}, "failed": {"b": "broken"}, "overall": {"MRR@10": 0.1}}
    suite |= {"system": "bm25", "collection": {"name": "a", "digest": "e"}, "split": "test"}
    suite |= {"queries": 1, "passages": 2, "seconds": 1.0, "run": "", "stages": []}
    (home / "suite").mkdir()
    (home / "suite/metrics.json").write_text(json.dumps(suite))
    return home


COMMANDS = {
    "table": ["mine"],
    "compare": ["mine/bm25", "mine/pipeline", "theirs.trec.gz"],
    "compare --qrels qrels.txt": ["mine/bm25/runs/bm25.train.trec", "theirs.trec.gz"],
    "sweep": ["sweep"],
    "collections": ["suite"],
    "page": ["."],
}


def _tried(
    number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> int:  # fmt: skip
    """A report of runs of which one file is damaged; returns its exit code."""
    rng = random.Random(number)
    name = rng.choice(list(COMMANDS))
    home = tmp_path / str(number)
    shutil.copytree(whole, home)
    below = [home / one for one in COMMANDS[name]]
    files = [
        path
        for one in below
        for path in ([one] if one.is_file() else sorted(one.rglob("*")))
        if path.is_file()
    ]
    files += [home / "qrels.txt"] if "--qrels" in name else []
    victim = rng.choice(files)
    mutate = rng.choice(MUTATIONS)
    if mutate is _mutated_json and victim.suffix != ".json":
        mutate = _mutated_bytes
    if mutate is _mutated_lines and victim.suffix not in (".trec", ".txt", ".yaml"):
        mutate = _mutated_bytes
    mutate(victim, rng)
    monkeypatch.chdir(home)
    options = name.split()
    monkeypatch.setattr("sys.argv", ["report", options[0], *COMMANDS[name], *options[1:]])
    code = command.main()
    seen = capsys.readouterr()
    told = f"{number}: {name} after {mutate.__name__} of {victim.relative_to(home)}"
    assert code in (0, 2), told
    if code == 2:
        assert 1 <= len(seen.err.strip().splitlines()) <= 2, f"{told}: {seen.err}"
        assert seen.err.strip()[-1] != ":", told
    assert not CONTROLS.search(seen.out + seen.err), told
    shutil.rmtree(home)
    return code


@pytest.fixture(scope="module")
def whole(evaluations: Evaluations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _home(evaluations, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of a report's time and read what tables have read."""
    monkeypatch.setattr("caravan.report.plots.Plot.svg", lambda *_, **__: "<svg></svg>")
    monkeypatch.setattr("caravan.report.plots.Plot.png", lambda *_: b"")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("part", range(4))
def test_a_damaged_file_is_no_traceback(
    part: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    codes = [_tried(15 * part + i, whole, tmp_path, monkeypatch, capsys) for i in range(15)]
    assert set(codes) == {0, 2}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(60, 600, 60))
def test_many_damaged_files_are_no_tracebacks(
    part: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for number in range(part, part + 60):
        _tried(number, whole, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("report", ["table", "sweep", "collections", "page"])
def test_a_folder_that_is_not_there_is_told_in_a_sentence(
    report: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report", report, str(tmp_path / "nowhere")])
    assert command.main() == 2
    assert capsys.readouterr().err.startswith(f"there is no folder {tmp_path / 'nowhere'}; ")
