"""Fully sharded training: every rank holds its share of each weight (FSDP2, arXiv 2304.11277).

    python train.py strategy=fsdp trainer.devices=8 peft=lora ...
    python train.py strategy=fsdp strategy.replicas=4 trainer.devices=8 trainer.num_nodes=4 ...

Rank 0 builds the network as one process would, with its weights memory-mapped. The other ranks open
no file: they receive the network's structure, then their share of one weight after the other. A
block's weights are gathered only while it computes. Each of several replicas gathers them among its
own ranks; only gradients are reduced over all. Checkpoints hold full trainable weights, so a run
can resume under another strategy or on another number of ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from pydantic import PositiveInt
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from caravan.errors import InputError
from caravan.models.bidirectional import blocks
from caravan.models.hardware import precisions


class FullySharded(ModelParallelStrategy):
    """Lightning's FSDP2, with checkpoints like those of one process.

    Args:
        replicas: copies of the weights. One is sharded over all ranks; with `trainer.num_nodes`,
            each node has a copy that is sharded within it (HSDP, FSDP1's `HYBRID_SHARD`).
    """

    def __init__(self, replicas: PositiveInt = 1) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.replicas = replicas

    @property
    def shards(self) -> int:
        """The number of ranks that a copy of the weights is sharded over.

        Raises:
            InputError: The replicas would have unequal numbers of ranks.
        """
        ranks = self.num_nodes * self.num_processes
        if ranks % self.replicas:
            raise InputError(
                "uneven-replicas",
                f"strategy.replicas: {ranks} ranks cannot be divided into {self.replicas} replicas"
                " of equal size; choose a divisor of their number, such as trainer.num_nodes",
            )
        return ranks // self.replicas

    def setup_environment(self) -> None:
        shape = (self.replicas, self.shards)
        self._data_parallel_size = self.replicas * self.shards
        self._tensor_parallel_size = 1
        super().setup_environment()
        mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:  # ranks are numbered node by node, so a copy stays within one
            names = ("replicate", "shard")
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = mesh

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # by `load_optimizer_state_dict`, like other strategies

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return full_weights(self.lightning_module, trainable_only=True)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """torch's state of the optimizer, full on rank 0; DCP's has names for keys, not numbers."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state = optimizer.state_dict()
        moments = {}
        for i, values in state["state"].items():
            gathered = {name: full(value).cpu() for name, value in values.items()}
            moments[i] = gathered if self.is_global_zero else {}
        return {**state, "state": moments}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        path = self.broadcast(checkpoint_path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_weights(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {
                i: {name: _share_of(moment, weights[i]) for name, moment in moments.items()}
                for i, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})


def sharded(
    build: Callable[[], nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    bf16: bool,
    forward_methods: Sequence[str] = (),
) -> tuple[nn.Module, nn.Module | None]:
    """The network that rank 0 builds, with this rank's share of every weight.

    Args:
        mesh: all ranks; if it has two dimensions, the weights are replicated over the first one.
        bf16: compute in bf16. The weights stay float32, and gradients are summed in float32.
        forward_methods: methods that compute, beside `forward`.

    Returns:
        The network; and on rank 0 its copy on the meta device, for `fill` before it is saved.

    Raises:
        InputError: On every rank, what `build` raised on rank 0.
    """
    built: nn.Module | None = None
    sent: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            built = _without_hooks(build())
            sent = [without_weights(built, bf16)]
        except InputError as error:
            sent = [error]
    dist.broadcast_object_list(sent, 0, device=device)
    (network,) = sent
    if isinstance(network, InputError):
        raise network
    shard(network, mesh, bf16)
    for name in forward_methods:
        register_fsdp_forward_method(network, name)
    sources = {} if built is None else dict(built.named_parameters())

    def share(name: str, weight: Tensor) -> Tensor:
        assert isinstance(weight, DTensor)
        if name in sources:
            whole = sources[name].detach().to(device, weight.dtype)
        else:
            whole = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        return distribute_tensor(whole, weight.device_mesh, weight.placements)

    # Weight by weight, so that no rank holds a full copy. (set_model_state_dict would convert all
    # of rank 0's mapped weights at once, and untie tied ones.)
    _replace_weights(network, share)
    return network.to(device), None if built is None else without_weights(built, bf16)


def shard(network: nn.Module, mesh: DeviceMesh, bf16: bool) -> None:
    """Shard the weights of a network, block by block and the rest together, in place."""
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    for block in blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=replace(policy, output_dtype=None))
    fully_shard(network, mesh=mesh, mp_policy=policy)


def _without_hooks(network: nn.Module) -> nn.Module:
    """Remove hooks of transformers and PEFT for activation checkpointing, which cannot be pickled.

    `caravan.models.preparing` needs none.
    """
    for module in network.modules():
        for key, hook in list(module._forward_hooks.items()):
            if "make_inputs_require_grad" in getattr(hook, "__qualname__", ""):
                del module._forward_hooks[key]
    return network


def without_weights(network: nn.Module, bf16: bool) -> nn.Module:
    """A copy whose parameters are on the meta device, in the precision that they are trained in."""
    memo: dict[int, Any] = {}
    for weight, dtype in precisions(network, bf16):
        empty = torch.empty(weight.shape, dtype=dtype, device="meta")
        memo[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    return copy.deepcopy(network, memo)


def full_weights(network: nn.Module, trainable_only: bool = False) -> dict[str, Tensor]:
    """Full weights by name, on the CPU of rank 0; empty on other ranks, which must call it too."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainable_only
    )
    weights: dict[str, Any] = get_model_state_dict(network, options=options)
    return weights


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load full weights, which every rank has, into a sharded network; others stay as they are."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(network, dict(weights), options=options)


def fill(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Put weights into a network on the meta device, by name."""
    _replace_weights(network, lambda name, weight: weights.get(name, weight))
    return network


def _replace_weights(network: nn.Module, new: Callable[[str, Tensor], Tensor]) -> None:
    """Replace each weight by what `new` returns for its (first) name; tied ones stay tied."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in network.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    for weight, tied in names.items():
        parameter = nn.Parameter(new(tied[0], weight), weight.requires_grad)
        for name in tied:
            owner, _, own = name.rpartition(".")
            setattr(network.get_submodule(owner), own, parameter)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered over all ranks; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share_of(whole: Any, weight: Tensor) -> Any:
    """This rank's share of a full tensor, sharded like `weight`; scalars as they are."""
    if not isinstance(weight, DTensor) or not isinstance(whole, Tensor) or not whole.ndim:
        return whole
    whole = whole.to(weight.device, weight.dtype)
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
