"""Shared by benchmarks/gpu.py: the functions that measure its rows, on Llamas of random weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from shapes import SHAPES, TINY, Models, Size, even, operations, outline, share, tokens_of, unsorted
from torch.utils.data import DataLoader

from caravan.encoding import Encoding
from caravan.models import hardware, varlen
from caravan.models.backbone import BaseBackbone
from caravan.models.preparing import prepared
from caravan.training import memory
from caravan.training.gradcache import GradCache
from caravan.training.losses import InfoNCE
from caravan.training.optim import AdamW
from caravan.training.retriever import Retriever

UPDATES = 502_939 // 128  # of RepLLaMA's epoch over MS MARCO passages
CHUNK_TEXTS = 64  # of gradient caching in conf/experiment/papers/repllama_passage.yaml
Found = tuple[str, "float | str", str, "float | str"]
"""What, its value, the unit, and the share of the ceiling."""


class Bench:
    """What rows share: the device, the model on it, and the measured ceilings."""

    def __init__(self, device: str, shape: str) -> None:
        self.device, self.shape = torch.device(device), shape
        self.size = TINY if shape == "tiny" else Size()
        self.models = Models(self.device)
        self.rates: dict[str, float] = {}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def now(self) -> float:
        """The time, once the device has done its work."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any], repeats: int = 1) -> float:
        """The mean time of a call."""
        began = self.now()
        for _ in range(repeats):
            work()
        return (self.now() - began) / repeats

    def share(self, rate: float, ceiling: str = "bf16") -> float | str:
        return rate / self.rates[ceiling] if ceiling in self.rates else ""


