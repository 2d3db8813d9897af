"""How many tokens a transformer has positions for.

Encoders and older decoders (BERT, RoBERTa, MPNet, GPT-2, OPT) learn an embedding for each position
and fail with an IndexError at the first longer text. Rotary positions have no such limit: beyond
`max_position_embeddings` the model was merely not trained.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from caravan.data.tokenization import log_once
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models.bidirectional import unwrapped

_NAMES = re.compile(r"(?:.*\.)?(wpe|(?!rel)(\w+_)?pos(ition|itions)?(_\w+)?)")
"""Tables of positions: `position_embeddings`, `embed_positions`, `positions_embed`, `wpe`, ..."""


def refuse_too_long(model: Any, encoding: Encoding, section: str = "encoding.") -> None:
    """Compare the encoding's lengths with the model's positions.

    Args:
        model: a transformer with or without head and adapter; it may be on the meta device.
        section: the config's section with the lengths and a dot, for messages.

    Raises:
        InputError: If a text could be longer than the positions that the model has learned.
    """
    query, passage = encoding.query_length, encoding.passage_length
    lengths = {"query_length": query, "passage_length": passage}
    if encoding.kind == "reranker":  # reads both as one text
        lengths = {f"query_length + {section}passage_length": query + passage}
    trunk = unwrapped(model).base_model
    name, limit = type(trunk).__name__, positions(trunk)
    trained = getattr(trunk.config.get_text_config(), "max_position_embeddings", None)
    for setting, length in lengths.items():
        if limit is not None and length > limit:
            raise InputError(
                "too-long",
                f"{section}{setting} is {length}, and {name} has positions for {limit} tokens;"
                f" set {section}{setting} to {limit} or less",
            )
        if isinstance(trained, int) and 0 < trained < length:
            log_once(
                f"{section}{setting} is {length}, and {name} was trained on texts of at most"
                f" {trained} tokens (max_position_embeddings)"
            )


def positions(trunk: nn.Module) -> int | None:
    """The tokens that a transformer without a head has positions for; None if it has no limit."""
    config = trunk.config.get_text_config()  # type: ignore[operator, union-attr]
    known = getattr(config, "max_position_embeddings", None)
    limits = []
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Embedding) and _NAMES.fullmatch(name):
            # RoBERTa and its kin count from padding_idx + 1, OPT from its `offset`.
            first = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                first = module.padding_idx + 1
            limits.append(module.num_embeddings - first)
            if not first and isinstance(known, int) and 0 < known < module.num_embeddings:
                limits.append(known)
    return min(limits, default=None)
