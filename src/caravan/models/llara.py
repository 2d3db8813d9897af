"""LLaRA's slots: one pass in which a text is read once and both prompts see what they would alone.

Sequence: `text SELF-prompt NEXT-prompt`, each prompt ending in its slots (arXiv 2312.15503, section
3). A prompt must not see the one before it, and its positions go on from the text's end:

    position   0 1 2 3 4 | 5 6 7 | 5 6 7          rows see columns
                 text    | SELF  | NEXT           text  x . .
                                                  SELF  x x .
                                                  NEXT  x . x
The states of a slot, put through the output layer, are to tell which tokens the text has (EBAE) or
which ones follow it (EBAR). Lengths come from the tokenizer, so any will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from caravan.data.batch import Chunk, Packed
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import cpu as cpu_attention
from caravan.models import varlen
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import LAYERS, computes_in_half
from caravan.models.output_layer import (
    PIECE,
    again,
    log_probabilities,
    output_layer,
    refuse_other_output,
    vocabulary,
)
from caravan.models.pooling import plain

MASKED_BY = ("sdpa", "eager", cpu_attention.NAME, varlen.NAME)
"""The attention kernels that take any mask."""
CLOSE, CLOSE_HALF = 1e-3, 3e-2  # of states whose size is about 1; of layers in half precision


@dataclass(frozen=True)
class Layout:
    """Where prompts and slots stand, counted from a text's end.

    Attributes:
        skipped: tokens at the beginning that are the same in every text.
        prompts: tokens of each prompt, slots included, in the order of the sequence.
        slots: at the end of each prompt.
    """

    skipped: int
    prompts: tuple[int, ...]
    slots: int


class Read(NamedTuple):
    """What one pass gives for N texts with T prompts of K slots."""

    slots: Tensor  # [N, T, K, d], the slots' states
    states: Tensor  # [M, d], of the tokens before the tokens below
    tokens: Tensor  # [M] int64, the texts' own; empty unless asked for


def joint(attention_mask: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Positions [n, L] and mask [n, L, L] (True: the row sees the column) of right-padded texts.

    Args:
        attention_mask: [n, L], 1 for a real token.
    """
    lengths = attention_mask.sum(dim=1, keepdim=True)  # [n, 1]
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # [L]
    block = torch.zeros_like(attention_mask)  # 0 in the text, then the number of the prompt
    positions = places.expand_as(attention_mask)
    text_end = lengths - sum(layout.prompts)
    for i in range(len(layout.prompts)):
        begin = lengths - sum(layout.prompts[i:])
        inside = places >= begin
        block = block + inside
        positions = torch.where(inside, text_end + places - begin, positions)
    past = places.unsqueeze(1) >= places  # [L, L]
    alone = (block.unsqueeze(1) == 0) | (block.unsqueeze(1) == block.unsqueeze(2))
    return positions, past & alone


