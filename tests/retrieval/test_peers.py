"""Processes that wait for each other: the bytes of one, and an end when one of them ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.commands import ROOT, evaluate, evaluate_arguments, products
from tests.refusals import refused
from tests.tiny import write_beir
from tests.two_ranks import LONGEST

from caravan.distributed import LAUNCHERS
from caravan.retrieval import peers

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


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],login", "gpu07"), ("n3,n5", "n3"), ("a[1,4]-ib", "a1-ib"), ("x", "x")],
)
def test_processes_of_srun_meet_on_the_first_node_of_their_step(
    nodes: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*LAUNCHERS, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    slurm = {"PROCID": "1", "STEP_NUM_TASKS": "2", "STEP_NODELIST": nodes, "JOB_ID": "4711"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with monkeypatch.context() as patch:
        patch.setattr(peers.dist, "rendezvous", lambda *_, **__: iter(()))
        with pytest.raises(StopIteration):
            peers.join()
        assert os.environ.pop("MASTER_ADDR") == first
        assert int(os.environ.pop("MASTER_PORT")) > 1024


def meets(rank: int, port: str, stops: bool) -> None:
    os.environ |= place(rank, 2, port)
    peers.PROBES.update(dict.fromkeys(peers.PROBES, 1))
    peers.join()
    if stops:
        os.kill(os.getpid(), signal.SIGSTOP)
    peers.meet(lambda: True, Path())


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
    time.sleep(5)  # longer than all probes
    os.kill(both[late].pid or 0, signal.SIGCONT)
    for process in both:
        process.join(LONGEST)
        assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 2])
def test_when_a_process_is_killed_the_others_end_and_a_restart_gives_the_bytes_of_one(
    killed: int, model: Path, tmp_path: Path
) -> None:
    beir = write_beir(tmp_path / "data", passages=3000, queries=200)

    def given(name: str) -> list[str]:
        run_dir = tmp_path / name
        return evaluate_arguments(beir, run_dir, model, "block=30", "precision=float32")

    def start(rank: int, port: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **place(rank, 3, port)}
        to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*COMMAND, *given("killed")], env=environment, **to)

    subprocess.run([*COMMAND, *given("whole")], check=True, capture_output=True)
    port = free_port()
    started = [start(rank, port) for rank in range(3)]
    while len(list((tmp_path / "killed").rglob("0*.npy"))) < 20:
        assert all(process.poll() is None for process in started), "one ended before it was killed"
        time.sleep(0.005)
    started.pop(killed).kill()
    for process in started:
        output = process.communicate(timeout=LONGEST)[0]
        assert process.returncode == 2
        assert f"rank {killed} of 3 has ended" in output
        assert "Traceback" not in output
    torchrun = [sys.executable, *("-m", "torch.distributed.run", "--standalone")]
    command = [*torchrun, "--nproc-per-node=4", COMMAND[1], *given("killed")]
    subprocess.run(command, check=True, capture_output=True)
    assert products(tmp_path / "killed") == products(tmp_path / "whole")


@pytest.mark.slow
def test_four_processes_write_what_one_writes(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    blocks = ("block=4", "rerank.block=8", "rerank.depth=5", "index.k=20", "measures=[MRR@5]")
    overrides = (f"[bm25,{folders['retriever']}]", f"reranker={folders['reranker']}", *blocks)
    evaluate(beir, tmp_path / "one", *overrides)
    port, running = free_port(), []
    for rank in range(4):
        command = [*COMMAND, *evaluate_arguments(beir, tmp_path / "four", *overrides)]
        environment = {**os.environ, **place(rank, 4, port)}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    assert [process.wait(LONGEST) for process in running] == [0] * 4
    assert products(tmp_path / "four") == products(tmp_path / "one")
