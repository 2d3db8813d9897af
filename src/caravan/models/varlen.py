"""Attention without padding: the texts of a chunk are one row, and each attends only to itself.

    python train.py backbone.attention=unpadded ...        python evaluate.py attention=unpadded ...

Linear layers then compute only real tokens. Positions start at 0 in each text. On GPUs in half
precision, PyTorch's variable-length kernel (`torch.nn.attention.varlen`) separates the texts.
Otherwise texts of equal length are computed together, which is slower. LLaRA's prompts and
likelihoods need custom masks: they are padded and use sdpa.
"""

from __future__ import annotations

import inspect
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from caravan.data.batch import pack
from caravan.errors import InputError, first_line
from caravan.models import cpu
from caravan.models.bidirectional import unwrapped

NAME = "unpadded"
ARCHITECTURES = frozenset(
    "arcee bert cohere2 distilbert electra eurobert exaone4 gemma gemma3_text gpt_neox granite"  # noqa: SIM905
    " llama ministral mistral mixtral modernbert olmo2 olmo3 phi3 qwen2 qwen3 qwen3_moe smollm3"
    " starcoder2".split()
)
"""Model types (`config.model_type`) for which tests show equal states with and without padding.
Other models may silently ignore text boundaries or compute their own positions (RoBERTa)."""
TOLERANCE = 0.1
"""Largest relative difference between a text's states with and without padding. Rounding to bf16
causes .02 in SmolLM2's 30 layers; attention to another text causes .2 in MiniLM, 1 in SmolLM2."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' `AttentionInterface`.

    Args:
        query: [1, H, T, D] with `cu_seq_lens_q` in the settings, or padded [B, H, L, D].
        key, value: the same shape with K heads; K divides H.

    Returns:
        States [1, T, H, D] (padded: [B, L, H, D]), and None for the attention weights.

    Raises:
        InputError: If the layer has attention dropout, which the kernel does not support.
    """
    bounds = settings.pop("cu_seq_lens_q", None)
    if bounds is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **settings
        )
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # transformers includes the token itself in a window, except in a decoder made bidirectional.
    turned = not causal and getattr(module, "is_causal", False)
    reach = -1 if sliding_window is None else sliding_window - (not turned)
    window = (reach, 0 if causal else reach)
    half = _half(query)
    if has_kernel(query) and half is not None:
        if dropout:
            raise InputError(
                "attention-not-supported",
                f"attention={NAME}: the kernel does not support the dropout ({dropout:g}) of"
                f" {type(module).__name__}; set backbone.attention=auto",
            )
        flat = [states[0].transpose(0, 1).to(half) for states in (query, key, value)]
        longest = settings["max_length_q"]
        shared = flat[0].shape[1] != flat[1].shape[1]
        settings = {"scale": scaling, "window_size": window, "enable_gqa": shared}
        output = kernel()(*flat, bounds, bounds, longest, longest, **settings)
        return output[None], None
    parts, start = [], 0
    for length, texts in groupby(bounds.diff().tolist()):
        count = len(list(texts))
        end = start + count * length
        q, k, v = (
            states[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1)
            for states in (query, key, value)
        )
        mask = _window_mask(length, window, query.device)
        found = cpu.attention(module, q, k, v, mask, dropout, scaling, is_causal=causal)[0]
        parts.append(found.flatten(0, 1))
        start = end
    return torch.cat(parts)[None], None


