"""Fully sharded training: every rank holds its share of each weight (FSDP2, arXiv 2304.11277).

    python train.py strategy=fsdp trainer.devices=8 peft=lora ...

Rank 0 builds the network as one process would, its weights mapped from their files and not read;
the others never open a file: they are sent its structure, without weights, and of every weight
their share, one weight at a time. A block's weights are whole only while it computes. Checkpoints
hold whole weights of what is trained, as those of other strategies do, so that a run may go on
under another strategy or on another number of ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from caravan.errors import InputError
from caravan.models.bidirectional import blocks
from caravan.models.hardware import precisions

RANKS = "data_parallel"
"""Lightning's name of the mesh's dimension that weights are sharded over."""


class FullySharded(ModelParallelStrategy):
    """Lightning's FSDP2, over all ranks, with checkpoints like those of one process."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # by `load_optimizer_state_dict`, like other strategies

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole, on rank 0; empty on the others."""
        module = self.lightning_module
        assert module is not None
        return whole_weights(module, trained_only=True)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """torch's own state of the optimiser, whole."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        wholes = {
            i: {name: self._on_first(_whole(moment)) for name, moment in moments.items()}
            for i, moments in state["state"].items()
        }
        return {**state, "state": wholes}

    def _on_first(self, moment: Any) -> Any:
        """Only rank 0 writes the checkpoint; on the others a whole moment would take its room."""
        return moment if self.is_global_zero else None

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        path = self.broadcast(checkpoint_path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        load_weights(module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {
                i: {name: _share_like(moment, weights[i]) for name, moment in moments.items()}
                for i, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})


def sharded(
    build: Callable[[], nn.Module], mesh: DeviceMesh, device: torch.device, bf16: bool
) -> tuple[nn.Module, nn.Module | None]:
    """The network that rank 0 builds, each rank with its share of every weight.

    Args:
        bf16: compute in bf16, on weights that stay float32; their gradients are summed in float32.

    Returns:
        The network; and on rank 0 its copy without weights and not sharded, to be filled and saved.

    Raises:
        InputError: on every rank, what rank 0 was told when it built.
    """
    whole: nn.Module | None = None
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            whole = _sendable(build())
            told = [without_weights(whole, bf16)]
        except InputError as error:
            told = [error]
    dist.broadcast_object_list(told, 0, device=device)
    (network,) = told
    if isinstance(network, InputError):
        raise network
    ranks, policy = mesh[RANKS], MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    for block in blocks(network):
        fully_shard(block, mesh=ranks, mp_policy=replace(policy, output_dtype=None))
    fully_shard(network, mesh=ranks, mp_policy=policy)
    for name in ("read",):  # what is called beside `forward`
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)
    sources = {} if whole is None else dict(whole.named_parameters())
    for names, weight in _by_weight(network):
        assert isinstance(weight, DTensor)
        source = sources.get(names[0])
        if source is None:
            sent = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        else:
            sent = source.detach().to(device, weight.dtype)
        share = distribute_tensor(sent, weight.device_mesh, weight.placements)
        _put(network, names, nn.Parameter(share, weight.requires_grad))
    return network.to(device), None if whole is None else without_weights(whole, bf16)


def _sendable(network: nn.Module) -> nn.Module:
    """Without the hooks that let inputs require gradients, which no other process can be sent.

    transformers and PEFT add them for activations that are computed again; our way needs none.
    """
    for module in network.modules():
        for key, hook in list(module._forward_hooks.items()):
            if "make_inputs_require_grad" in getattr(hook, "__qualname__", ""):
                del module._forward_hooks[key]
    return network


def without_weights(network: nn.Module, bf16: bool) -> nn.Module:
    """A copy whose weights have shapes and no content; what is no parameter is copied.

    Args:
        bf16: the arithmetic, see `precisions`.
    """
    memo: dict[int, Any] = {}
    for weight, dtype in precisions(network, bf16):
        empty = torch.empty(weight.shape, dtype=dtype, device="meta")
        memo[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    return copy.deepcopy(network, memo)


def whole_weights(network: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """Weights by name on rank 0, whole, in main memory; empty on the others, which must call too.

    Args:
        trained_only: leave out what is frozen.
    """
    _reshard(network)
    first = not dist.is_initialized() or dist.get_rank() == 0
    weights = {}
    for name, weight in network.named_parameters():
        if weight.requires_grad or not trained_only:
            whole = _whole(weight.detach())
            if first:
                weights[name] = whole
    return weights


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill a sharded network with whole weights, which every rank has."""
    _reshard(network)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name in weights:
                weight.copy_(_share_like(weights[name], weight))


def fill(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Put weights into a network that has none, by name; tied ones stay one."""
    for names, weight in _by_weight(network):
        if names[0] in weights:
            _put(network, names, nn.Parameter(weights[names[0]], weight.requires_grad))
    return network


def _by_weight(network: nn.Module) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Each parameter with all its names."""
    names: dict[int, list[str]] = {}
    found: dict[int, nn.Parameter] = {}
    for name, weight in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
        found[id(weight)] = weight
    for key, weight in found.items():
        yield names[key], weight


def _put(network: nn.Module, names: list[str], weight: nn.Parameter) -> None:
    for name in names:
        owner, _, own = name.rpartition(".")
        setattr(network.get_submodule(owner), own, weight)


def _reshard(network: nn.Module) -> None:
    """After a forward pass without a backward one the outermost weights are still whole."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole, by all ranks together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a sharded tensor, in the same memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Any) -> Any:
    """In main memory."""
    return full(tensor).cpu() if isinstance(tensor, Tensor) else tensor


def _share_like(whole: Any, weight: Tensor) -> Any:
    """This rank's share of a whole tensor, laid out like a sharded weight."""
    if not isinstance(weight, DTensor) or not isinstance(whole, Tensor) or not whole.ndim:
        return whole
    whole = whole.to(weight.device, weight.dtype)
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
