"""Processes that wait for each other: the bytes of one, and an end when one of them ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.commands import ROOT, evaluate, evaluate_arguments, products
from tests.refusals import refused
from tests.tiny import write_beir
from tests.two_ranks import LONGEST, TwoRanks

from caravan.distributed import LAUNCHERS
from caravan.retrieval import peers, stages

COMMAND = (sys.executable, str(ROOT / "evaluate.py"))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def place(rank: int, size: int, port: str) -> dict[str, str]:
    """The environment of a process, as torchrun sets it."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def test_processes_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHERS, "MASTER_ADDR", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with refused("no-rendezvous", "3 processes", "MASTER_ADDR"):
        peers.join()


def slurm_place(rank: int, size: int, job: int, step: int) -> dict[str, str]:
    """The environment of a task on one node, as srun sets it."""
    of_job = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"}
    of_step = {"SLURM_STEP_ID": str(step), "SLURM_STEP_NODELIST": "localhost"}
    tasks = {"SLURM_NTASKS": str(size), "SLURM_STEP_NUM_TASKS": str(size)}
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    return of_job | of_step | tasks | own


def killed_arguments(beir: Path, run_dir: Path, folders: dict[str, str]) -> list[str]:
    """An evaluation that writes a hundred shards of passages."""
    small = ("block=30", "precision=float32")
    return evaluate_arguments(beir, run_dir, folders["retriever"], *small)


def start(arguments: list[str], place: dict[str, str]) -> subprocess.Popen[str]:
    given = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    given = {name: value for name, value in given.items() if name not in LAUNCHERS} | place
    to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*COMMAND, *arguments], env=given, **to)


def kill(rank: int, started: list[subprocess.Popen[str]], run_dir: Path) -> None:
    """Kill one of the processes after twenty shards; the others end with a message."""
    while len(list(run_dir.rglob("0*.npy"))) < 20:
        assert all(process.poll() is None for process in started), "one ended before it was killed"
        time.sleep(0.005)
    started[rank].kill()
    for other, process in enumerate(started):
        output = process.communicate(timeout=LONGEST)[0]
        if other != rank:
            assert process.returncode == 2
            assert f"another of the {len(started)} processes has ended" in output
            assert "Traceback" not in output


def meets(rank: int, port: str, stops: bool) -> None:
    os.environ |= place(rank, 2, port)
    peers.join()
    if stops:
        os.kill(os.getpid(), signal.SIGSTOP)
    peers.barrier(lambda: True, Path())


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_stops_for_a_while_is_waited_for(late: int) -> None:
    port, context = free_port(), multiprocessing.get_context("spawn")
    both = [context.Process(target=meets, args=(rank, port, rank == late)) for rank in range(2)]
    for process in both:
        process.start()
    status = Path(f"/proc/{both[late].pid}/status")
    while "T (stopped)" not in status.read_text():
        time.sleep(0.1)
    time.sleep(5)
    os.kill(both[late].pid or 0, signal.SIGCONT)
    for process in both:
        process.join(LONGEST)
        assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 2])
def test_when_a_process_is_killed_the_others_end_and_a_restart_gives_the_bytes_of_one(
    killed: int, folders: dict[str, str], tmp_path: Path
) -> None:
    beir = write_beir(tmp_path / "data", passages=3000, queries=200)

    def given(name: str) -> list[str]:
        return killed_arguments(beir, tmp_path / name, folders)

    subprocess.run([*COMMAND, *given("whole")], check=True, capture_output=True)
    port = free_port()
    started = [start(given("killed"), place(rank, 3, port)) for rank in range(3)]
    kill(killed, started, tmp_path / "killed")
    torchrun = [sys.executable, *("-m", "torch.distributed.run", "--standalone")]
    command = [*torchrun, "--nproc-per-node=4", COMMAND[1], *given("killed")]
    subprocess.run(command, check=True, capture_output=True)
    assert products(tmp_path / "killed") == products(tmp_path / "whole")


@pytest.mark.slow
def test_tasks_of_srun_find_each_other_and_end_when_one_is_killed(
    folders: dict[str, str], tmp_path: Path
) -> None:
    beir = write_beir(tmp_path / "data", passages=3000, queries=200)
    run_dir = tmp_path / "two"
    two = killed_arguments(beir, run_dir, folders)
    whole = killed_arguments(beir, tmp_path / "whole", folders)
    subprocess.run([*COMMAND, *whole], check=True, capture_output=True)
    job = os.getpid()  # job and step give the port, which is another in the next step
    kill(1, [start(two, slurm_place(rank, 2, job, 0)) for rank in range(2)], run_dir)
    restarted = [start(two, slurm_place(rank, 2, job, 1)) for rank in range(2)]
    for process in restarted:
        output = process.communicate(timeout=LONGEST)[0]
        assert process.returncode == 0, output
    assert products(run_dir) == products(tmp_path / "whole")


def test_two_processes_write_what_one_writes_and_one_resumes_their_work(
    beir: Path, folders: dict[str, str], tmp_path: Path, two_ranks: TwoRanks
) -> None:
    blocks = ("block=8", "rerank.block=16", "rerank.depth=5", "index.k=20", "measures=[MRR@5]")
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
    overrides = (folders["retriever"], "block=8", "index.k=20", "measures=[MRR@5]")
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
def test_four_processes_encode_search_and_rerank_to_the_bytes_of_one(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    few = ("block=8", "rerank.block=4", "rerank.depth=5", "index.k=20", "measures=[MRR@5]")
    overrides = (folders["retriever"], f"reranker={folders['reranker']}", *few)
    in_parts(beir, tmp_path / "one", *overrides)
    four = TwoRanks(4)
    try:
        metrics = four(in_parts, beir, tmp_path / "four", *overrides)
    finally:
        four.close()
    assert [bool(of_rank) for of_rank in metrics] == [True, False, False, False]
    one = products(tmp_path / "one")
    assert products(tmp_path / "four") == one
    kinds = Counter(name.split("/")[1].split(".")[0] for name in one if name.endswith(".npy"))
    assert kinds == {"passages": 8, "queries": 1, "found": 4, "scores": 5}
