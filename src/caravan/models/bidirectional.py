"""Attention direction: which models are causal, and decoders made bidirectional.

A decoder was pretrained with causal attention, and retrieves better once it is trained with
bidirectional attention (arXiv 2404.05961). transformers' `config.is_causal=False` switches masks
and kernels, is saved in config.json and respected by plain transformers. Some architectures respect
it in part without an error, so only `DECODERS` are accepted.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from caravan.encoding import Encoding
from caravan.errors import InputError

DECODERS = {
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite",
    "granitemoe", "llama", "ministral", "ministral3", "mistral", "mixtral", "olmo", "olmo2",
    "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
    "smollm3", "starcoder2",
}  # fmt: skip
"""Model types (`config.model_type`) for which tests show that every layer respects
`config.is_causal`, custom masks and position ids."""


def has_adapter(model: nn.Module) -> bool:
    """Whether this is a PEFT model; by PEFT's mark, since importing PEFT takes seconds."""
    return hasattr(model, "peft_config")


def unwrapped(model: Any) -> Any:
    """The model inside its adapter; itself if it is not wrapped (it may have PEFT's mark)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
    layers = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    return bool(layers) and all(getattr(m, "is_causal", False) is True for m in layers)


def is_bidirectional(model: Any) -> bool:
    """Whether the model's config turns causal attention off."""
    config = getattr(unwrapped(model), "config", None)
    return config is not None and getattr(config.get_text_config(), "is_causal", None) is False


def is_causal(model: nn.Module) -> bool:
    """Whether no token attends to tokens, or padding, on its right."""
    return is_decoder(model) and not is_bidirectional(model)


def check_decoder(model: Any, feature: str) -> None:
    """Check that a model, with or without a head, is one of `DECODERS`.

    Args:
        feature: the setting or stage that needs it, for the message.

    Raises:
        InputError: If it is not.
    """
    trunk = unwrapped(model)
    kind = trunk.config.get_text_config().model_type
    if kind not in DECODERS:
        raise InputError(
            "model-not-supported",
            f"{feature} is not supported by {type(trunk).__name__} ({kind}), only by decoders that"
            f" it was tested with: {', '.join(sorted(DECODERS))}",
        )


def make_bidirectional(model: Any) -> Any:
    """Switch a decoder to bidirectional attention, in place.

    Raises:
        InputError: If the model is not one of `DECODERS`.
    """
    check_decoder(model, "backbone.bidirectional=true")
    config = unwrapped(model).config
    for each in (config, config.get_text_config()):
        each.is_causal = False
        each.use_cache = False  # cached states of past tokens would miss the future ones
    return model


def check_direction(encoding: Encoding, model: Any) -> None:
    """Check that the encoding and the model agree on the attention direction.

    Args:
        model: with or without a head or an adapter.

    Raises:
        InputError: If they differ.
    """
    bidirectional = is_decoder(model) and is_bidirectional(model)
    if bidirectional != encoding.bidirectional:
        ways = ("bidirectional", "causal") if bidirectional else ("causal", "bidirectional")
        raise InputError(
            "direction-mismatch",
            f"{type(unwrapped(model)).__name__} is {ways[0]}, but its encoding says {ways[1]}; set"
            " backbone.bidirectional=true",
        )
