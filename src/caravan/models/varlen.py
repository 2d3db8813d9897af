"""Texts without padding: a chunk's tokens end to end in one row, each text seeing itself alone.

    python train.py backbone.attention=unpadded ...        python evaluate.py attention=unpadded ...

Linear layers then compute real tokens only, whatever the lengths that share a chunk. Positions
begin anew with each text, and a kernel for variable lengths keeps the texts apart: PyTorch's own
(`torch.nn.attention.varlen`) or flash-attn's on GPUs, in half precision. Elsewhere texts of one
length are computed together, which is right everywhere and slower than such a kernel.
What is read in another way (LLaRA's prompts, likelihoods) is padded and computed as by sdpa.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from caravan.errors import InputError
from caravan.models import cpu as padded
from caravan.models.cpu import LAYERS, computes_in_half

NAME = "unpadded"
CLOSE, CLOSE_HALF, NOISE = 1e-4, 1e-2, 4
"""How far states may be from those of a text alone, as a share of their norm, in float32 and in
half precision; or how many times as far as those of the same texts padded."""
_told: list[bool] | None = None


def attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D], or [B, H, L, D] of padded texts
    key: Tensor,  # [1, K, T, D], K divides H
    value: Tensor,  # [1, K, T, D]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: states [1, T, H, D], and no weights.

    Raises:
        ValueError: the layer asks for what this does not compute.
    """
    bounds = settings.pop("cu_seq_lens_q", None)
    if bounds is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **settings
        )
    asked = (*padded.UNKNOWN, "position_bias", "cache")
    refused = [name for name in asked if settings.get(name) is not None]
    if refused:
        raise ValueError(f"{type(module).__name__} wants {', '.join(refused)}")
    if _told is not None:
        _told.append(sliding_window is not None)
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # transformers counts a token itself in a window, but not where a decoder looks both ways.
    turned = not causal and getattr(module, "is_causal", False)
    reach = -1 if sliding_window is None else sliding_window - (not turned)
    window = (reach, 0 if causal else reach)
    half = _half(query)
    if has_kernel(query) and half is not None:
        if dropout:
            raise ValueError(f"{type(module).__name__} drops attention weights ({dropout:g})")
        # [1, H, T, D] to [T, H, D]
        flat = [states[0].transpose(0, 1).to(half) for states in (query, key, value)]
        longest = settings["max_length_q"]
        return _by_kernel(flat, bounds, longest, scaling, window)[None], None
    parts = []
    for some in _of_one_length((query, key, value), bounds):
        near = _near(some[0], window)
        found = padded.attention(module, *some, near, dropout, scaling, is_causal=causal)[0]
        parts.append(found.flatten(0, 1))
    return torch.cat(parts)[None], None


def states(
    backbone: nn.Module,
    input_ids: Tensor,  # [n, L], padded on either side
    attention_mask: Tensor,  # [n, L]
    token_types: Tensor | None = None,  # [n, L]
) -> tuple[Tensor, Tensor]:
    """The last layer's states [T, d] of the real tokens, text by text, and the lengths [n]."""
    real = attention_mask != 0
    real[:, 0] |= ~real.any(dim=1)  # of a text without tokens, a token of padding
    lengths = real.sum(dim=1)
    ids = input_ids[real]
    ends = lengths.cumsum(0)
    first = torch.repeat_interleave(ends - lengths, lengths, output_size=len(ids))
    bounds = nn.functional.pad(ends.int(), (1, 0))
    types = {} if token_types is None else {"token_type_ids": token_types[real][None]}
    found: Tensor = backbone(
        input_ids=ids[None],
        position_ids=(torch.arange(len(ids), device=ids.device) - first)[None],
        attention_mask=real.new_ones(1, 1, 1, 1),  # four dimensions: not to be made into another
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=input_ids.shape[1],
        max_length_k=input_ids.shape[1],
        **types,
    ).last_hidden_state[0]
    return found, lengths


