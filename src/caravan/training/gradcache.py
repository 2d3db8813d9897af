r"""Gradient caching: contrastive batches of any size in the memory of one chunk (arXiv 2101.06983).

    python train.py experiment=quickstart/retriever gradcache.chunk=16 \\
        batching.queries_per_batch=1024

A loss over many texts needs all their embeddings, but not all their activations:

1. embed every chunk without gradient;
2. compute the loss of these embeddings and its gradient with respect to each of them;
3. embed the chunks again, one by one, and backpropagate each one's part of that gradient.

The sum is the gradient of the whole batch, for twice the forward passes. Two things must hold. A
chunk has the same dropout both times: the random state is saved and restored. And ranks reduce
weight gradients only once: every chunk but the last is backpropagated within the training step,
where DistributedDataParallel does not yet listen; the step returns the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from caravan.data.batch import Chunk, Packed

Compute = Callable[[Chunk], Tensor]


class GradCache:
    """Computes a loss and its gradient chunk by chunk.

    Args:
        chunk: texts in a chunk, at most; `caravan.data.batch.pack` may have made smaller ones.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def __call__(
        self,
        compute: Compute,
        texts: Sequence[Packed],
        loss: Callable[..., Tensor],
        share: float = 1.0,
    ) -> Tensor:
        """The loss. Its backward pass is that of the last chunk; the others are done already.

        Args:
            compute: the network's output for a chunk of n texts, [n, ...].
            texts: what the loss compares, such as queries and passages, in chunks.
            loss: a function of the rows of each of `texts`, in their order, to a scalar.
            share: the factor by which the caller scales the loss before its backward pass.
        """
        device = texts[0].order.device
        chunks, states, leaves = [], [], []
        for packed in texts:
            rows = []
            own = len(packed.chunks) - packed.extra
            for i, chunk in enumerate(packed.chunks):
                chunks.append(chunk)
                states.append(_random_state(device))
                with torch.no_grad(), undisturbed(device) if i >= own else nullcontext():
                    rows.append(compute(chunk))
            leaves.append(packed.restore(torch.cat(rows)).requires_grad_())
        # Autocast caches weights; copies made without gradient would pass none on.
        torch.clear_autocast_cache()
        value = loss(*leaves)
        _backward(value, device)
        gradients = [
            gradient
            for packed, leaf in zip(texts, leaves, strict=True)
            for gradient in _by_chunk(packed, leaf)
        ]
        for i, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients, strict=True)):
            _set_random_state(state, device)
            part = (compute(chunk) * gradient).sum()
            if i + 1 < len(chunks):
                _backward(part * share, device)
        # Its value is the loss, its gradient that of the last chunk.
        return value.detach() + part - part.detach()


def undisturbed(device: torch.device) -> Any:
    """Restore the random state after the context."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _by_chunk(packed: Packed, leaf: Tensor) -> tuple[Tensor, ...]:
    """The gradient of each chunk's rows, from that of the rows in the order of the texts."""
    assert leaf.grad is not None  # the loss depends on all of its arguments
    sizes = [len(chunk.input_ids) for chunk in packed.chunks]
    none = leaf.new_zeros(sum(sizes) - len(leaf), *leaf.shape[1:])
    return torch.cat((leaf.grad[packed.order], none)).split(sizes)


def _backward(value: Tensor, device: torch.device) -> None:
    """Backpropagate outside the autocast of the step."""
    with torch.autocast(device.type, enabled=False):
        value.backward()


def _random_state(device: torch.device) -> Any:
    of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), of_device


def _set_random_state(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
