"""LLaRA's step: one pass compared with two, and logits of slots compared with those of all tokens.

    python benchmarks/adaptation.py [--words 512] [--texts 8]

A Llama of four layers from random weights, in float32. The naive step is the released code's shape:
logits of the whole sequence, a loop over the texts, each set read by indexing its row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import apart, arguments, highest, paired, report, table
from torch import Tensor

from caravan.data.batch import Packed, pack
from caravan.encoding import Encoding
from caravan.models.llara import Layout, SlotEncoder, set_losses

PROMPT, SLOTS = 12, 8
LAYOUT = Layout(1, (PROMPT, PROMPT), SLOTS)


def language_model(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=688,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def texts(number: int, words: int, vocabulary: int) -> tuple[Packed, Tensor, Tensor]:
    """Random texts of so many tokens with both prompts, and sets of 150 tokens for each task."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (number, words + 2 * PROMPT), generator=rng).tolist()
    sets = [torch.randperm(vocabulary, generator=rng)[:150] for _ in range(2 * number)]
    return pack(ids, 10**9), torch.cat(sets), torch.full((2 * number,), 150)


def one_pass(encoder: SlotEncoder, packed: Packed) -> None:
    encoder.read(packed).slots.sum().backward()


def two_passes(encoder: SlotEncoder, packed: Packed) -> None:
    ids = packed.chunks[0].input_ids
    for prompt in (ids[:, :-PROMPT], torch.cat((ids[:, : -2 * PROMPT], ids[:, -PROMPT:]), dim=1)):
        states = encoder.backbone(input_ids=prompt).last_hidden_state
        states[:, -SLOTS:].sum().backward()


def ours(encoder: SlotEncoder, packed: Packed, targets: Tensor, counts: Tensor) -> Tensor:
    slots = encoder.read(packed).slots.flatten(0, 1)
    return set_losses(encoder.language_model, slots, targets, counts)[0].mean()


def naive(encoder: SlotEncoder, packed: Packed, targets: Tensor, counts: Tensor) -> Tensor:
    """Logits of the whole sequence, and a loop over texts."""
    from caravan.models.llara import joint

    chunk = packed.chunks[0]
    positions, mask = joint(chunk.attention_mask, LAYOUT)
    logits = encoder.language_model(
        input_ids=chunk.input_ids, attention_mask=mask.unsqueeze(1), position_ids=positions
    ).logits.float()
    sets = targets.split(counts.tolist())
    losses = []
    for at, text in enumerate(packed.order.tolist()):
        for task, end in enumerate((logits.shape[1] - PROMPT, logits.shape[1])):
            scores = logits[at, end - SLOTS : end].max(dim=0).values.log_softmax(dim=0)
            losses.append(-scores[sets[2 * text + task]].mean())
    return torch.stack(losses).mean()


def measured(kind: str, number: int, words: int, vocabulary: int) -> tuple[float, float, float]:
    """Seconds a step, peak memory above that before, in MB, and the loss."""
    step: Callable[..., Tensor] = {"ours": ours, "naive": naive}[kind]
    model = language_model(vocabulary)
    encoder = SlotEncoder(model, model.base_model, Encoding(), LAYOUT)
    batch = texts(number, words, vocabulary)
    warm = texts(1, 16, vocabulary)
    step(encoder, *warm).backward()
    before = highest()
    seconds = []
    for _ in range(3):
        model.zero_grad()
        started = time.perf_counter()
        loss = step(encoder, *batch)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    peak = highest() - before
    return statistics.median(seconds), peak, float(loss.detach())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--words", type=int, default=512, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=8, help="texts a batch")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--repeats", type=int, default=5, help="pairs of timings")
    options = parser.parse_args()
    model = language_model(1000)
    encoder = SlotEncoder(model, model.base_model, Encoding(), LAYOUT)
    packed = texts(options.texts, options.words, 1000)[0]
    passes = paired(
        lambda: one_pass(encoder, packed), lambda: two_passes(encoder, packed), options.repeats
    )
    heads = []
    for vocabulary in options.vocabularies:
        size = options.texts, options.words, vocabulary
        (seconds, peak, loss), (their_seconds, their_peak, their_loss) = (
            apart(measured, kind, *size) for kind in ("ours", "naive")
        )
        heads.append(
            {
                "vocabulary": f"{vocabulary:,}",
                "seconds": seconds,
                "naive seconds": their_seconds,
                "times faster": their_seconds / seconds,
                "peak MB": round(peak),
                "naive peak MB": round(their_peak),
                "apart": f"{abs(loss - their_loss):.1e}",
            }
        )
    report(
        f"LLaRA's step, {options.texts} texts of {options.words} tokens, prompts of {PROMPT} each",
        [passes],
        [
            "`ours` is one pass forward and back, `theirs` two passes; `ratio` is two over one, the"
            " median of pairs taken in turn.",
            "",
            *table(heads),
            "",
            "Peak memory is what a step adds to the process; `apart` is that of the losses.",
        ],
        options.save,
    )


if __name__ == "__main__":
    main()