class SlotEncoder(BiEncoder):
    """A language model that reads a text with both prompts, and embeds texts as a bi-encoder does.

    Args:
        language_model: a decoder of transformers with its output layer.
        transformer: its trunk, with adapters or without.
        layout: of the prompts.

    Raises:
        InputError: the model cannot read both prompts in one pass.
    """

    def __init__(
        self, language_model: Any, transformer: nn.Module, encoding: Encoding, layout: Layout
    ) -> None:
        super().__init__(transformer, encoding)
        self.layout = layout
        name = type(language_model).__name__
        head = language_model.get_output_embeddings()
        if head is None:
            raise InputError(f"{name} has no output layer; adaptation needs a language model")
        self.head = head
        self._language_model = [language_model]  # in a list: its weights are those above
        self._refuse_what_heeds_no_mask()
        refuse_other_output(language_model)

    @property
    def language_model(self) -> Any:
        return self._language_model[0]

    @property
    def transformer(self) -> nn.Module:
        """What a model folder saves: the adapter, or the whole language model."""
        adapted = hasattr(self.backbone, "peft_config")
        return self.backbone if adapted else self.language_model

    def read(self, texts: Packed, tokens: bool = False) -> Read:
        """Run packed texts, which end with the prompts, once.

        Args:
            tokens: give the states that tell the text's own tokens too, in no particular order.
        """
        own = len(texts.chunks) - texts.extra
        parts = [self._chunk(chunk, tokens and i < own) for i, chunk in enumerate(texts.chunks)]
        slots, states, told = (torch.cat(rows) for rows in zip(*parts, strict=True))
        return Read(texts.restore(slots), states, told)

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
        """The last layer's states [n, L, d] under a mask [n, L, L] bool."""
        trunk = plain(self.backbone)
        config = trunk.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        masks: Any = self._as_the_kernel_takes_it(mask)
        if window is not None and kinds != {"full_attention"}:
            near = positions.unsqueeze(2) - positions.unsqueeze(1) < window
            windowed = self._as_the_kernel_takes_it(mask & near)
            masks = windowed
            if "full_attention" in kinds:
                masks = dict(
                    zip(LAYERS, (self._as_the_kernel_takes_it(mask), windowed), strict=True)
                )
        states: Tensor = self.backbone(
            input_ids=input_ids, attention_mask=masks, position_ids=positions
        ).last_hidden_state
        return states

    def _as_the_kernel_takes_it(self, mask: Tensor) -> Tensor:
        mask = mask.unsqueeze(1)  # [n, 1, L, L], for all heads
        trunk = plain(self.backbone)
        if trunk.config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=trunk.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(trunk.dtype).min
        )

    @torch.no_grad()
    def _refuse_what_heeds_no_mask(self) -> None:
        """Both prompts in one pass must give what each gives alone: tried, on a few tokens.

        Kernels and architectures that leave a mask or positions out of account do so in silence.
        """
        trunk = plain(self.backbone)
        config, name = trunk.config, type(trunk).__name__
        kernel = config._attn_implementation
        if kernel not in MASKED_BY:
            raise InputError(
                f"backbone.attention={kernel} takes no mask, without which one pass cannot serve"
                " both prompts; set backbone.attention=sdpa"
            )
        kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - set(LAYERS)
        if hasattr(config, "attention_types"):  # GPT-Neo's windows count tokens, not positions
            kinds.add("local windows")
        if kinds:
            raise InputError(
                f"{name} has layers ({', '.join(sorted(kinds))}) that cannot keep two prompts apart"
                " in one pass; adapt another model"
            )
        tries = Layout(1, (3, 3), 1)
        device = next(trunk.parameters()).device
        ids = torch.arange(5, 16, device=device) % config.get_text_config().vocab_size
        ids = ids.unsqueeze(0)  # a text of 5 tokens and two prompts of 3
        training = self.backbone.training
        self.backbone.eval()
        alone = self.backbone(input_ids=torch.cat((ids[:, :5], ids[:, 8:]), dim=1))
        positions, mask = joint(torch.ones_like(ids), tries)
        try:
            both = self._states(ids, positions, mask)[:, -3:]
        except (TypeError, ValueError, RuntimeError) as error:  # each by some architecture
            told = str(error).strip().splitlines()[0]
            raise InputError(
                f"{name} does not take a mask and positions of one's own ({told}); adapt another"
                " model"
            ) from None
        finally:
            self.backbone.train(training)
        expected = alone.last_hidden_state[:, -3:]
        apart = (both - expected).abs().max() / expected.abs().max()
        if not apart < (CLOSE_HALF if computes_in_half(trunk) else CLOSE):
            raise InputError(
                f"{name} does not look to the left alone under a mask and positions of one's own"
                f" (states differ by {float(apart):.2g}), so one pass cannot serve both prompts;"
                " adapt another decoder"
            )


def set_losses(
    model: Any, slots: Tensor, tokens: Tensor, counts: Tensor, hits: bool = False
) -> tuple[Tensor, Tensor]:
    """What it costs each text's slots to tell a set of tokens (arXiv 2312.15503, section 3.2).

    A slot's state gives logits over the vocabulary, of several slots the largest counts; the loss
    is minus the mean log probability of the set's tokens, never below the log of their number.

    Args:
        model: the language model.
        slots: [R, K, d].
        tokens: [M] int64, the sets end to end, each token once.
        counts: [R] int64, tokens of each set; the loss of an empty one is 0.
        hits: count too how many of the tokens are among the likeliest `counts`.

    Returns:
        losses [R] float32, in nats; hits [R] float32, as shares, 0 where not asked for.
    """
    logits = output_layer(model)

    def piece(some: Tensor, ids: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
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

    size = max(PIECE // (vocabulary(model) * slots.shape[1]), 1)
    sizes = counts.split(size)
    sets = tokens.split([int(part.sum()) for part in sizes])
    parts = [again(piece, *some) for some in zip(slots.split(size), sets, sizes, strict=True)]
    losses, shares = (torch.cat(rows) for rows in zip(*parts, strict=True))
    return losses, shares


def token_losses(model: Any, read: Read) -> Tensor:
    """Minus the log probability [M] of the texts' own tokens: the causal language model's loss."""
    return -log_probabilities(model, read.states, read.tokens)
