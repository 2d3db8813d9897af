"""Counts the bytes that a training step allocates, on tensors without data.

The step is that of a retriever. It computes on fake tensors of the CPU, so that any width is quick,
with the dropout and the attention of a GPU.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers.masking_utils
from tests.tiny import tiny_backbone
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caravan.data.batch import TokenIds, TrainBatch, Unpacked
from caravan.encoding import Encoding
from caravan.models import varlen
from caravan.models.biencoder import BiEncoder
from caravan.models.hardware import frozen_linears, settle_precisions
from caravan.training import fsdp, parallel
from caravan.training.losses import InfoNCE
from caravan.training.optim import AdamW
from caravan.training.retriever import Retriever


@dataclass
class Counted:
    """Bytes of the weights, and of all other tensors at the peak of a step."""

    weights: int
    others: int


class Allocations(TorchDispatchMode):
    """Counts the bytes of live tensors after each operation; `peak` is the most of them.

    Args:
        tokens: real tokens of a chunk, which only data would tell.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.peak = tokens, 0
        self._storages: dict[int, Any] = {}

    def keep(self, tensor: Tensor) -> None:
        """Count a tensor as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key))

    def now(self) -> int:
        """Bytes of the live tensors; FSDP resizes its own."""
        storages = [reference() for reference in list(self._storages.values())]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # asked by transformers: the positions are those of one text
        if func is torch.ops.aten.nonzero.default:
            found: Any = args[0].new_empty(self.tokens, 1, dtype=torch.int64)
        else:
            found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self.keep(one)
        self.peak = max(self.peak, self.now())
        return found


def batch(texts: int, length: int, chunks: int = 1, pads: bool = True) -> TrainBatch:
    """Four queries and their passages of `length` tokens, or half of it and more if not `pads`."""
    lengths = np.full(texts, length, np.int32)
    if not pads:
        lengths = np.random.default_rng(0).integers(length // 2, length + 1, texts, np.int32)
    sides = np.split(lengths, [4])
    rows = np.arange(texts - 4).reshape(4, -1)
    fields: Any = {
        "texts": tuple(TokenIds(np.zeros(side.sum(), np.int32), side) for side in sides),
        "passage_rows": rows,
        "passage_keys": rows,
        "excluded_keys": rows[:, :1],
    }
    if chunks == 1 and pads:  # queries and passages in one
        fields["texts"] = TokenIds.joined(fields["texts"])
    return Unpacked(TrainBatch, fields, -(-texts // chunks) * length, 0, pads).packed()


def count(
    transformer: nn.Module,
    texts: TrainBatch,
    patch: pytest.MonkeyPatch,
    bf16: bool = True,
    bf16_norms: bool = False,
    shards: int = 0,
    steps: int = 1,
) -> Counted:
    """Count a training step, without its optimizer.

    Args:
        transformer: on the meta device, with its adapters; gets fake weights.
        shards: ranks of FSDP; this is one of them. 0: without FSDP.
        steps: whose gradients are accumulated.
    """
    network = BiEncoder(transformer, Encoding()).train()
    settle_precisions(network, bf16, bf16_norms)
    module = Retriever(tiny_backbone(), None, None, Encoding(), InfoNCE(), AdamW(lr=1.0), seed=0)
    module.network = network
    patch.setattr(module, "log_over_ranks", lambda *_: None)
    _compute_as_on_a_gpu(patch)
    mesh = None
    if shards:
        dist.init_process_group("fake", rank=0, world_size=shards, store=FakeStore())
        patch.setattr(parallel, "world", lambda: 1)  # fake ranks have no texts
        mesh = init_device_mesh("cpu", (shards,))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):  # token ids
            _give_weights(network)
            if mesh is not None:
                fsdp.shard(network, mesh, bf16)
            allocations = Allocations(texts.texts.tokens)
            for weight in (*network.parameters(), *network.buffers()):
                allocations.keep(weight.to_local() if isinstance(weight, DTensor) else weight)
            weights = allocations.now()
            with allocations:
                for _ in range(steps):
                    # As Lightning; with FSDP the weights are bf16 instead.
                    enabled = bf16 and not shards
                    with torch.autocast("cpu", torch.bfloat16, enabled, cache_enabled=False):
                        loss = module.training_step(texts, 0)
                    loss.backward()
    finally:
        if shards:
            dist.destroy_process_group()
    return Counted(weights, allocations.peak - weights)


def _give_weights(network: nn.Module) -> None:
    """Replace weights on the meta device by fake ones on the CPU."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(empty, weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _compute_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    def dropout(given: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
        return torch.native_dropout(given, p, training)[0]  # keeps a mask of bytes

    def varlen_attn(*states: Tensor, scale: float, **_: Any) -> Tensor:
        query, key, value = (each.transpose(0, 1)[None] for each in states[:3])
        found = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return found[0].transpose(0, 1)

    patch.setattr(nn.functional, "dropout", dropout)
    patch.setattr(varlen, "has_kernel", lambda _: True)
    patch.setattr(varlen, "kernel", lambda: varlen_attn)
    # transformers takes fake tensors for tracing, and makes masks that it does without otherwise.
    patch.setattr(transformers.masking_utils, "is_tracing", lambda _: False)


class _Product(torch.autograd.Function):
    """As bitsandbytes: keeps the packed weight alone, and unpacks it for each product."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, packed: Tensor, outputs: int) -> Tensor:
        ctx.shape, ctx.packed = (outputs, given.shape[-1]), packed
        return given @ given.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None, None


class _FourBits(bnb.nn.Linear4bit):
    """Allocates what bitsandbytes' layer does, whose kernels need data."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x.bfloat16(), self.weight, self.out_features)
        return product.to(x.dtype)


def quantize(model: Any) -> Any:
    """The model with four-bit layers, before it has adapters."""
    layers = {id(layer) for layer in frozen_linears(model.requires_grad_(False))}
    for name, layer in [each for each in model.named_modules() if id(each[1]) in layers]:
        number = layer.weight.numel()
        packed = torch.empty(number // 2, 1, dtype=torch.uint8)
        replaced = _FourBits(layer.in_features, layer.out_features, False, torch.bfloat16)
        replaced.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_type="nf4")
        scales = torch.empty(number // 64 + 4 * number // 64 // 256, dtype=torch.uint8)
        replaced.register_buffer("scales", scales)
        model.set_submodule(name, replaced)
    model.is_loaded_in_4bit = True  # read by PEFT
    return model
