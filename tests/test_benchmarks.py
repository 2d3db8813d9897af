"""Every benchmark starts, ends and prints its table, on tiny shapes."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from packaging.requirements import Requirement
from tests.export import folders
from tests.models.small import saved_base

ROOT = Path(__file__).parents[1]
SHARED = {"common", "gpu_kernels", "gpu_rows", "minilm", "shapes"}
SCRIPTS = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - SHARED
PEER = "--data BEIR --model MINILM --repeats 1"
OPTIONS = {
    "adaptation": "--words 8 --texts 2 --vocabularies 200 --repeats 1",
    "chunks": "--batches 1 --layers 1 --repeats 1",
    "encode": f"{PEER} --passages 4",
    "gpu": "--device cpu --shape tiny --seconds 3600 --out OUT",
    "gradcache": "--queries 2 4 --whole 2 --chunk 2",
    "rerank": f"{PEER} --pairs 4",
    "settings": "--texts 2 --repeats 1",
    "train_step": f"{PEER} --batch 4 --steps 1",
}
ROWS = {
    "adaptation": ["| 200 |"],
    "chunks": ["| 1 | padded, before |", "| 32 | unpadded, now | 1 |"],
    "encode": ["| both float32 |", "| each one's default |", "| 32 |"],
    "gpu": [
        "| ceilings | matrix product, bf16 |",
        "| kernel: auto on the CPU, bfloat16 | gradient, gradient caching |",
        "| encode tiny, SciFact whole | 8 texts |",
        "| step tiny, 1 of 32 GPUs, unpadded | a step |",
        "| step tiny, 1 of 8 GPUs, QLoRA | a step |",
        "| search tiny | 20 queries, 2,000 x 64 |",
    ],
    "gradcache": ["| 2 |", "| 4 |"],
    "rerank": ["| both float32 |", "| both bf16 |"],
    "settings": ["| attention=eager |", "| precision=float32 |", "bf16_norms=True |"],
    "train_step": ["| float32 |", "| bf16 |"],
}
SLOW = {"chunks", "encode", "gpu", "rerank", "settings", "train_step"}


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as that of MiniLM, of a BERT with a few thousand random weights."""
    tokenizer = copy.deepcopy(folders.tokenizer("encoder"))
    tokenizer.model_max_length = 64
    bert = folders.bert(scores=False, positions=256)
    return saved_base(tokenizer, tmp_path_factory.mktemp("minilm"), bert)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in sorted(SCRIPTS)
    ],
)
def test_a_benchmark_prints_its_table_with_the_commit_and_the_processor(
    name: str,
    beir: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path))
    benchmark: Any = importlib.import_module(name)
    monkeypatch.setattr(benchmark, "apart", here, raising=False)
    if name == "settings":  # compilation takes a minute
        few = [setting for setting in benchmark.SETTINGS if "compile" not in setting]
        monkeypatch.setattr(benchmark, "SETTINGS", few)
    options = OPTIONS[name].replace("BEIR", str(beir)).replace("OUT", str(tmp_path))
    if "MINILM" in options:
        options = options.replace("MINILM", str(request.getfixturevalue("minilm")))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options.split()])
    benchmark.main()
    printed = capsys.readouterr().out
    for row in ROWS[name]:
        assert row in printed
    if name == "encode" and importlib.util.find_spec("openvino"):
        assert "| default, against OpenVINO bf16 |" in printed
    *_, made = printed.strip().splitlines()
    assert made.startswith(f"`python benchmarks/{name}.py ")
    assert "commit" in made
    assert "threads of " in made
    assert "failed" not in printed
    assert "WRONG" not in printed


GPU = "sys.path.insert(0, 'benchmarks'); import gpu; gpu.main()"
GPU_IMAGE = ("torch", "transformers", "pytorch-lightning", "peft")


