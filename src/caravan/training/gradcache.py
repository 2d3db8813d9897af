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
from typing import Any

import torch
from torch import Tensor

from caravan.batches import Chunk, Packed

Compute = Callable[[Chunk], Tensor]


class GradCache:
    """Computes a loss and its gradient piece by piece.

    Args:
        chunk: texts a piece; a chunk of the batch (`caravan.batches.pack`) may be smaller.
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
            texts: what the loss compares, such as queries and passages.
            loss: from the rows of each of `texts`, in their order, to a scalar.
            share: what the caller will scale the returned loss by before its backward pass.
        """
        pieces = [
            [piece for chunk in packed.chunks for piece in chunk.split(self.chunk)]
            for packed in texts
        ]
        device = pieces[0][0].input_ids.device
        states, rows = [], []
        with torch.no_grad():
            for piece in (piece for of_texts in pieces for piece in of_texts):
                states.append(_random_state(device))
                rows.append(compute(piece))
        # Autocast keeps its copies of weights; those made without gradient would pass none on.
        torch.clear_autocast_cache()
        gradients = []
        first = 0
        leaves = []
        for packed, of_texts in zip(texts, pieces, strict=True):
            own = torch.cat(rows[first : first + len(of_texts)])
            leaves.append(packed.restore(own).requires_grad_())
            first += len(of_texts)
        del rows
        value = loss(*leaves)
        _back(value, device)
        for packed, of_texts, leaf in zip(texts, pieces, leaves, strict=True):
            assert leaf.grad is not None  # the loss depends on all that it is given
            sizes = [len(piece.input_ids) for piece in of_texts]
            gradients += leaf.grad[packed.order].split(sizes)
        every = [piece for of_texts in pieces for piece in of_texts]
        for i, (piece, state, gradient) in enumerate(zip(every, states, gradients, strict=True)):
            _set_random_state(state, device)
            part = (compute(piece) * gradient).sum()
            if i + 1 < len(every):
                _back(part * share, device)
        # Its value is the loss, its gradient that of the last piece.
        return value.detach() + part - part.detach()


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
