"""Shared by benchmarks/gpu.py: each attention kernel against float64 on the CPU, on tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from shapes import tokens_of
from torch import Tensor

from caravan.data.batch import Packed
from caravan.encoding import Encoding
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import pack_linears
from caravan.models.loading import set_attention
from caravan.models.preparing import prepared
from caravan.training.gradcache import GradCache

KINDS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "window": {"sliding_window": 16},
    "bidirectional": {"bidirectional": True},
}
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""The largest relative errors that rounding explains."""
VOCABULARY, WIDTH = 200, 128
LENGTHS = np.array([40, 1, 17, 33, 2, 33, 16, 25])


def model_of(
    kind: str, attention: str, dtype: torch.dtype, device: torch.device, recompute: bool = False
) -> BiEncoder:
    """A retriever with the same weights for every attention and precision."""
    from transformers import MistralConfig, MistralModel

    settings = {"sliding_window": None, **KINDS[kind]}
    bidirectional = settings.pop("bidirectional", False)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # with 0.02, attention changes the states little
        **settings,
    )
    torch.manual_seed(0)
    model = set_attention(MistralModel(config).to(device), attention)
    for weight in model.parameters():  # as when loading; buffers keep their precision
        weight.data = weight.data.to(dtype)
    model = prepared(model, recompute, bidirectional)
    return BiEncoder(model, Encoding(bidirectional=bidirectional)).train()


def texts() -> Packed:
    """Texts of several lengths in one chunk."""
    return tokens_of(LENGTHS, VOCABULARY).packed(1 << 15)


def weighted(rows: Tensor) -> Tensor:
    """A loss whose gradient differs for every value."""
    weights = torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).view(rows.shape)
    return (rows.double() * weights.to(rows.device)).sum()


def gradient(network: BiEncoder) -> Tensor:
    return torch.cat([p.grad.double().cpu().flatten() for p in network.parameters()])


@cache
def expected(kind: str) -> tuple[Tensor, Tensor]:
    """Embeddings [N, d] in float64, each text by itself, and the gradient of `weighted`."""
    network = model_of(kind, "eager", torch.float64, torch.device("cpu"))
    found = tokens_of(LENGTHS, VOCABULARY)
    ids = np.split(found.ids, np.cumsum(found.lengths)[:-1])
    alone = (torch.from_numpy(text).long()[None] for text in ids)
    rows = torch.cat([network(text, torch.ones_like(text), full=True) for text in alone])
    weighted(rows).backward()
    return rows.detach().double(), gradient(network)


def error(found: Tensor, reference: Tensor) -> float:
    return float((found.double().cpu() - reference).norm() / reference.norm())


def kernel(
    bench: Any, attention: str, dtype: torch.dtype, on_cpu: bool = False
) -> Iterator[tuple[str, float | str, str, float | str]]:
    """The errors of embeddings and of gradients, the largest of all `KINDS`.

    Args:
        on_cpu: on the CPU, with the linear layers that `evaluate.py` uses there.
    """
    if attention.startswith("flash") and find_spec("flash_attn") is None:
        raise ImportError("flash-attn is not installed")
    device = torch.device("cpu") if on_cpu else bench.device
    packed, bf16 = texts().to(device), dtype == torch.bfloat16
    errors: dict[str, float] = {}

    def note(what: str, value: float) -> None:
        errors[what] = float(np.maximum(value, errors.get(what, 0.0)))  # NaN stays

    for kind in KINDS:
        rows, gradients = expected(kind)
        network = model_of(kind, attention, dtype, device).eval()
        if on_cpu:
            pack_linears(network)
        with torch.inference_mode():
            note("embeddings", error(network.embed(packed), rows))
        network = model_of(kind, attention, torch.float32, device, True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            weighted(network.embed(packed)).backward()
        note("gradient, checkpointing", error(gradient(network), gradients))
        network = model_of(kind, attention, torch.float32, device, True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = GradCache(3)(network.of, packed.split(3), weighted)
        loss.backward()
        note("gradient, gradient caching", error(gradient(network), gradients))
    for what, value in errors.items():
        right = value <= BOUNDS[dtype]
        yield what, value, "relative error", "ok" if right else f"WRONG: over {BOUNDS[dtype]:g}"


def kernels() -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the rows."""
    found: list[tuple[str, dict[str, Any]]] = []
    for dtype in BOUNDS:
        name = str(dtype).removeprefix("torch.")
        for attention in ("sdpa", "unpadded"):
            found.append((f"{attention}, {name}", {"attention": attention, "dtype": dtype}))
        fast = {"attention": "auto", "dtype": dtype, "on_cpu": True}
        found.append((f"auto on the CPU, {name}", fast))
    flash = {"attention": "flash_attention_2", "dtype": torch.bfloat16}
    return [*found, ("flash_attention_2, bfloat16", flash)]