@pytest.fixture(scope="module")
def bare_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of an image for GPUs, and the wheels that benchmarks/gpu.py names.

    What a wheel requires is not there unless it is named too.
    """
    page = ast.get_docstring(ast.parse((ROOT / "benchmarks" / "gpu.py").read_text()))
    named = re.search(r"add the wheels (.*?); for QLoRA", page or "", re.DOTALL)
    assert named is not None
    packages, more = set(re.split(r",\s+|\s+and\s+", named[1])), list(GPU_IMAGE)
    while more:
        name = more.pop()
        packages.add(name)
        needed = [Requirement(text) for text in metadata.requires(name) or []]
        here = [one for one in needed if not one.marker or one.marker.evaluate({"extra": ""})]
        more += [one.name for one in here if one.name not in packages]
    folder = tmp_path_factory.mktemp("image")
    for name in packages:
        found = metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return folder


def on_a_bare_image(image: Path, out: Path, *options: str) -> tuple[str, list[dict[str, Any]]]:
    """The page of benchmarks/gpu.py and its lines of JSON."""
    code = f"import sys; sys.path.append({str(image)!r}); {GPU}"
    tiny = ["--device", "cpu", "--shape", "tiny", "--out", str(out)]
    command = [sys.executable, "-S", "-c", code, *tiny, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (out / "gpu.md").read_text() == done.stdout
    lines = (out / "gpu.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_row_that_cannot_be_measured_stops_no_other_and_is_named(
    bare_image: Path, tmp_path: Path
) -> None:
    page, rows = on_a_bare_image(bare_image, tmp_path, "--rows", "QLoRA", "flash", "search")
    assert {row["name"] for row in rows if row["value"] == ""} == {
        "kernel: flash_attention_2, bfloat16",
        "step tiny, 1 of 8 GPUs, QLoRA",
    }
    assert rows[-1]["name"] == "search tiny"
    assert "Not measured: kernel: flash_attention_2, bfloat16 (not available); step tiny" in page


def test_lora_and_qlora_share_a_base_that_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    shapes = importlib.import_module("shapes")
    models, built = shapes.Models(torch.device("cpu")), shapes.llama("tiny")
    made = mock.Mock(return_value=built)
    monkeypatch.setattr(shapes, "llama", made)
    for settings in ({}, {"bf16_norms": True}, {"four_bits": True}):
        network = models.trainee("tiny", **settings)
    base = network.transformer.get_base_model()
    assert base is built
    assert made.call_count == 1
    assert sum(isinstance(one, Linear4bit) for one in base.modules()) == 14


def test_the_kernel_of_an_older_pytorch_gets_keys_for_each_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    shapes: Any = importlib.import_module("shapes")
    from torch.nn.attention import varlen as of_torch

    def older(query: Any, key: Any, value: Any, *bounds: Any, window_size: Any = None) -> Any:
        return key, value, bounds, window_size

    monkeypatch.setattr(of_torch, "varlen_attn", older)
    monkeypatch.setattr(shapes.varlen, "kernel", shapes.varlen.kernel.__wrapped__)
    assert "older kernel" in shapes.use_older_kernel()
    query, key = torch.zeros(5, 4, 8), torch.randn(5, 2, 8)
    kernel = shapes.varlen.kernel()
    found, value, *rest = kernel(query, key, key, 1, 2, window_size=(3, 0), enable_gqa=True)
    assert rest == [(1, 2), (3, 0)]
    assert torch.equal(found, key[:, [0, 0, 1, 1]])
    assert torch.equal(value, found)
    assert kernel(query, query, query, enable_gqa=False)[0] is query


@pytest.mark.slow
def test_rows_that_would_end_after_the_deadline_are_skipped(
    bare_image: Path, tmp_path: Path
) -> None:
    page, rows = on_a_bare_image(bare_image, tmp_path, "--seconds", "0")
    assert len(rows) > 20
    assert all(row["what"].startswith("skipped") for row in rows)
    assert "ceilings (skipped); " in page


@pytest.mark.slow
def test_a_profile_lists_the_operations_that_take_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    options = "--device cpu --shape tiny --part profile --rows profile --out"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options.split(), str(tmp_path)])
    importlib.import_module("gpu").main()
    printed = capsys.readouterr().out
    assert "| profile: encode tiny | aten::" in printed
    assert "| profile: step tiny, 1 of 8 GPUs | aten::" in printed
    assert "failed" not in printed
    assert (tmp_path / "gpu_profile.md").read_text() == printed


@pytest.mark.slow
def test_a_benchmark_measures_memory_in_processes_of_its_own() -> None:
    command = [sys.executable, "benchmarks/gradcache.py", *OPTIONS["gradcache"].split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| 2 |" in done.stdout


def here(measure: Callable[..., Any], *given: Any) -> Any:
    """In place of `common.apart`: measure in this process, which has imported everything."""
    return measure(*given)
