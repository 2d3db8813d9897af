"""Differentiable collectives for losses over all ranks; no-ops with one process.

Passages are gathered from all ranks with gradient; queries stay local. A rank's loss is the mean
over its own queries. DistributedDataParallel averages gradients over ranks, which gives the
gradient of the union batch; `weight` corrects for ranks with unequal shares.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def sizes(rows: int, device: torch.device) -> list[int]:
    """The number of rows of each rank."""
    if world() == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64, device=device))
    return torch.cat(counts).tolist()  # one synchronization with the device


def gather(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows [n_r, ...] of all ranks, in rank order, with gradient; `counts`: of `sizes`."""
    if world() == 1:
        return rows
    # All ranks must send the same shape; the padding is removed afterwards and has no gradient.
    padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
    received = _Gather.apply(torch.cat((rows, padding)))
    return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])


def mean(values: Tensor) -> Tensor:
    """The mean over ranks of a tensor that every rank has, without gradient."""
    if world() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world()


def gather_to_host(rows: Tensor, device: torch.device, at_once: int = 1 << 14) -> np.ndarray:
    """The rows [n_r, ...] of all ranks in rank order, without gradient.

    Args:
        device: of the collectives; it holds `at_once` rows of each rank at a time, not all.
    """
    if world() == 1:
        return rows.numpy()
    counts = sizes(len(rows), device)
    parts: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(*counts, 1), at_once):  # none at all has a shape too
        here = [min(max(count - start, 0), at_once) for count in counts]
        found = gather(rows[start : start + at_once].to(device), here).cpu()
        for of_rank, part in zip(parts, found.split(here), strict=True):
            of_rank.append(part)
    return torch.cat([part for of_rank in parts for part in of_rank]).numpy()


class _Gather(torch.autograd.Function):
    """All-gather with gradient: returns [W, n, ...]; backward sums the gradients over ranks."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        received = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(received, rows.contiguous())
        return torch.stack(received)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[rank()]


def weight(counts: list[int]) -> float:
    """The weight of a rank's mean such that the average over ranks is the mean over all rows."""
    return counts[rank()] * len(counts) / sum(counts)
