"""Chunks of one rank's share of a RepLLaMA batch: 128 queries with 16 passages, on 1 to 32 GPUs.

    python benchmarks/chunks.py

Each chunk is a pass through the model, whose operations Python issues one by one: a share with many
small chunks keeps a GPU waiting. Lengths are log-normal around 10 and 75 tokens, as MS MARCO's
are. `before` ends every chunk whose padding would pass a tenth; `now` only those of 4,096 tokens.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
from common import arguments, report
from shapes import msmarco, tokens_of

from caravan.data import batch
from caravan.models.hardware import GPU_CHUNK


def share(rng: np.random.Generator, texts: int, mean: int, longest: int) -> tuple[int, float]:
    """Chunks of some texts, and the padded tokens for each token."""
    found = tokens_of(msmarco(rng, texts, mean, longest), 1000).packed(GPU_CHUNK)
    return len(found.chunks), found.padded / found.tokens


def counted(ranks: int, rule: str, batches: int) -> dict[str, int | float | str]:
    """A row of the table: the means over some batches."""
    rng = np.random.default_rng(0)
    queries = 128 // ranks
    found = [
        (*share(rng, queries, 10, 32), *share(rng, queries * 16, 75, 196)) for _ in range(batches)
    ]
    names = ("query chunks", "padded / real", "passage chunks", "padded / real ")
    means = map(float, np.mean(found, axis=0))
    return {"GPUs": ranks, "rule": rule, **dict(zip(names, means, strict=True))}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()
    rows = []
    for ranks in (1, 8, 32):
        with mock.patch.object(batch, "SMALL", 0):
            rows.append(counted(ranks, "before", options.batches))
        rows.append(counted(ranks, "now", options.batches))
    note = f"Counted on token lengths alone, budget {GPU_CHUNK:,}; no model runs."
    report("Chunks of one rank's share of a RepLLaMA batch", rows, [note], options.save)


if __name__ == "__main__":
    main()