def refuse_what_mixes_texts(model: Any) -> None:
    """Texts end to end must get the states that each gets alone: tried, on a few tokens.

    Architectures that hand the bounds of the texts on to no layer, or count positions in a way of
    their own, do so in silence. What rounding may do is seen from the same texts padded. Windows
    are longer than these texts; that layers tell of theirs is counted.

    Args:
        model: with this attention, without adapters.

    Raises:
        InputError: it mixes them.
    """
    if torch.cuda.is_available():
        kernel()
    trunk = model.base_model
    weight = next(trunk.parameters())
    if weight.is_meta:
        return
    name, config = type(trunk).__name__, trunk.config.get_text_config()
    lengths = (7, 12, 3)
    places = torch.arange(12, device=weight.device)
    mask = (places < torch.tensor(lengths, device=weight.device)[:, None]).long()
    ids = ((torch.arange(36, device=weight.device) * 7 + 5) % config.vocab_size).view(3, 12)
    training = trunk.training
    trunk.eval()
    try:
        with torch.no_grad(), _windows() as windows:
            together = states(trunk, ids, mask)[0]
        with torch.no_grad():
            beside = trunk(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
            alone = torch.cat(
                [
                    trunk(input_ids=text[None, :length]).last_hidden_state[0]
                    for text, length in zip(ids, lengths, strict=True)
                ]
            )
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        told = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"attention={NAME}: {name} cannot read texts without padding ({told}); set it to auto"
        ) from None
    finally:
        trunk.train(training)
    apart = _apart(together, alone)
    close = CLOSE_HALF if computes_in_half(trunk) else CLOSE
    if not apart <= max(close, NOISE * _apart(beside, alone)):
        raise InputError(
            f"attention={NAME}: {name} mixes texts that stand end to end (states differ"
            f" by {apart:.2g}); set it to auto"
        )
    kinds = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    windowed = kinds.count(LAYERS[1]) if kinds else config.num_hidden_layers
    if set(kinds) - set(LAYERS) or (window is not None and windows.count(True) != windowed):
        raise InputError(
            f"attention={NAME}: {name} keeps windows of attention by its masks alone, which this"
            " attention does not see; set it to auto"
        )


def refuse_dropout(model: Any) -> None:
    """No kernel for texts without padding drops attention weights, as training might ask.

    Raises:
        InputError: the model's config does, and there is a GPU to train on.
    """
    config = model.config.get_text_config()
    names = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
    for name in names if torch.cuda.is_available() else ():
        if getattr(config, name, 0):
            raise InputError(
                f"attention={NAME}: {type(model).__name__} drops attention weights ({name}="
                f"{getattr(config, name):g}), which no kernel for texts without padding does;"
                " set backbone.attention=auto"
            )


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a token's states, as a share of their norm."""
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@contextmanager
def _windows() -> Iterator[list[bool]]:
    """Whether each call of the attention was told of a window."""
    global _told
    _told = []
    try:
        yield _told
    finally:
        _told = None


def reads(backbone: Any) -> bool:
    """Whether a model, with an adapter or without, was given this attention."""
    config = getattr(backbone, "config", None)
    return getattr(config, "_attn_implementation", None) == NAME


def has_kernel(states: Tensor) -> bool:
    """Whether there is a kernel for variable lengths where the states are."""
    return states.is_cuda


def _half(states: Tensor) -> torch.dtype | None:
    """The half precision that the states have or autocast gives them; None in float32."""
    if states.dtype in (torch.bfloat16, torch.float16):
        return states.dtype
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@lru_cache(maxsize=1)
def kernel() -> tuple[str, Callable[..., Any]]:
    """Whose kernel for variable lengths the GPU has, "torch", "torch 2.11" or "flash_attn".

    Raises:
        InputError: there is none.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        if "window_size" in known:
            return "torch" if "enable_gqa" in known else "torch 2.11", varlen_attn
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        raise InputError(
            f"attention={NAME} needs torch 2.11 or flash-attn on a GPU; install one, or"
            " set it to auto"
        ) from None
    return "flash_attn", flash_attn_varlen_func


def _by_kernel(
    states: list[Tensor],  # query, key, value: [T, H, D], [T, K, D], [T, K, D]
    bounds: Tensor,  # [n + 1] int32
    longest: int,
    scale: float | None,
    window: tuple[int, int],
) -> Tensor:
    """States [T, H, D]."""
    whose, function = kernel()
    query, key, value = states
    settings: dict[str, Any] = {"window_size": window}
    if whose == "flash_attn":
        settings |= {"softmax_scale": scale, "causal": window[1] == 0}
    else:
        settings["scale"] = scale
    shared = query.shape[1] // key.shape[1]
    if shared > 1 and whose == "torch":
        settings["enable_gqa"] = True
    elif shared > 1 and whose == "torch 2.11":
        key, value = (other.repeat_interleave(shared, dim=1) for other in (key, value))
    found: Tensor = function(query, key, value, bounds, bounds, longest, longest, **settings)
    return found


def _of_one_length(
    flat: tuple[Tensor, Tensor, Tensor], bounds: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Texts of one length that follow each other: states [m, H, l, D] out of [1, H, T, D]."""
    begin = 0
    for length, texts in groupby(bounds.diff().tolist()):
        count = len(list(texts))
        end = begin + count * length
        query, key, value = (
            states[0, :, begin:end].unflatten(1, (count, length)).transpose(0, 1) for states in flat
        )
        yield query, key, value
        begin = end


def _near(query: Tensor, window: tuple[int, int]) -> Tensor | None:
    """A mask [1, 1, l, l] for texts that are longer than the window; True: to be seen."""
    length = query.shape[2]
    if not 0 <= window[0] < length - 1:
        return None
    places = torch.arange(length, device=query.device)
    back = places[:, None] - places
    return ((back <= window[0]) & (back >= -window[1]))[None, None]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
