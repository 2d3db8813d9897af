"""LLaRA's joint pass: one forward pass over a text with two prompts that ignore each other.

Sequence: `text SELF-prompt NEXT-prompt`, each prompt ending in its slots (arXiv 2312.15503, section
3). A prompt does not attend to other prompts, and its positions continue those of the text:

    position   0 1 2 3 4 | 5 6 7 | 5 6 7          rows attend to columns
                 text    | SELF  | NEXT           text  x . .
                                                  SELF  x x .
                                                  NEXT  x . x
The output layer predicts from a slot's state the tokens of the text (EBAE) or of the next text
(EBAR).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from caravan.data.batch import Chunk, Packed
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import cpu, varlen
from caravan.models.bidirectional import check_decoder, has_adapter, unwrapped
from caravan.models.biencoder import BiEncoder
from caravan.models.output_layer import (
    MOST_LOGITS,
    check_output_layer,
    checkpointed,
    log_probabilities,
    output_layer,
    vocabulary,
)

MASKED = ("sdpa", "eager", cpu.NAME, varlen.NAME)
"""Attention implementations that accept any mask."""


@dataclass(frozen=True)
class Layout:
    """Numbers of tokens of the prompts and slots.

    Attributes:
        skipped: tokens at the start that are the same in every text.
        prompts: tokens of each prompt including its slots, in the order of the sequence.
        slots: slots at the end of each prompt.
    """

    skipped: int
    prompts: tuple[int, ...]
    slots: int


class Read(NamedTuple):
    """The result of one pass over N texts with T prompts of K slots."""

    slots: Tensor  # [N, T, K, d], states of the slots
    states: Tensor  # [M, d], states that predict `tokens`
    tokens: Tensor  # [M] int64, tokens of the texts without prompts; empty unless requested


def joint(attention_mask: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Positions [n, L] and mask [n, L, L] (True: the row attends to the column).

    Args:
        attention_mask: [n, L] of right-padded texts, 1 for a real token.
    """
    lengths = attention_mask.sum(dim=1, keepdim=True)  # [n, 1]
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # [L]
    prompt = torch.zeros_like(attention_mask)  # 0 in the text, then the number of the prompt
    positions = places.expand_as(attention_mask)
    text_end = lengths - sum(layout.prompts)
    for i in range(len(layout.prompts)):
        start = lengths - sum(layout.prompts[i:])
        inside = places >= start
        prompt = prompt + inside
        positions = torch.where(inside, text_end + places - start, positions)
    past = places.unsqueeze(1) >= places  # [L, L]
    alone = (prompt.unsqueeze(1) == 0) | (prompt.unsqueeze(1) == prompt.unsqueeze(2))
    return positions, past & alone


