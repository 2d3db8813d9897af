"""Evaluations of a small collection, made once: BM25, a worse system, both fused."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from tests.commands import evaluate
from tests.conftest import Call
from tests.tiny import write_beir
from torch.utils.tensorboard import SummaryWriter

from caravan.manifests import write_json
from caravan.report import jobs, page
from caravan.report.__main__ import main
from caravan.report.contents import read
from caravan.report.sweep import Sweep, collect

HARMFUL = '<script>document.title="hurt"</script><img src=x onerror=alert(1)> & "quoted" http://x.y'


def write_record(folder: Path, **settings: Any) -> Path:
    """The metrics.json of an evaluation; returns the folder."""
    record = {
        "system": "x",
        "overall": {"MRR@10": 0.3, "R@100": 0.5},
        "collection": {"name": "tiny", "digest": "d"},
        "split": "test",
        "queries": 4,
        "passages": 60,
        "seconds": 1.26,
        "run": "runs/x.trec",
    }
    write_json(folder / "metrics.json", {**record, **settings})
    return folder


def write_job(
    folder: Path, overrides: list[str], metrics: dict[str, Any] | None, name: str | None = None
) -> Path:
    """A job of a sweep in `folder` with its metrics.json, failed without any; returns run_dir."""
    run_dir = folder / (name or ",".join(overrides).replace("/", "_"))
    state = jobs.FAILED if metrics is None else jobs.FINISHED
    jobs.write(run_dir, overrides, state, "it is broken")
    if metrics is not None:
        write_json(run_dir / "metrics.json", metrics)
    return run_dir


def write_page(*folders: Path) -> Path:
    """The page of folders; returns its path."""
    return page.write(read(folders))


def sweep_of(folder: Path) -> Sweep:
    sweep = collect(folder)
    assert sweep is not None
    return sweep


@dataclass(frozen=True)
class Evaluations:
    beir: Path
    folder: Path  # holds bm25/ and pipeline/, of bm25 and theirs.trec
    theirs: Path  # a run file of another system

    def per_query(self, run: Path, measure: str) -> dict[str, float]:
        """By ir_measures, from the files alone."""
        qrels = []
        for line in (self.beir / "qrels/train.tsv").read_text().splitlines()[1:]:
            query, passage, grade = line.split("\t")
            qrels.append(ir_measures.Qrel(query, passage, int(grade)))
        # In trec_eval's order, by scores that do not tie: each tool breaks ties in its own way.
        lines = [line.split() for line in run.read_text().splitlines()]
        lines.sort(key=lambda line: (float(line[4]), line[2]))
        ranked = [ir_measures.ScoredDoc(line[0], line[2], float(i)) for i, line in enumerate(lines)]
        wanted = [ir_measures.parse_measure(measure.replace("MRR", "RR"))]
        found = ir_measures.iter_calc(wanted, qrels, ranked)
        return {one.query_id: one.value for one in found}


@pytest.fixture(scope="session")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Evaluations:
    home = tmp_path_factory.mktemp("report")
    beir = write_beir(home / "data", passages=100, queries=48, longest=12)
    for name in ("corpus", "queries"):
        file = beir / f"{name}.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record in records:  # texts are data, whatever they contain
            record["text"] += f" {HARMFUL}"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = home / "runs"
    options = ("data.split=train", f"cache_dir={home / 'cache'}", "measures=[MRR@10,nDCG@10,R@5]")
    evaluate(beir, folder / "bm25", "bm25", *options)
    theirs = home / "theirs.trec"
    rng = np.random.default_rng(1)
    lines = []
    for line in (folder / "bm25/runs/bm25.train.trec").read_text().splitlines():
        query, _, passage, rank, _, _ = line.split()
        score = float(rng.normal(0, 3)) - int(rank)
        lines.append(f"{query} Q0 {passage} {rank} {score:.6f} theirs\n")
    theirs.write_text("".join(lines))
    evaluate(beir, folder / "pipeline", f"[bm25,{theirs}]", *options)
    return Evaluations(beir, folder, theirs)


@pytest.fixture(scope="session")
def whole(evaluations: Evaluations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations, a training, a suite and the jobs of a sweep, with all that reports read."""
    home = tmp_path_factory.mktemp("whole")
    ignore = shutil.ignore_patterns("store", "report*")
    for name in ("bm25", "pipeline"):
        shutil.copytree(evaluations.folder / name, home / "mine" / name, ignore=ignore)
        config = home / "mine" / name / "config.yaml"
        config.write_text(f"# python evaluate.py name={name}\n{config.read_text()}")
    (home / "theirs.trec.gz").write_bytes(gzip.compress(evaluations.theirs.read_bytes()))
    shutil.copy(evaluations.beir / "qrels/train.tsv", home / "qrels.txt")
    training = home / "mine/train"
    with SummaryWriter(str(training / "tensorboard")) as writer:
        for step in range(5):
            writer.add_scalar("train/loss", 4 - step / 2, step)
            writer.add_scalar("val/MRR@10", step / 10, step)
    record = {"name": "r", "base_model": "tiny", "collection": "data (abc)", "updates": 5}
    record |= {"monitored": "val/MRR@10", "best": 0.4, "train_seconds": 2.5, "memory_gib": 0.1}
    write_json(training / "metrics.json", record)
    (training / "config.yaml").write_text("# python train.py name=r\nloss: {_target_: a.B}\n")
    reading = {"query_length": None, "passage_length": 16, "segment": None, "segment_words": 9}
    reading |= {"scores": {"MRR@10": 0.1}, "tokens_per_query": 8.5, "seconds": 0.1}
    read = [reading, {**reading, "passage_length": None, "query_length": 8, "segment": "best"}]
    for seed in (1, 2):
        write_job(home / "sweep", ["lr=1", f"seed={seed}"], {**record, "read": read})
    own = {"group": "a", "digest": "d", "split": "test", "stages": {"bm25": {"MRR@10": 0.1}}}
    write_record(home / "suite", run="", collections={"a": own}, failed={"b": "broken"})
    return home


Report = Callable[..., tuple[int, str, str]]
"""`python -m caravan.report` with these arguments: its exit code, output and errors."""


@pytest.fixture
def report(call: Call) -> Report:
    return partial(call, main)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of the time of a page."""
    monkeypatch.setattr("caravan.report.plots.Plot._drawn", lambda *_, **__: b"<svg></svg>")
