"""Evaluations by two processes, and after a kill: the bytes of one process that was not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.commands import ROOT, evaluate, evaluate_arguments, products
from tests.tiny import write_beir
from tests.two_ranks import TwoRanks

from caravan.retrieval import stages

SHORT = "measures=[MRR@5]"


def test_two_processes_write_what_one_writes_and_one_resumes_their_work(
    beir: Path, folders: dict[str, str], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    blocks = ("block=8", "rerank.block=16", "rerank.depth=5", "index.k=20", SHORT)
    overrides = (f"[bm25,{folders['retriever']}]", f"reranker={folders['reranker']}", *blocks)
    evaluate(beir, tmp_path / "one", *overrides)
    metrics = two_ranks(evaluate, beir, tmp_path / "two", *overrides)
    assert metrics[0]["stages"]
    assert metrics[1] == {}
    one = products(tmp_path / "one")
    assert sum(name.startswith("store/passages.") for name in one) == 8
    assert products(tmp_path / "two") == one
    for number in (1, 6):  # as if they had been killed
        (shard,) = (tmp_path / "two" / "store").glob(f"passages.*/{number:08d}.npy")
        shard.unlink()
    (tmp_path / "two/runs/retriever.test.trec").unlink()
    evaluate(beir, tmp_path / "two", *overrides)
    assert products(tmp_path / "two") == one


def in_parts(beir: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "PART", 16)
        return evaluate(beir, run_dir, *overrides)


def test_parts_that_two_processes_search_give_the_run_of_one_search(
    beir: Path, folders: dict[str, str], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    overrides = (folders["retriever"], "block=8", "index.k=20", SHORT)
    evaluate(beir, tmp_path / "whole", *overrides)
    whole = (tmp_path / "whole/runs/retriever.test.trec").read_bytes()
    metrics = two_ranks(in_parts, beir, tmp_path / "parts", *overrides)
    assert metrics[0]["overall"]
    run = tmp_path / "parts/runs/retriever.test.trec"
    assert run.read_bytes() == whole
    parts = sorted((tmp_path / "parts/store").glob("found.*/*.npy"))
    assert len(parts) == 4
    parts[2].unlink()  # as if it had been killed
    run.unlink()
    kept = parts[0].stat().st_mtime_ns
    in_parts(beir, tmp_path / "parts", *overrides)
    assert run.read_bytes() == whole
    assert parts[0].stat().st_mtime_ns == kept


@pytest.mark.slow
def test_an_evaluation_killed_at_any_moment_ends_in_the_same_bytes(
    model: Path, tmp_path: Path
) -> None:
    beir = write_beir(tmp_path / "data", passages=3000, queries=200)

    def command(name: str) -> list[str]:
        given = evaluate_arguments(beir, tmp_path / name, model, "block=50", "precision=float32")
        return [sys.executable, str(ROOT / "evaluate.py"), *given]

    subprocess.run(command("whole"), check=True, capture_output=True)
    for blocks in (5, 20, 40):
        process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "killed").rglob("0*.npy"))) < blocks:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        process.kill()
        process.wait()
    subprocess.run(command("killed"), check=True, capture_output=True)
    whole = products(tmp_path / "whole")
    assert len(whole) > 60
    assert products(tmp_path / "killed") == whole
