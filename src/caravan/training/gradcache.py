r"""Gradient caching: contrastive batches of any size in the memory of one piece (arXiv 2101.06983).

    python train.py experiment=quickstart/retriever gradcache.chunk=16 \\
        batching.queries_per_batch=1024

A loss over many texts needs all their embeddings, but not all their activations. So every piece is
embedded without gradient; the loss on these embeddings gives the gradient of each; then the pieces
are embedded once more, one by one, and each is sent back with its own part of that gradient. The
sum is the gradient of the whole batch, for twice the forward passes.
Two things must hold: a piece sees the same dropout both times (the random state is kept), and ranks
exchange weight gradients once only. Every piece but the last goes back within the training step,
where DistributedDataParallel does not listen yet; the last is what the step returns.
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
    """Computes a loss and its gradient piece by piece.

    Args:
        chunk: texts a piece, at most; a chunk that `caravan.data.batch.pack` made may have fewer.
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
        """The loss, whose backward pass sends the last piece back; the others went back already.

        Args:
            compute: what the network makes of a chunk of n texts, [n, ...].
            texts: what the loss compares, such as queries and passages; a chunk is a piece.
            loss: from the rows of each of `texts`, in their order, to a scalar.
            share: what the caller will scale the returned loss by before its backward pass.
        """
        device = texts[0].order.device
        pieces, states, leaves = [], [], []
        for packed in texts:
            rows = []
            own = len(packed.chunks) - packed.extra
            for i, piece in enumerate(packed.chunks):
                pieces.append(piece)
                states.append(_random_state(device))
                with torch.no_grad(), undisturbed(device) if i >= own else nullcontext():
                    rows.append(compute(piece))
            leaves.append(packed.restore(torch.cat(rows)).requires_grad_())
        # Autocast keeps its copies of weights; those made without gradient would pass none on.
        torch.clear_autocast_cache()
        value = loss(*leaves)
        _back(value, device)
        gradients = [
            gradient
            for packed, leaf in zip(texts, leaves, strict=True)
            for gradient in _by_chunk(packed, leaf)
        ]
        for i, (piece, state, gradient) in enumerate(zip(pieces, states, gradients, strict=True)):
            _set_random_state(state, device)
            part = (compute(piece) * gradient).sum()
            if i + 1 < len(pieces):
                _back(part * share, device)
        # Its value is the loss, its gradient that of the last piece.
        return value.detach() + part - part.detach()


def undisturbed(device: torch.device) -> Any:
    """Random numbers go on after this context as if nothing had been drawn in it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _by_chunk(packed: Packed, leaf: Tensor) -> tuple[Tensor, ...]:
    """The gradient of each chunk's rows, from that of the rows in the order of the texts."""
    assert leaf.grad is not None  # the loss depends on all that it is given
    sizes = [len(chunk.input_ids) for chunk in packed.chunks]
    none = leaf.new_zeros(sum(sizes) - len(leaf), *leaf.shape[1:])
    return torch.cat((leaf.grad[packed.order], none)).split(sizes)


def _back(value: Tensor, device: torch.device) -> None:
    """Backward, outside of the autocast of the step around it."""
    with torch.autocast(device.type, enabled=False):
        value.backward()


def _random_state(device: torch.device) -> Any:
    of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), of_device


def _set_random_state(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
