"""The report of a machine names what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from caravan import doctor
from caravan.models import hardware

Usage = namedtuple("Usage", "total used free")


def test_the_report_has_a_line_for_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = "\n".join(doctor.report())
    parts = ("python 3", f"torch {torch.__version__}", "faiss-", "faiss build: ", "open files: ",
             "/dev/shm: ", "cache: ")  # fmt: skip
    for part in parts:
        assert part in text
    assert "only cached models load" in text


def test_small_shared_memory_and_a_full_or_read_only_disk_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 1 << 30))
    monkeypatch.setattr("os.access", lambda *_: False)
    lines = [*doctor.limits(), *doctor.cache()]
    problems = [line for line in lines if line.startswith("!")]
    assert [line.split()[1] for line in problems] == ["/dev/shm", str(tmp_path), "less"]
    assert f"cache: {tmp_path}/cache, not made yet, 1.0 GiB free" in lines


@pytest.mark.parametrize(
    ("limits", "shown", "enough"),
    [
        ((256, 512), "256 (soft limit), 512 (hard limit)", False),
        ((256, 1024), "256 (soft limit), 1,024 (hard limit)", True),
        ((1024, resource.RLIM_INFINITY), "1,024 (soft limit), unlimited (hard limit)", True),
    ],
)
def test_a_hard_limit_of_open_files_below_what_programs_need_is_a_problem(
    limits: tuple[int, int], shown: str, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    lines = list(doctor.limits())
    assert lines[0] == f"open files: {shown}"
    assert lines[1].startswith("! the hard limit of open files") == (not enough)


def test_the_owner_of_the_cache_is_named_and_a_cache_that_is_refused_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines() -> list[str]:
        return list(doctor.cache())

    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path))
    tmp_path.chmod(0o755)
    shown, *problems = lines()
    assert shown.startswith(f"cache: {tmp_path}, owner {tmp_path.owner()}, ")
    tmp_path.chmod(0o777)
    assert f"chmod o-w {tmp_path}" in lines()[1]
    tmp_path.chmod(0o755)
    stranger = SimpleNamespace(st_uid=2**31 - 2, st_mode=0o40755)
    monkeypatch.setattr(Path, "stat", lambda *given, **named: stranger)
    foreign, problem, *others = lines()
    assert f"owner uid {2**31 - 2}, " in foreign
    assert problem.startswith(f"! {tmp_path} belongs to another user")
    assert others == problems


def test_two_packages_of_faiss_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    assert any("pip uninstall faiss-cpu faiss-gpu" in line for line in doctor.software())


def test_the_build_of_faiss_is_named_with_its_gpus_and_a_broken_one_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import faiss

    monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE AVX2 GPU ")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert list(doctor.software())[-1] == "faiss build: OPTIMIZE AVX2 GPU, 2 GPUs"
    monkeypatch.delattr(faiss, "get_num_gpus")
    assert list(doctor.software())[-1] == "faiss build: OPTIMIZE AVX2 GPU"
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert list(doctor.software())[-1].startswith("! faiss cannot be imported")


@pytest.mark.parametrize(("cuda", "remedy"), [("13.0", "update the driver"), (None, "for CPUs")])
def test_a_driver_without_a_usable_gpu_is_a_problem(
    cuda: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_driver", lambda: "550.54")
    last = list(doctor.gpus())[-1]
    assert last.startswith("! driver 550.54")
    assert remedy in last


def test_idle_gpus_and_missing_bf16_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Properties = namedtuple("Properties", "name total_memory major minor")

    def properties(index: int) -> Any:
        return Properties("Tesla T4", 16 << 30, 7, 5)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (8 << 30, 16 << 30))
    monkeypatch.setattr(hardware, "has_bf16", lambda: False)
    lines = list(doctor.gpus())
    assert "cuda:7 Tesla T4, 16.0 GiB (8.0 GiB free), compute capability 7.5" in lines
    assert any(line.startswith("! no bf16") for line in lines)
    assert lines[-1].startswith("7 GPUs are idle")
    assert "--nproc-per-node 8" in lines[-1]


def test_a_reader_that_stops_early_ends_the_report_without_a_traceback() -> None:
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "caravan.doctor"], **pipes) as report:
        report.stdout.close()
        error = report.stderr.read()
    assert report.returncode == 0
    assert "Traceback" not in error
