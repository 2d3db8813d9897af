"""Correctness, speed and memory on a GPU: a Llama of 7B shape with random weights.

    python benchmarks/gpu.py --out results                                 # at most 420 s
    python benchmarks/gpu.py --out results --part profile                  # at most 240 s
    python benchmarks/gpu.py --out results --device cpu --shape tiny       # tries the script

Rows are written to `gpu.jsonl` and `gpu.md` (`gpu_profile.*`) in the folder as they are measured. A
row whose estimated time exceeds what is left is skipped, and a row that fails stops no other.
`--rows step search` measures only rows with one of these words in their name.

Needs no network, no Hydra and no installed Caravan. Where torch, transformers, pytorch-lightning
and peft are installed, add the wheels pydantic, pydantic-core, annotated-types, typing-inspection,
xxhash, pyarrow, bm25s and faiss-cpu; for QLoRA bitsandbytes, for its kernel flash-attn.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from common import rendered
from gpu_kernels import kernel, kernels
from gpu_rows import Bench, Found, build, ceilings, encode, profile, search, step
from shapes import SHAPES, even, scifact, use_older_kernel

from caravan import doctor

SECONDS = {"measure": 400, "profile": 220}
GRACE = 20  # seconds for a row that takes longer than estimated
H200 = 788e12  # operations a second in bf16 of the GPU for which times are estimated
Row = tuple[str, float, Callable[[Bench], Iterator[Found]]]
"""Name, estimated seconds, and the function that measures it."""
NOTES = [
    "Shares of a rate are those of the matrix product measured in bf16 (search: in float32). They"
    " count real tokens only, and all passes: forward, recomputation, backward to the activations"
    " (frozen weights have no gradient), and the first pass of gradient caching. A share in a"
    " profile is that of the time without the profiler (operations) or of the busy time.",
]


def measured(bench: Bench) -> list[Row]:
    """The rows of the first part, the most important ones first."""
    main = bench.shape
    rows: list[Row] = [("ceilings", 8, ceilings)]
    for name, settings in kernels():
        rows.append((f"kernel: {name}", 3, partial(kernel, **settings)))
    rows.append((f"build {main}", 8, partial(build, shape=main)))

    def encoding(shape: str, seconds: float, longest: int, *systems: str) -> None:
        lengths = even(bench.size.tokens, longest)
        for system in systems:
            work = partial(encode, shape=shape, lengths=lengths, system=system)
            rows.append((f"encode {shape}, {longest} tokens, {system}", seconds, work))

    def training(shape: str, seconds: float, gpus: int, what: str = "", **settings: Any) -> None:
        work = partial(step, shape=shape, gpus=gpus, **settings)
        rows.append((f"step {shape}, 1 of {gpus} GPUs{what}", seconds, work))

    encoding(main, 7, 196, "unsorted", "sdpa", "unpadded")
    encoding(main, 7, 512, "sdpa", "unpadded")
    work = partial(encode, shape=main, lengths=scifact(bench.size.passages), system="sdpa")
    rows.append((f"encode {main}, SciFact whole", 45, work))
    training(main, 14, 8)
    training(main, 12, 8, ", unpadded", attention="unpadded")
    training(main, 6, 32)
    training(main, 6, 32, ", unpadded", attention="unpadded")
    training(main, 12, 8, ", norms and embeddings in bf16", bf16_norms=True)
    training(main, 30, 1, ", gradient caching", cached=True)
    training(main, 25, 1)
    training(main, 25, 1, ", unpadded", attention="unpadded")
    training(main, 25, 8, ", QLoRA", four_bits=True)
    rows.append((f"search {main}", 35, partial(search, shape=main)))
    if main == "7b":
        encoding("1b", 5, 196, "sdpa", "unpadded")
        training("1b", 8, 8)
        training("1b", 8, 8, ", unpadded", attention="unpadded")
    return rows


def profiled(bench: Bench) -> list[Row]:
    """The rows of the second part."""
    main, lengths = bench.shape, even(bench.size.tokens, 196)
    compiled = partial(encode, shape=main, lengths=lengths, system="sdpa", compiled=True)
    few = f"profile: step {main}, 1 of 32 GPUs"
    unpadded = partial(profile, shape=main, gpus=32, attention="unpadded")
    return [
        ("ceilings", 8, ceilings),
        (f"profile: encode {main}", 20, partial(profile, shape=main)),
        (f"profile: step {main}, 1 of 8 GPUs", 40, partial(profile, shape=main, gpus=8)),
        (few, 25, partial(profile, shape=main, gpus=32)),
        (f"{few}, unpadded", 25, unpadded),
        (f"compiled: encode {main}, 196 tokens", 70, compiled),
    ]


class Results:
    """The rows so far: lines of JSON that are appended, and a page that is written anew."""

    def __init__(self, folder: Path, name: str, notes: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.page = folder / f"{name}.jsonl", folder / f"{name}.md"
        self.started, self.notes = datetime.now().isoformat(timespec="seconds"), notes
        self.rows: list[dict[str, str]] = []
        self.missing: list[str] = []

    def add(self, name: str, what: str, value: float | str, unit: str, of: float | str) -> None:
        row = {"name": name, "what": what, "value": value, "unit": unit, "share": of}
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self.started, **row}) + "\n")
        long = isinstance(value, float | int) and abs(value) >= 1000
        number = value if isinstance(value, str) else f"{value:,.0f}" if long else f"{value:.3g}"
        part = of if isinstance(of, str) else f"{of:.0%}"
        self.rows.append({**row, "value": number, "share": part})  # type: ignore[dict-item]
        sys.stderr.write(f"{name} | {what} | {number} {unit} | {part}\n")
        self.page.write_text(self.text(), "utf-8")

    def omit(self, name: str, reason: str) -> None:
        self.missing.append(f"{name} ({reason.partition(':')[0]})")
        self.add(name, reason, "", "", "")

    def text(self) -> str:
        done = (
            f"Not measured: {'; '.join(self.missing)}."
            if self.missing
            else "Every row was measured."
        )
        return rendered("A Llama with random weights on one device", self.rows, [*self.notes, done])


def measure(bench: Bench, rows: list[Row], words: list[str], results: Results, ends: float) -> None:
    """Measure each row that one of the words names and that can be done until `ends`."""
    for name, estimate, work in rows:
        if name != "ceilings" and not any(word in name for word in words):
            continue
        slower = max(1.0, H200 / bench.rates.get("bf16", H200)) if bench.on_gpu else 1.0
        left = max(ends - time.monotonic(), 0.0)
        if estimate * slower > left:
            takes = f"takes about {estimate * slower:.0f} s, {left:.0f} s are left"
            results.omit(name, f"skipped: {takes}")
            continue
        try:
            for found in work(bench):
                results.add(name, *found)
        except ImportError as error:
            results.omit(name, f"not available: {error}")
        except Exception as error:  # noqa: BLE001 - the other rows are worth having
            text = (str(error).strip() or "no message").splitlines()[0].replace("|", "/")
            results.omit(name, f"failed: {type(error).__name__}: {text[:150]}")
            with suppress(RuntimeError):  # after some errors of CUDA every call fails
                bench.models.release()


def main() -> None:
    description = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--part", choices=list(SECONDS), default="measure")
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rows", nargs="+", default=[""], help="words in the names of rows")
    parser.add_argument("--seconds", type=float, help="within which all rows must end")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu --shape tiny tries the script without one")
    limit = SECONDS[options.part] if options.seconds is None else options.seconds
    ends = STARTED + limit
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    older = use_older_kernel() if options.device == "cuda" else None
    facts = "; ".join([*doctor.software(), *doctor.gpus(), *([older] if older else [])])
    first = options.part == "measure"
    results = Results(options.out, "gpu" if first else "gpu_profile", [*NOTES, "", f"{facts}."])
    bench = Bench(options.device, options.shape)
    # Ends the process even if a kernel hangs.
    left = max(ends + GRACE - time.monotonic(), 1)
    faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__)
    try:
        rows = measured(bench) if first else profiled(bench)
        measure(bench, rows, options.rows, results, ends)
    finally:
        faulthandler.cancel_dump_traceback_later()
    sys.stdout.write(results.text())


if __name__ == "__main__":
    main()
