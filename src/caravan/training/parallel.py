"""Collectives that a loss needs, with gradient; no-ops on one process.

Passages are gathered from every rank with their gradient and queries stay local. Each rank's loss
is the mean over its own queries; DistributedDataParallel averages gradients over ranks, which then
is the gradient of one process with the union batch (`weight` mends ranks with unequal shares).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def sizes(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank has."""
    if world() == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64, device=device))
    return torch.cat(counts).tolist()  # which waits for the device once


def gather(rows: Tensor, counts: list[int]) -> Tensor:
    """Lay the rows [n_r, ...] of all ranks end to end, in rank order, with gradient.

    Args:
        counts: rows of each rank, as `sizes` tells.
    """
    if world() == 1:
        return rows
    most = max(counts)
    filler = rows.new_zeros(most - len(rows), *rows.shape[1:])
    # Every rank must send the same shape; the filler is cut off again, so it carries no gradient.
    sent = torch.cat((rows, filler))
    received = _Gather.apply(sent)
    return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])


class _Gather(torch.autograd.Function):
    """What all ranks have, [W, n, ...]; back comes the sum of the ranks' gradients of one's own."""

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
    """What a rank's mean must be scaled by so that the ranks' average is the mean over all rows."""
    return counts[rank()] * len(counts) / sum(counts)