def states(
    backbone: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    token_types: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the transformer on the real tokens only.

    Args:
        input_ids, attention_mask, token_types: [n, L], padded on either side.

    Returns:
        States [n, L, d] of the last layer, right-padded with zeros, and their mask [n, L].
    """
    texts, width = input_ids.shape
    real = attention_mask != 0
    real[:, 0] |= ~real.any(dim=1)  # an empty text keeps one token of padding
    lengths = real.sum(dim=1)
    places = real.flatten().nonzero()[:, 0]  # [T]
    ends = lengths.cumsum(0)
    rows = torch.arange(texts, device=places.device)
    rows = torch.repeat_interleave(rows, lengths, output_size=len(places))
    positions = torch.arange(len(places), device=places.device) - (ends - lengths)[rows]
    bounds = nn.functional.pad(ends.int(), (1, 0))
    inputs = {"input_ids": input_ids, "token_type_ids": token_types}
    found: Tensor = backbone(
        **{name: ids.flatten()[places][None] for name, ids in inputs.items() if ids is not None},
        position_ids=positions[None],
        attention_mask=real.new_ones(1, 1, 1, 1),  # transformers does not change a 4D mask
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=width,
        max_length_k=width,
    ).last_hidden_state[0]
    padded = found.new_zeros(texts * width, found.shape[1])
    padded = padded.index_copy(0, rows * width + positions, found)
    mask = torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
    return padded.view(texts, width, -1), mask.long()


def check_architecture(model: Any) -> None:
    """Check that a model can run without padding.

    Raises:
        InputError: If its architecture is not in `ARCHITECTURES`.
    """
    kind = model.config.get_text_config().model_type
    if kind not in ARCHITECTURES:
        raise InputError(
            "attention-not-supported",
            f"attention={NAME} is not supported by {type(model).__name__} ({kind}), only by"
            f" {', '.join(sorted(ARCHITECTURES))}; use attention=auto",
        )


@torch.no_grad()
def try_out(network: Any, device: torch.device) -> None:
    """Compare the states of two texts with those of the same texts padded (`TOLERANCE`).

    Does nothing if the network uses another attention. Call it on the device and under the autocast
    of the run, which determine the kernel.

    Args:
        network: has `of(chunk)` and `transformer`, like `caravan.models.biencoder.BiEncoder`.

    Raises:
        InputError: If the kernel fails, or the states differ.
    """
    trunk = unwrapped(network.transformer)
    if not is_enabled(trunk):
        return
    trunk = trunk.base_model
    chunk = pack([range(3, 15), range(5, 17)], 24).chunks[0].to(device)
    found: list[Tensor] = []

    def keep(_: Any, inputs: Any, output: Any) -> None:
        found.append(output.last_hidden_state.float().reshape(2, -1))

    hook = trunk.register_forward_hook(keep)
    training = [module for module in network.modules() if module.training]
    network.eval()  # dropout would differ
    try:
        with torch.compiler.set_stance("force_eager"):
            network.of(chunk)
            trunk.set_attn_implementation("sdpa")
            network.of(chunk)
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise _unusable(device, first_line(error)) from error
    finally:
        hook.remove()
        trunk.set_attn_implementation(NAME)
        for module in training:
            module.training = True
    unpadded, padded = found
    difference = float(((unpadded - padded).norm(dim=1) / padded.norm(dim=1)).max())
    if not difference <= TOLERANCE:  # also true for NaN
        raise _unusable(device, f"its states differ by {difference:.0%} from those with padding")


def _unusable(device: torch.device, reason: str) -> InputError:
    text = f"attention={NAME} does not work on {device}: {reason}; set attention=auto"
    return InputError("attention-not-supported", text)


def is_enabled(model: Any) -> bool:
    """Whether a transformer, with or without adapters, uses this attention."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def has_kernel(states: Tensor) -> bool:
    """Whether the variable-length kernel supports the device of these states."""
    return states.is_cuda


@cache
def kernel() -> Any:
    """PyTorch's variable-length attention kernel.

    Raises:
        InputError: If this version of PyTorch has no such kernel with windows and grouped heads.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn

        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            return varlen_attn
    except ImportError:
        pass
    raise InputError(
        "attention-not-supported",
        f"attention={NAME} needs PyTorch 2.12 or newer on a GPU; upgrade PyTorch or use"
        " attention=auto",
    )


def _half(states: Tensor) -> torch.dtype | None:
    """The half-precision dtype of the states or of autocast; None for float32."""
    if states.dtype in (torch.bfloat16, torch.float16):
        return states.dtype
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _window_mask(length: int, window: tuple[int, int], device: torch.device) -> Tensor | None:
    """A mask [1, 1, l, l], True where a token attends; None if the window covers the text."""
    if not 0 <= window[0] < length - 1:
        return None
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    return ((back <= window[0]) & (back >= -window[1]))[None, None]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
