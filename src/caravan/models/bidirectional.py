"""Decoders that look both ways: each token sees the whole text, as an encoder's do.

A decoder was pretrained to look to the left, and retrieves better once it has learned to use the
rest (arXiv 2404.05961). transformers' own setting, `config.is_causal=False`, is all that it takes:
masks and kernels follow it, config.json keeps it, and plain transformers loads it. Some
architectures heed it in part, with padding but not without, or in some layers, and none of them
tells; so each layer is tried on a few tokens whenever a model is made or loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models.cpu import LAYERS
from caravan.models.pooling import attention_layers, is_decoder, looks_both_ways, plain

CLOSE = 1e-3  # what a layer may owe to padding, beside what it owes to the last token


def look_both_ways(model: Any) -> Any:
    """The decoder, whose layers see the tokens on the right too from now on.

    Raises:
        InputError: it is no decoder, or has layers that no mask can turn.
    """
    trunk = plain(model)
    name, config = type(trunk).__name__, trunk.config.get_text_config()
    if not is_decoder(model):
        raise InputError(
            "backbone.bidirectional is for decoders, whose attention says that it looks to the"
            f" left; {name}'s does not: set it to false"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - set(LAYERS)
    if kinds or len(attention_layers(model)) != config.num_hidden_layers:
        told = ", ".join(sorted(kinds)) or "some without attention"
        raise InputError(
            f"backbone.bidirectional: {name} has layers ({told}) that look to the left whatever the"
            " mask; set it to false, or choose another decoder"
        )
    for each in (trunk.config, config):
        each.is_causal = False
        each.use_cache = False  # of a token's past, which is not all that it sees
    return model


def hold_to(encoding: Encoding, model: Any) -> None:
    """Refuse a model that looks another way than its folder promises, in any of its layers.

    Args:
        model: with a head or without, with an adapter or without.

    Raises:
        InputError: it does.
    """
    name = type(plain(model)).__name__
    both = is_decoder(model) and looks_both_ways(model)
    if both and not encoding.bidirectional:
        raise InputError(
            f"{name} looks both ways (config.is_causal is false), but its encoding does not say so;"
            " set backbone.bidirectional=true"
        )
    if encoding.bidirectional and not both:
        raise InputError(
            f"{name} looks to the left alone, but its encoding says that it looks both ways; set"
            " backbone.bidirectional=true"
        )
    if both:
        _refuse_what_does_not(model, name)


@torch.no_grad()
def _refuse_what_does_not(model: Any, name: str) -> None:
    """In every layer the first token must see the last one, and no token the padding after it.

    A layer is asked by changing what stands at the last token, and in the padding, and running it
    again. Without padding kernels get no mask, which is a way of its own to go wrong.
    """
    trunk = plain(model).base_model
    device = next(trunk.parameters()).device
    ids = torch.arange(5, 9, device=device).unsqueeze(0) % trunk.config.get_text_config().vocab_size
    padded = torch.tensor([[1, 1, 1, 0]], device=device)
    training = trunk.training
    trunk.eval()
    try:
        whole = _owed(trunk, ids, None, [3])
        masked = _owed(trunk, ids, padded, [2, 3])
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        told = str(error).strip().splitlines()[0]
        raise InputError(
            f"backbone.bidirectional: {name} cannot be tried ({told}); set it to false, or choose"
            " another decoder"
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
            f"backbone.bidirectional: {name} does not heed config.is_causal=False in every layer;"
            f" with backbone.attention={trunk.config._attn_implementation} the first token does not"
            f" see the last one, or sees padding, in layers {', '.join(wrong)}; set it to false, or"
            " choose another attention or decoder"
        )


def _owed(trunk: Any, ids: Tensor, mask: Tensor | None, places: list[int]) -> list[list[float]]:
    """For each layer what the first token's state owes to tokens: the largest change, by place."""
    found: list[list[float]] = []

    def ask(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        before = output[0] if isinstance(output, tuple) else output
        owed = []
        for place in places:
            other = states.clone()
            other[:, place] = -other[:, place]
            if args:
                after = layer.forward(other, *args[1:], **kwargs)
            else:
                after = layer.forward(**{**kwargs, "hidden_states": other})
            after = after[0] if isinstance(after, tuple) else after
            owed.append(float((after - before)[:, 0].abs().max()))
        found.append(owed)

    hooks = [
        layer.register_forward_hook(ask, with_kwargs=True) for layer in attention_layers(trunk)
    ]
    try:
        trunk(input_ids=ids, attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    return found