class SlotEncoder(BiEncoder):
    """A bi-encoder with a language model that also encodes a text with both prompts in one pass.

    Args:
        language_model: a decoder of transformers with its output layer.
        transformer: its trunk, with or without an adapter.
        layout: numbers of tokens of the prompts and slots.

    Raises:
        InputError: If the model cannot encode both prompts in one pass.
    """

    def __init__(
        self, language_model: Any, transformer: nn.Module, encoding: Encoding, layout: Layout
    ) -> None:
        super().__init__(transformer, encoding)
        self.layout = layout
        kernel = language_model.config._attn_implementation
        if kernel not in MASKED:
            raise InputError(
                "attention-not-supported",
                f"backbone.attention={kernel} supports no custom mask, which the joint pass of two"
                " prompts needs; set backbone.attention=sdpa",
            )
        check_decoder(transformer, "LLaRA adaptation")
        check_output_layer(language_model, "LLaRA adaptation")
        self.head = language_model.get_output_embeddings()
        self._language_model = [language_model]  # a list, so that it is not a submodule

    @property
    def language_model(self) -> Any:
        return self._language_model[0]

    @property
    def transformer(self) -> nn.Module:
        """The module to save in a model folder: the adapter, or the whole language model."""
        return self.backbone if has_adapter(self.backbone) else self.language_model

    def read(self, texts: Packed, tokens: bool = False) -> Read:
        """Encode packed texts that end with the prompts.

        Args:
            tokens: also return the tokens of the texts and the states before them, unordered.
        """
        own = len(texts.chunks) - texts.extra
        parts = [self._chunk(chunk, tokens and i < own) for i, chunk in enumerate(texts.chunks)]
        slots, states, ids = (torch.cat(rows) for rows in zip(*parts, strict=True))
        return Read(texts.restore(slots), states, ids)

    def _chunk(self, chunk: Chunk, tokens: bool) -> Read:
        positions, mask = joint(chunk.attention_mask, self.layout)
        states = self._states(chunk.input_ids, positions, mask)
        lengths = chunk.attention_mask.sum(dim=1)
        after = [sum(self.layout.prompts[i + 1 :]) for i in range(len(self.layout.prompts))]
        ends = lengths.unsqueeze(1) - lengths.new_tensor(after)  # [n, T]
        back = torch.arange(self.layout.slots, 0, -1, device=states.device)
        places = ends.unsqueeze(2) - back  # [n, T, K]
        rows = torch.arange(len(states), device=states.device).view(-1, 1, 1)
        slots = states[rows, places]
        if not tokens:
            empty = chunk.input_ids.new_zeros(0)
            return Read(slots, states.new_zeros(0, states.shape[-1]), empty)
        at = torch.arange(1, states.shape[1], device=states.device)
        text = (at >= self.layout.skipped) & (at < (lengths - sum(self.layout.prompts))[:, None])
        return Read(slots, states[:, :-1][text], chunk.input_ids[:, 1:][text])

    def _states(self, input_ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """States [n, L, d] of the last layer under a mask [n, L, L] bool."""
        config = unwrapped(self.backbone).config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        masks: Any = self._kernel_mask(mask)
        if window is not None and kinds != {"full_attention"}:
            near = positions.unsqueeze(2) - positions.unsqueeze(1) < window
            windowed = self._kernel_mask(mask & near)
            masks = (
                {"full_attention": masks, "sliding_attention": windowed}
                if "full_attention" in kinds
                else windowed
            )
        states: Tensor = self.backbone(
            input_ids=input_ids, attention_mask=masks, position_ids=positions
        ).last_hidden_state
        return states

    def _kernel_mask(self, mask: Tensor) -> Tensor:
        """A mask [n, 1, L, L] for all heads: bool, or additive for eager attention."""
        mask = mask.unsqueeze(1)
        trunk = unwrapped(self.backbone)
        if trunk.config._attn_implementation != "eager":
            return mask
        lowest = torch.finfo(trunk.dtype).min
        zeros = torch.zeros(mask.shape, dtype=trunk.dtype, device=mask.device)
        return zeros.masked_fill(~mask, lowest)


def set_losses(
    model: Any, slots: Tensor, tokens: Tensor, counts: Tensor, hits: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss of predicting a set of tokens from the slots of each text (arXiv 2312.15503, 3.2).

    The logits of a text are the maximum over its slots. The loss is the negative mean log
    probability of the tokens in the set; its minimum is the log of their number.

    Args:
        model: the language model.
        slots: [R, K, d].
        tokens: [M] int64, the sets end to end, each token once.
        counts: [R] int64, number of tokens in each set; the loss of an empty set is 0.
        hits: also compute the share of the set's tokens among the `counts` most likely tokens.

    Returns:
        losses [R] float32, in nats; hits [R] float32 in 0..1, 0 unless requested.
    """
    logits = output_layer(model)

    def part(some: Tensor, ids: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        found = logits(some).max(dim=1).values  # [p, V]
        rows = torch.repeat_interleave(torch.arange(len(some), device=some.device), sizes)
        of_set = found[rows, ids]
        total = found.logsumexp(dim=1)
        least = sizes.clamp(min=1)
        mean = found.new_zeros(len(some)).index_add(0, rows, of_set) / least
        share = found.new_zeros(len(some))
        if hits and len(ids):
            with torch.no_grad():
                best = found.topk(int(least.max()), dim=1).values
                worst = best.gather(1, least.unsqueeze(1) - 1)[:, 0]
                among = (of_set >= worst[rows]).to(found.dtype)
                share = share.index_add(0, rows, among) / least
        return torch.where(sizes > 0, total - mean, 0.0), share

    size = max(MOST_LOGITS // (vocabulary(model) * slots.shape[1]), 1)
    sizes = counts.split(size)
    sets = tokens.split([int(some.sum()) for some in sizes])
    several = zip(slots.split(size), sets, sizes, strict=True)
    parts = [checkpointed(part, *some) if len(slots) > size else part(*some) for some in several]
    losses, shares = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return losses, shares


def token_losses(model: Any, read: Read) -> Tensor:
    """The causal language modelling loss [M] of the tokens of the texts, in nats."""
    return -log_probabilities(model, read.states, read.tokens)
