"""What the machine is good for: device, precision, size of a chunk.

bf16 where the processor computes in it (GPUs from Ampere on, CPUs with AVX512-BF16 or AMX), else
float32. Similarities, softmax and losses are float32 in any case, and so are trainable weights.
"""

from __future__ import annotations

import torch

from caravan.distributed import local_rank
from caravan.errors import InputError

PRECISIONS = ("auto", "bf16", "float32")
CPU_CHUNK, GPU_CHUNK = 2048, 32_768
"""Padded tokens a chunk: few for a CPU's caches, more to keep a GPU busy (not measured)."""


def resolve(precision: str) -> str:
    """ "bf16" or "float32" for a setting of "auto", "bf16" or "float32"."""
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    return "bf16" if has_bf16() else "float32"


def has_bf16() -> bool:
    """Whether matrix products in bf16 are faster than in float32 here."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(
        getattr(torch.cpu, probe, bool)()
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def refuse_attention(attention: str) -> None:
    """Raise an InputError, before anything loads, where a kernel's name asks for a GPU."""
    if attention.startswith("flash") and not torch.cuda.is_available():
        raise InputError(
            f"attention={attention} runs on GPUs alone, and there is none; choose auto or sdpa"
        )


def device() -> torch.device:
    """This process' GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def named(device: torch.device) -> str:
    """A device for the log: cpu, or cuda:0 and the GPU's name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def chunk(token_budget: int | None) -> int:
    """The padded tokens a chunk for a setting that may leave them to the machine."""
    if token_budget is not None:
        return token_budget
    return GPU_CHUNK if torch.cuda.is_available() else CPU_CHUNK


def trainer_precision(precision: str) -> str:
    """Lightning's name for a resolved precision; weights stay float32 in both."""
    return "bf16-mixed" if precision == "bf16" else "32-true"


def dtype(precision: str) -> torch.dtype:
    """The weights' type for inference in a resolved precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
