"""Device, precision and tokens per chunk, as the machine suggests and the settings say.

bf16 where the processor computes in it (GPUs from Ampere on, CPUs with AVX512-BF16 or AMX), else
float32. Similarities, softmax and losses are float32 in any case, and so are trainable weights.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caravan.distributed import cores, local_rank
from caravan.errors import InputError
from caravan.models.bidirectional import blocks, has_adapter

PRECISIONS = ("auto", "bf16", "float32")
CPU_CHUNK, GPU_CHUNK = 2048, 32_768
"""Padded tokens per chunk: few for a CPU's caches, more to keep a GPU busy (not measured)."""
MOST_WORKERS = 8


def resolve(precision: str) -> str:
    """ "bf16" or "float32" for a setting of "auto", "bf16" or "float32"."""
    if precision not in PRECISIONS:
        text = f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}"
        raise InputError("unknown-precision", text)
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
    """Raise an InputError, before anything loads, for a GPU's kernel where there is no GPU."""
    if attention.startswith("flash") and not torch.cuda.is_available():
        raise InputError(
            "attention-not-supported",
            f"attention={attention} needs a GPU, and there is none; choose auto or sdpa",
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
    """Padded tokens per chunk; None is the machine's default."""
    if token_budget is not None:
        return token_budget
    return GPU_CHUNK if torch.cuda.is_available() else CPU_CHUNK


def workers(given: int | None, parameters: int | None) -> int:
    """Processes that tokenize ahead of a device; None chooses by model and machine.

    One tokenizes about 4e5 tokens a second, as many as an H200 embeds with 4e8 parameters (two
    operations for each, at .4 of its rate; counted). Twice that is kept ready on a GPU, where a
    core of its share stays free. A CPU never computes as fast.

    Args:
        parameters: of the model; None is unknown, and large.
    """
    if given is not None:
        return given
    if parameters is None or not torch.cuda.is_available():
        return 1
    free = cores() // torch.cuda.device_count() - 1
    return max(min(math.ceil(8e8 / parameters), free, MOST_WORKERS), 1)


def frozen_linears(model: nn.Module) -> list[nn.Linear]:
    """The frozen linear layers of the transformer's blocks."""
    return [
        layer
        for block in blocks(model)
        for layer in block.modules()
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad
    ]


def precisions(
    network: nn.Module, bf16: bool, bf16_norms: bool = False
) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    """Each weight with its precision in training; weights of four bits are left out.

    All are float32, except frozen linear layers if training computes in bf16: under autocast the
    results are the same to the bit. A base that is in no folder stays float32 too, since it is
    saved with the adapter merged into it.

    Args:
        bf16_norms: all other frozen weights are bf16 too, such as norms and embeddings. Results are
            then rounded between the layers as well.

    Raises:
        InputError: With `bf16_norms`, without `bf16`, or if no weights are frozen or the base is in
            no folder.
    """
    adapted: Any = next(filter(has_adapter, network.modules()), None)
    halved: set[int] = set()
    if bf16 and adapted is not None and adapted.active_peft_config.base_model_name_or_path:
        halved = {id(layer.weight) for layer in frozen_linears(network)}
        if bf16_norms:
            halved |= {id(weight) for weight in network.parameters() if not weight.requires_grad}
    elif bf16_norms:
        raise InputError(
            "no-frozen-base",
            "peft.bf16_norms=true needs bf16, and adapters on a backbone from a folder or the hub;"
            " set it to false",
        )
    for weight in network.parameters():
        if weight.is_floating_point():
            yield weight, torch.bfloat16 if id(weight) in halved else torch.float32


def settle_precisions(network: nn.Module, bf16: bool, bf16_norms: bool = False) -> None:
    """Convert each weight to its precision in training (`precisions`).

    In bf16, adapters take their inputs as they are: autocast converts them, and PEFT would first
    write a float32 copy of each.
    """
    for weight, dtype in precisions(network, bf16, bf16_norms):
        weight.data = weight.data.to(dtype)
    if bf16 and any(map(has_adapter, network.modules())):
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted_layers: Any = (m for m in network.modules() if isinstance(m, BaseTunerLayer))
        for layer in adapted_layers:
            layer.cast_input_dtype_enabled = False


def host_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def reset_peak_memory(device: torch.device) -> None:
    """Measure the peak memory from now on: of a GPU, or of this process (Linux only)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float | None:
    """GiB since `reset_peak_memory`; None where the system does not measure it."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    kib = re.search(r"VmHWM:\s*(\d+) kB", status)
    return round(int(kib[1]) / 2**20, 3) if kib else None


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters; one of four bits counts as one."""
    total = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)
        total += parameter.numel() if packed is None else math.prod(packed.shape)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), total
