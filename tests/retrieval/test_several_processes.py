"""Several processes share the work of an evaluation and leave what one leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.commands import ROOT, evaluate, evaluate_arguments

BLOCKS = ("block=8", "rerank.block=16", "rerank.depth=5", "index.k=20", "measures=[MRR@10]")


def _by_two(arguments: list[str]) -> None:
    started = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        own = os.environ | {"OMP_NUM_THREADS": "1"} | ranks
        command = [sys.executable, str(ROOT / "evaluate.py"), *arguments]
        started.append(subprocess.Popen(command, env=own, cwd=ROOT, stderr=subprocess.PIPE))
    for process in started:
        _, told = process.communicate(timeout=600)
        assert process.returncode == 0, told.decode()


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".npy", ".trec")
    }


def test_two_processes_leave_what_one_leaves_and_one_goes_on_where_they_were(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    systems = f"[bm25,{folders['retriever']}]", f"reranker={folders['reranker']}"
    evaluate(beir, tmp_path / "one", *systems, *BLOCKS)
    _by_two(evaluate_arguments(beir, tmp_path / "two", *systems, *BLOCKS))
    one = _bytes(tmp_path / "one")
    assert sum(name.startswith("store/passages.") for name in one) == 8
    assert _bytes(tmp_path / "two") == one
    for number in (1, 6):  # as if they had been killed
        (block,) = (tmp_path / "two" / "store").glob(f"passages.*/{number:08d}.npy")
        block.unlink()
    for run in (tmp_path / "two" / "runs").glob("retriever*"):
        run.unlink()
    evaluate(beir, tmp_path / "two", *systems, *BLOCKS)
    assert _bytes(tmp_path / "two") == one
