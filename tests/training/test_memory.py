"""The estimate of memory: against what autograd saves, and a refusal before anything loads."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from caravan.errors import InputError
from caravan.models.adapters import LoRA
from caravan.models.hardware import settle_precisions
from caravan.models.preparing import _policy
from caravan.training.memory import GIB, Need, device_memory, need, refuse_too_large

TOKENS = 4 * 96


def _llama(**shape: Any) -> Any:
    import transformers

    given = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    given |= {"num_key_value_heads": 2, "intermediate_size": 344}
    config = transformers.LlamaConfig(vocab_size=200, use_cache=False, **{**given, **shape})
    model = transformers.LlamaModel(config)
    model.set_attn_implementation("sdpa")
    return model


def _saved(model: nn.Module, bf16: bool) -> float:
    """Bytes that autograd keeps, weights and their copies left out."""
    of_weights = {tuple(p.shape) for p in model.parameters()}
    of_weights |= {tuple(reversed(shape)) for shape in of_weights}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) not in of_weights:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        out = model(input_ids=torch.arange(TOKENS).view(4, -1) % 200).last_hidden_state
    del out
    return float(sum(seen.values()))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_activations_are_what_autograd_saves(bf16: bool, heads: int) -> None:
    model = _llama(num_key_value_heads=heads)
    found = need(model, TOKENS, bf16).activations
    assert found == pytest.approx(_saved(model, bf16), rel=0.1)


class _Kept(TorchDispatchMode):
    """Counts the bytes that selective recomputation keeps of an operation's results."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if _policy(None, func) is CheckpointPolicy.MUST_SAVE:
            first = found[0] if isinstance(found, tuple) else found
            self.bytes += first.numel() * first.element_size()
        return found


@pytest.mark.parametrize("peft", [None, LoRA(rank=8, dropout=0.0)])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_selective_recomputation_keeps_what_its_policy_says(
    bf16: bool, heads: int, peft: LoRA | None
) -> None:
    model = _llama(num_key_value_heads=heads)
    if peft is not None:
        model = peft.apply(model)
    with _Kept() as kept, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(input_ids=torch.arange(TOKENS).view(4, -1) % 200)
    whole, again, selective = (
        need(model, TOKENS, bf16, how).activations for how in (False, True, "selective")
    )
    assert selective - again == pytest.approx(kept.bytes, rel=0.02)
    if peft is None:
        assert again < selective < (0.8 if bf16 else 1) * whole


@pytest.mark.parametrize("peft", [None, LoRA(rank=8, dropout=0.0)])
@pytest.mark.parametrize("chunks", [1, 3])
def test_each_chunk_has_its_own_copies_of_the_weights_that_are_cast(
    chunks: int, peft: LoRA | None
) -> None:
    """Under autocast as Lightning sets it, without a cache of its copies."""
    model = _llama()
    model.name_or_path = "a folder"
    if peft is not None:
        model = peft.apply(model)
    settle_precisions(model, bf16=True)
    shapes = {frozenset(p.shape) for p in model.parameters() if p.ndim == 2}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and frozenset(tensor.shape) in shapes:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    outs = []
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        for _ in range(chunks):
            outs.append(model(input_ids=torch.arange(7)[None] % 200).last_hidden_state)
    none, all_of_them = (need(model, 7, True, chunks=count).weights for count in (0, chunks))
    copies = sum(size for place, size in sizes.items() if place not in own)
    assert all_of_them - none == pytest.approx(copies, rel=0.15)


class _Casts(TorchDispatchMode):
    """The most bytes of weights' copies that are alive at a time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters() if p.ndim == 2}
        self.alive = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights:
            self._add(found.nbytes)
            weakref.finalize(found.untyped_storage(), self._add, -found.nbytes)
        return found

    def _add(self, size: int) -> None:
        self.alive += size
        self.most = max(self.most, self.alive)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputed_blocks_have_copies_of_their_weights_one_at_a_time(checkpointing: bool) -> None:
    model = _llama(num_hidden_layers=6).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with _Casts(model) as casts:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                out = model(input_ids=torch.arange(7)[None] % 200).last_hidden_state
            out.sum().backward()
    without = need(model, 7, bf16=True, chunks=0, checkpointing=False).weights
    counted = need(model, 7, bf16=True, checkpointing=checkpointing).weights - without
    assert counted == pytest.approx(casts.most, rel=0.15)


def test_a_7b_shape_is_counted_without_its_weights() -> None:
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 32, "intermediate_size": 11008}
    with torch.device("meta"):
        model = _llama(**shape)
    full = need(model, tokens=1024, bf16=True)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(6.48e9, rel=0.01)
    assert full.gradients == 4 * parameters
    assert full.optimizer == 8 * parameters
    assert full.weights == pytest.approx(6 * parameters, rel=0.001)
    adapters: Any = LoRA(rank=32).apply(model)
    few = need(adapters, tokens=1024, bf16=True)
    assert few.gradients == pytest.approx(4 * 80e6, rel=0.02)
    assert few.activations == full.activations
    # Frozen linear layers are kept in bf16, and need no copy.
    assert few.weights == pytest.approx(2 * parameters + 6 * 80e6, rel=0.01)
    packed = need(adapters, tokens=1024, bf16=True, quantised=True)
    assert packed.weights == pytest.approx(0.516 * parameters + 6 * 80e6, rel=0.01)
    assert (packed.gradients, packed.activations) == (few.gradients, few.activations)
    assert need(model, 1024, bf16=True, checkpointing=True).activations < full.activations / 5


def test_shares_of_eight_ranks_need_an_eighth_and_two_layers() -> None:
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 32, "intermediate_size": 11008}
    with torch.device("meta"):
        model = _llama(**shape)
    parameters = sum(p.numel() for p in model.parameters())
    layer = parameters / 32
    one, eight = (need(model, 1024, bf16=True, shares=shares) for shares in (1, 8))
    assert eight.optimizer == one.optimizer / 8
    assert eight.weights == pytest.approx(4 * parameters / 8 + 2 * 2 * layer, rel=0.01)
    assert eight.gradients == pytest.approx(4 * parameters / 8 + 2 * 2 * layer, rel=0.01)
    assert eight.activations == one.activations


def test_a_device_that_is_too_small_is_refused_with_the_remedy() -> None:
    needed = Need(weights=8 * GIB, gradients=8 * GIB, optimizer=16 * GIB, activations=GIB)
    refuse_too_large(needed, 33 * GIB, "cuda:0")
    with pytest.raises(
        InputError,
        match=r"needs about 33\.0 GiB \(weights 8\.0, gradients 8\.0, optimizer 16\.0, activations"
        r" 1\.0, logits 0\.0\) and cuda:0 has 24\.0 GiB; train adapters",
    ):
        refuse_too_large(needed, 24 * GIB, "cuda:0")
    long = Need(weights=GIB, gradients=0, optimizer=0, activations=40 * GIB)
    with pytest.raises(
        InputError, match=r"backbone\.checkpointing=true or gradcache\.chunk, or lower"
    ):
        refuse_too_large(long, 24 * GIB, "cuda:0")


def test_the_cpus_memory_is_that_of_the_machine() -> None:
    assert 2**28 < device_memory(torch.device("cpu")) < 2**50
