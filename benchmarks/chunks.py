"""Chunks of one rank's share of a RepLLaMA batch: 128 queries with 16 passages, on 1 to 32 GPUs.

    python benchmarks/chunks.py

Each chunk is a pass through the model, whose operators Python issues one by one: a share with many
small chunks keeps a GPU waiting. Lengths are log-normal around 10 and 75 tokens, as MS MARCO's
are. `before`, chunks of queries and of passages ended where their padding would pass a tenth, also
for a model that computes no padding. Now queries and passages share chunks; those with padding take
texts until they have 4,096 tokens, and without padding only the budget ends them.

How many operators a chunk has, and how long Python takes to issue them, does not depend on the size
of the tensors. Both are measured on a Llama with the layers of the 7B (LoRA, recomputation, bf16)
that is so narrow that its products take no time, and multiplied by the number of chunks.
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import arguments, report
from shapes import SHAPES, Models, operations, share
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from caravan.data import batch
from caravan.models import varlen
from caravan.models.hardware import GPU_CHUNK

RULES = ("padded, before", "padded, now", "unpadded, before", "unpadded, now")
PASSES = 3  # forward, recomputation, backward; frozen weights have no gradient
RATE = 400e12  # operations a second, 40% of an H100's peak in bf16


class Counter(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches, views included."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any, given: Any = None) -> Any:
        self.number += 1
        return function(*args, **(given or {}))


def issued(layers: int, repeats: int) -> tuple[dict[str, int], float]:
    """The operators of a training step's chunk, padded ("sdpa") or not, and the seconds of one.

    The machine may be busy, so the seconds are those of the fastest chunk.
    """
    narrow = {"num_hidden_layers": layers, "num_key_value_heads": 2}
    counts, rates = {}, []
    with (
        mock.patch.dict(SHAPES, narrow=SHAPES["tiny"] | narrow),
        mock.patch.object(varlen, "has_kernel", return_value=True),
        mock.patch.object(varlen, "kernel", return_value=_one_kernel),
    ):
        for kind in ("sdpa", varlen.NAME):
            network = Models(torch.device("cpu")).trainee("narrow", kind)
            _step(network)
            with Counter() as counter:
                _step(network)
            counts[kind] = counter.number
            rates += [_step(network) / counter.number for _ in range(repeats)]
    return counts, min(rates)


def _step(network: Any) -> float:
    """Train on a chunk; returns the processor time, to which other processes do not add."""
    chunk = batch.pack([range(3, 7), range(3, 6)], 64).chunks[0]
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        rows = network.of(chunk)
    rows.sum().backward()
    return time.process_time() - began


def _one_kernel(query: Any, key: Any, value: Any, *bounds: Any, **settings: Any) -> Any:
    """In place of the variable-length kernel, which needs a GPU."""
    return scaled_dot_product_attention(query[None], key[None], value[None])[0]


def before(share: batch.Unpacked[batch.TrainBatch]) -> batch.Packed:
    """The texts in chunks as they were."""
    parts: Any = share.fields["texts"]
    with mock.patch.object(batch, "SMALL", 0):
        return batch.Packed.joined([part.packed(GPU_CHUNK) for part in parts])


def counted(
    ranks: int, rule: str, batches: int, operators: dict[str, int], seconds: float
) -> dict[str, int | float | str]:
    """A row of the table: the means over some batches.

    Args:
        operators: of a chunk, by the kind of attention. seconds: of an operator.
    """
    padded = rule.startswith("padded")
    shares = [share(1000, 128 // ranks, 16, padded, seed) for seed in range(batches)]
    texts = [before(one) if "before" in rule else one.packed().texts for one, _ in shares]
    computed = np.mean([one.padded / one.tokens if padded else 1.0 for one in texts])
    chunks = np.mean([len(one.chunks) for one in texts])
    issues = float(chunks * operators["sdpa" if padded else varlen.NAME])
    work = PASSES * np.mean([operations("7b", lengths) for _, lengths in shares])
    return {
        "GPUs": ranks,
        "attention": rule,
        "chunks": float(chunks),
        "most": max(len(one.chunks) for one in texts),
        "tokens of a rank": round(float(np.mean([one.tokens for one in texts]))),
        "computed / real tokens": float(computed),
        "operators": round(issues),
        "s to issue them": issues * seconds,
        "s on the GPU": float(computed * work / RATE),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--layers", type=int, default=SHAPES["7b"]["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    costs = issued(options.layers, options.repeats)
    rows = [counted(ranks, rule, options.batches, *costs) for ranks in (1, 8, 32) for rule in RULES]
    each = " and ".join(f"{number:,}" for number in costs[0].values())
    notes = [
        f"Chunks are counted on token lengths alone, budget {GPU_CHUNK:,}. A padded and an unpadded"
        f" chunk have {each} operators in the forward pass, recomputation and backward pass of"
        f" {options.layers} layers with LoRA. Python and PyTorch need {1e6 * costs[1]:.1f} µs for"
        f" each: processor time of a narrow model on the CPU, fastest of {2 * options.repeats}."
        f" The seconds on the GPU are computed, not measured: {PASSES} passes of the 7B over the"
        f" computed tokens at {RATE / 1e12:.0f} TFLOP/s. No GPU was used."
    ]
    report("Chunks of one rank's share of a RepLLaMA batch", rows, notes, options.save)


if __name__ == "__main__":
    main()
