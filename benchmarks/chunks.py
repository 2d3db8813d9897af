"""Chunks of one rank's share of a RepLLaMA batch: 128 queries with 16 passages, on 1 to 32 GPUs.

    python benchmarks/chunks.py

Each chunk is a pass through the model, whose operations Python issues one by one: a share with many
small chunks keeps a GPU waiting. Lengths are log-normal around 10 and 75 tokens, as MS MARCO's
are. Padded chunks ended where their padding would pass a tenth (`before`); now those of less than
4,096 tokens do not. Without padding, chunks were the same as with; now only the budget ends them,
and queries and passages share them.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
from common import arguments, report
from shapes import share

from caravan.data import batch
from caravan.models.hardware import GPU_CHUNK

RULES = {"padded, before": (True, 0), "padded, now": (True, batch.SMALL)}
RULES |= {"unpadded, before": (True, batch.SMALL), "unpadded, now": (False, batch.SMALL)}


def counted(ranks: int, rule: str, batches: int) -> dict[str, int | float | str]:
    """A row of the table: the means over some batches."""
    pads, small = RULES[rule]
    with mock.patch.object(batch, "SMALL", small):
        texts = [share(1000, 128 // ranks, 16, pads, seed)[0].texts for seed in range(batches)]
    computed = [one.padded / one.tokens if rule.startswith("padded") else 1.0 for one in texts]
    return {
        "GPUs": ranks,
        "attention": rule,
        "chunks": float(np.mean([len(one.chunks) for one in texts])),
        "most": max(len(one.chunks) for one in texts),
        "tokens of a rank": round(float(np.mean([one.tokens for one in texts]))),
        "computed / real tokens": float(np.mean(computed)),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()
    rows = [counted(ranks, rule, options.batches) for ranks in (1, 8, 32) for rule in RULES]
    note = f"Counted on token lengths alone, budget {GPU_CHUNK:,}; no model runs."
    report("Chunks of one rank's share of a RepLLaMA batch", rows, [note], options.save)


if __name__ == "__main__":
    main()