def ceilings(bench: Bench) -> Iterator[Found]:
    size, device = bench.size.matrix, bench.device
    kinds = {"bf16": (torch.bfloat16, "highest"), "float32": (torch.float32, "highest")}
    kinds |= {"TF32": (torch.float32, "high")}
    for name, (dtype, precision) in kinds.items():
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        torch.set_float32_matmul_precision(precision)
        bench.seconds(lambda one=one, other=other: one @ other, 3)
        took = bench.seconds(lambda one=one, other=other: one @ other, 10)
        bench.rates[name] = 2 * size**3 / took
        yield f"matrix product, {name}", bench.rates[name] / 1e12, "TFLOP/s", ""
    torch.set_float32_matmul_precision("highest")
    source = torch.empty(bench.size.copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    bench.seconds(lambda: target.copy_(source))
    moved = 2 * len(source) / bench.seconds(lambda: target.copy_(source), 5)
    yield "memory, read and write", moved / 1e9, "GB/s", ""
    host = torch.empty(len(source) // 16, dtype=torch.uint8)
    host.random_()
    for name in ("pageable", "pinned") if bench.on_gpu else ():
        host = host.pin_memory() if name == "pinned" else host
        took = bench.seconds(lambda host=host: target[: len(host)].copy_(host), 3)
        yield f"copy to the device, {name}", len(host) / took / 1e9, "GB/s", ""


def build(bench: Bench, shape: str) -> Iterator[Found]:
    bench.models.release()
    yield "in bf16, on the device", bench.seconds(lambda: bench.models.base(shape)), "s", ""


def encode(
    bench: Bench, shape: str, lengths: np.ndarray, system: str, compiled: bool = False
) -> Iterator[Found]:
    """A forward pass over texts; the first chunk, the largest, is the warm-up."""
    attention = "sdpa" if system == "unsorted" else system
    network = bench.models.encoder(shape, attention)
    texts = tokens_of(lengths, SHAPES[shape]["vocab_size"])
    pack = partial(unsorted, texts) if system == "unsorted" else texts.packed
    packed = pack(hardware.GPU_CHUNK).to(bench.device)
    if compiled:
        prepared(network.transformer, False, bidirectional=False, compile=True)
    hardware.reset_peak_memory(bench.device)
    with torch.inference_mode():
        for chunk in packed.chunks if compiled else packed.chunks[:1]:
            network.of(chunk)
        took = bench.seconds(lambda: network.embed(packed))
    rate = bench.share(operations(shape, lengths.tolist()) / took)
    yield f"{len(packed.chunks)} chunks", packed.tokens / took, "tokens/s", rate
    yield f"{len(lengths):,} texts", took, "s", ""
    yield "peak", hardware.peak_memory(bench.device) or 0.0, "GiB", ""
    if compiled:
        bench.models.release()


class Step(Retriever):
    """RepLLaMA's training step, on a network that stays on its device."""

    def __init__(self, network: Any, gradcache: GradCache | None) -> None:
        given = BaseBackbone("llama"), None, None, Encoding(), InfoNCE(), AdamW(), 0, gradcache
        super().__init__(*given)
        self.network = network

    def configure_optimizers(self) -> Any:
        return self.optimizer.build(self, UPDATES)

    def cpu(self) -> Step:
        """Called by Lightning at the end; the copy would take longer than some rows."""
        return self


class Timed(pl.Callback):
    """Seconds of each step, and its operations on the device where a profiler is given."""

    def __init__(self, bench: Bench, profiler: Any = None) -> None:
        self.bench, self.profiler = bench, profiler
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.profiler is not None and trainer.global_step == trainer.max_steps - 1:
            self.profiler.start()
        hardware.reset_peak_memory(self.bench.device)
        self.began = self.bench.now()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seconds.append(self.bench.now() - self.began)
        if self.profiler is not None and trainer.global_step == trainer.max_steps:
            self.profiler.stop()


def fit(bench: Bench, network: Any, batches: list[Any], gradcache: Any, profiler: Any) -> Timed:
    """Train on each batch once, with the Trainer of a run."""
    timed = Timed(bench, profiler)
    trainer = pl.Trainer(
        accelerator="gpu" if bench.on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=len(batches),
        gradient_clip_val=1.0,
        callbacks=[timed],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Step(network, gradcache), DataLoader(batches, batch_size=None))
    return timed


def step(
    bench: Bench, shape: str, gpus: int, cached: bool = False, profiler: Any = None, **settings: Any
) -> Iterator[Found]:
    """One GPU's share of RepLLaMA's batch. `settings`: of `Models.trainee`."""
    vocabulary, size = SHAPES[shape]["vocab_size"], bench.size
    pads = settings.get("attention") != varlen.NAME
    own, lengths = share(vocabulary, max(size.queries // gpus, 1), size.group, pads)
    fewer, _ = share(vocabulary, max(size.queries // 32, 1), size.group, pads)
    batch, few = own.packed(), fewer.packed()
    gc.collect()  # the last row's trainer and its optimizer
    network = bench.models.trainee(shape, **settings)
    # A step of the whole batch takes too long for a separate warm-up.
    batches = [few, batch] if gpus == 1 else [batch] * 3
    timed = fit(bench, network, batches, GradCache(CHUNK_TEXTS) if cached else None, profiler)
    peak = hardware.peak_memory(bench.device) or 0.0
    took = min(timed.seconds[1:2] if profiler else timed.seconds[1:])
    passes = 3 + cached
    rate = bench.share(passes * operations(shape, lengths) / took)
    texts = batch.texts
    yield f"{len(texts.chunks)} chunks, {passes} passes", texts.tokens / took, "tokens/s", rate
    yield "a step", took, "s", ""
    if shape == "7b":
        yield "RepLLaMA-passage, one epoch", took * UPDATES / 3600, "h", ""
    # As in `caravan.training.memory.memory_needed`.
    chunks = texts.sizes
    if cached:
        chunks = [min(sum(chunks), CHUNK_TEXTS * Encoding().passage_length)]
    planned = memory.Step(
        chunks,
        bf16=True,
        recomputes=True,
        quantized=settings.get("four_bits", False),
        accumulates=cached,
        bf16_norms=settings.get("bf16_norms", False),
    )
    estimate = sum(memory.need(outline(shape), planned).values()) / memory.GIB
    of = peak / estimate if bench.on_gpu else ""  # a process on the CPU holds libraries too
    yield "peak; its share of the estimate", peak, "GiB", of


def search(bench: Bench, shape: str) -> Iterator[Found]:
    """Exact search over float16 vectors in main memory."""
    from caravan.retrieval.exact import Exact
    from caravan.retrieval.index import ArrayBlocks

    bench.models.release()
    size, dim = bench.size, SHAPES[shape]["hidden_size"]
    vectors, queries = np.empty((size.vectors, dim), np.float16), np.empty((size.searches, dim))
    for array in (vectors, queries):
        for start in range(0, len(array), 1 << 16):
            rows = array[start : start + (1 << 16)]
            rows[:] = torch.randn(rows.shape, device=bench.device).half().cpu().numpy()
    queries = queries.astype(np.float32)
    index = Exact(device=bench.device.type)
    index.build(ArrayBlocks(vectors))
    results: list[Any] = []
    took = bench.seconds(lambda: results.extend(index.search(queries)))
    scores, found = results[0][:, 0], results[1][:, 0]
    exact = (vectors[found].astype(np.float64) * queries).sum(axis=1)
    error = float(np.abs(scores / exact - 1).max())
    yield "best scores", error, "relative error", "ok" if error < 1e-5 else "WRONG"
    rate = bench.share(2 * size.vectors * size.searches * dim / took, "float32")
    yield f"{size.searches:,} queries, {size.vectors:,} x {dim:,}", took, "s", rate
    yield "vectors read", vectors.nbytes / took / 1e9, "GB/s", ""


def profile(bench: Bench, shape: str, gpus: int = 0, attention: str = "sdpa") -> Iterator[Found]:
    """The operations of a training step (of one of `gpus`), or of encoding a chunk."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    kind = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[kind])
    if gpus:
        rows = list(step(bench, shape, gpus, profiler=profiler, attention=attention))
        took = float(rows[1][1])
    else:
        network = bench.models.encoder(shape, attention)
        lengths = even(hardware.GPU_CHUNK if bench.on_gpu else 256, 196)
        texts = tokens_of(lengths, SHAPES[shape]["vocab_size"])
        packed = texts.packed(hardware.GPU_CHUNK).to(bench.device)
        with torch.inference_mode():
            network.embed(packed)
            took = bench.seconds(lambda: network.embed(packed))
            with profiler:
                bench.seconds(lambda: network.embed(packed))
    device = DeviceType.CUDA if bench.on_gpu else DeviceType.CPU
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        annotation = getattr(event, "is_user_annotation", False) or "Optimizer." in event.name
        if event.device_type != device or annotation:
            continue  # an annotation contains operations
        of = event.time_range.elapsed_us() if bench.on_gpu else event.self_cpu_time_total
        times.setdefault(event.name, []).append(of / 1e6)
    busy = sum(map(sum, times.values()))
    yield "without the profiler", took, "s", ""
    yield "operations on the device", sum(map(len, times.values())), "", busy / took
    for name in sorted(times, key=lambda name: -sum(times[name]))[:20]:
        what = f"{name[:110].replace('|', '/')} x {len(times[name]):,}"
        yield what, 1000 * sum(times[name]), "ms", sum(times[name]) / busy
