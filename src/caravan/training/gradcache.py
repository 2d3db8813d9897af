"""Gradient caching: large contrastive batches in the memory of one chunk (arXiv 2101.06983).

    python train.py gradcache.chunk=16 batching.queries_per_batch=1024 ...

A contrastive loss needs the embeddings of all texts at once, but not their activations:

1. embed all chunks without gradient;
2. compute the loss and its gradient with respect to each embedding;
3. embed the chunks again one by one, and backpropagate the gradient of their embeddings.

The result is the gradient of the whole batch, at the cost of a second forward pass. The random
state is restored so that a chunk has the same dropout both times. DistributedDataParallel reduces
gradients once per step: all chunks but the last are backpropagated within the forward pass of DDP,
before DDP prepares its reduction, and the step returns the loss of the last chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caravan.data.batch import Chunk, Packed

Compute = Callable[[Chunk], Tensor]


@dataclass
class GradCache:
    """Computes a loss and its gradient chunk by chunk.

    Args:
        chunk: maximum texts per chunk; chunks of `caravan.data.batch.pack` may be smaller.
    """

    chunk: int

    def __call__(
        self,
        compute: Compute,
        texts: Packed,
        loss: Callable[[Tensor], Tensor],
        share: float = 1.0,
    ) -> Tensor:
        """Compute the loss and backpropagate all chunks but the last.

        Args:
            compute: maps a chunk of n texts to the network's output [n, ...].
            texts: all texts that the loss compares, such as queries and passages.
            loss: maps the outputs [N, ...] for the texts, in their order, to a scalar.
            share: the factor by which the caller scales the loss before its backward pass.

        Returns:
            The loss, whose backward pass (by the caller) computes the gradient of the last chunk.
        """
        device = texts.order.device
        states, rows = [], []
        own = len(texts.chunks) - texts.extra
        for i, chunk in enumerate(texts.chunks):
            states.append(_random_state(device))
            with torch.no_grad(), undisturbed(device) if i >= own else nullcontext():
                rows.append(compute(chunk))
        leaf = texts.restore(torch.cat(rows)).requires_grad_()
        # Autocast caches cast weights; those cast without gradient would not propagate one.
        torch.clear_autocast_cache()
        value = loss(leaf)
        _backward(value, device)
        passes = zip(texts.chunks, states, _by_chunk(texts, leaf), strict=True)
        for i, (chunk, state, gradient) in enumerate(passes):
            _set_random_state(state, device)
            part = (compute(chunk) * gradient).sum()
            if i + 1 < len(texts.chunks):
                _backward(part * share, device)
        # The value is the loss, and the gradient is that of the last chunk.
        return value.detach() + part - part.detach()


def undisturbed(device: torch.device) -> Any:
    """Restore the random state after the context."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _by_chunk(packed: Packed, leaf: Tensor) -> tuple[Tensor, ...]:
    """Split the gradient of the rows, which is in the order of the texts, by chunk."""
    assert leaf.grad is not None  # the loss depends on all arguments
    sizes = [len(chunk.input_ids) for chunk in packed.chunks]
    none = leaf.new_zeros(sum(sizes) - len(leaf), *leaf.shape[1:])
    return torch.cat((leaf.grad[packed.order], none)).split(sizes)


def _backward(value: Tensor, device: torch.device) -> None:
    """Run the backward pass without the autocast of the training step."""
    with torch.autocast(device.type, enabled=False):
        value.backward()


def _random_state(device: torch.device) -> Any:
    of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), of_device


def _set_random_state(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
