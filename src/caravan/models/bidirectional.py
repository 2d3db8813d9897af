"""Attention direction: which models are causal, and decoders made bidirectional.

A decoder was pretrained with causal attention, and retrieves better once it is trained with
bidirectional attention (arXiv 2404.05961). transformers' `config.is_causal=False` switches masks
and kernels, is saved in config.json and respected by plain transformers. Some architectures respect
it in part (with padding but not without, or in some layers) without an error, so every layer of a
bidirectional decoder is tested on a few tokens when the model is built or loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caravan.encoding import Encoding
from caravan.errors import InputError, first_line

LAYERS = ("full_attention", "sliding_attention")
"""The kinds of layers with known masks; others (chunked, linear) have their own masks."""
CLOSE = 1e-3
"""The largest effect of padding on a layer's output, relative to that of the last token."""


def has_adapter(model: nn.Module) -> bool:
    """Whether this is a PEFT model; by PEFT's mark, since importing PEFT takes seconds."""
    return hasattr(model, "peft_config")


def unwrapped(model: Any) -> Any:
    """The model inside its adapter; itself if it has none."""
    return model.get_base_model() if has_adapter(model) else model


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The attention layers, by the names that transformers gives them."""
    return [m for m in model.modules() if type(m).__name__.endswith("Attention")]


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer's layers: the list of modules that holds most of the weights."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    largest = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))
    return list(largest)


def is_decoder(model: nn.Module) -> bool:
    """Whether every attention layer was made causal.

    Layers without `is_causal` count as bidirectional, which is always correct, only slower.
    """
    layers = attention_layers(model)
    return bool(layers) and all(getattr(m, "is_causal", False) is True for m in layers)


def is_bidirectional(model: Any) -> bool:
    """Whether the model's config turns causal attention off."""
    config = getattr(unwrapped(model), "config", None)
    return config is not None and getattr(config.get_text_config(), "is_causal", None) is False


def is_causal(model: nn.Module) -> bool:
    """Whether no token attends to tokens, or padding, on its right."""
    return is_decoder(model) and not is_bidirectional(model)


def make_bidirectional(model: Any) -> Any:
    """Switch a decoder to bidirectional attention, in place.

    Raises:
        InputError: If the model is not a decoder, or has layers that are causal under any mask.
    """
    trunk = unwrapped(model)
    name, config = type(trunk).__name__, trunk.config.get_text_config()
    if not is_decoder(model):
        raise InputError(
            "not-bidirectional",
            "backbone.bidirectional is for decoders with causal attention, unlike"
            f" {name}; set it to false",
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - set(LAYERS)
    if kinds or len(attention_layers(model)) != config.num_hidden_layers:
        shown = ", ".join(sorted(kinds)) or "some without attention"
        raise InputError(
            "not-bidirectional",
            f"backbone.bidirectional: {name} has layers ({shown}) that are causal under any mask;"
            " set it to false, or choose another decoder",
        )
    for each in (trunk.config, config):
        each.is_causal = False
        each.use_cache = False  # cached states of past tokens would miss the future ones
    return model


def check_direction(encoding: Encoding, model: Any) -> None:
    """Check that the encoding and every layer of the model agree on the attention direction.

    Args:
        model: with or without a head or an adapter.

    Raises:
        InputError: If they differ.
    """
    name = type(unwrapped(model)).__name__
    bidirectional = is_decoder(model) and is_bidirectional(model)
    if bidirectional != encoding.bidirectional:
        ways = ("bidirectional", "causal") if bidirectional else ("causal", "bidirectional")
        raise InputError(
            "direction-mismatch",
            f"{name} is {ways[0]}, but its encoding says {ways[1]}; set"
            " backbone.bidirectional=true",
        )
    if bidirectional:
        _check_layers(model, name)


@torch.no_grad()
def _check_layers(model: Any, name: str) -> None:
    """In every layer the first token must attend to the last one, and never to padding.

    Tried with padding and without, since kernels take other paths where there is no mask.
    """
    trunk = unwrapped(model).base_model
    device = next(trunk.parameters()).device
    ids = torch.arange(5, 9, device=device).unsqueeze(0) % trunk.config.get_text_config().vocab_size
    padded = torch.tensor([[1, 1, 1, 0]], device=device)
    training = trunk.training
    trunk.eval()
    try:
        whole = _effects(trunk, ids, None, [3])
        masked = _effects(trunk, ids, padded, [2, 3])
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise InputError(
            "not-bidirectional",
            f"backbone.bidirectional: {name} could not be tested ({first_line(error)}); set it to"
            " false, or choose another decoder",
        ) from None
    finally:
        trunk.train(training)
    wrong = [
        str(layer)
        for layer, ((last,), (real, padding)) in enumerate(zip(whole, masked, strict=True))
        if not (last > 0 and real > 0 and padding <= CLOSE * real)
    ]
    if wrong:
        raise InputError(
            "not-bidirectional",
            f"backbone.bidirectional: {name} ignores config.is_causal=False in layers"
            f" {', '.join(wrong)} with backbone.attention={trunk.config._attn_implementation}; set"
            " it to false, or choose another attention or decoder",
        )


def _effects(trunk: Any, ids: Tensor, mask: Tensor | None, places: list[int]) -> list[list[float]]:
    """How much each layer's output at the first token changes when another token's input does.

    Args:
        places: the tokens to change, one after the other.

    Returns:
        For each layer the largest change for each place.
    """
    effects: list[list[float]] = []

    def measure(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        before = output[0] if isinstance(output, tuple) else output
        changes = []
        for place in places:
            other = states.clone()
            other[:, place] = -other[:, place]
            if args:
                after = layer.forward(other, *args[1:], **kwargs)
            else:
                after = layer.forward(**{**kwargs, "hidden_states": other})
            after = after[0] if isinstance(after, tuple) else after
            changes.append(float((after - before)[:, 0].abs().max()))
        effects.append(changes)

    hooks = [
        layer.register_forward_hook(measure, with_kwargs=True) for layer in attention_layers(trunk)
    ]
    try:
        trunk(input_ids=ids, attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    return effects
