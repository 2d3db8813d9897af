"""Peak memory of a contrastive step by batch size, with and without gradient caching.

    python benchmarks/gradcache.py [--chunk 16]

The quickstart's kind of Llama (width 256, two layers) from random weights, queries of 16 tokens,
two passages of 48 tokens for each, in float32.
"""

from __future__ import annotations

import time

import torch
from common import apart, arguments, highest, report
from torch import Tensor

from caravan.data.batch import Packed, pack
from caravan.encoding import Encoding
from caravan.models.biencoder import BiEncoder
from caravan.training.gradcache import GradCache

VOCABULARY, TEMPERATURE = 8192, 0.01


def texts(number: int, tokens: int) -> Packed:
    rng = torch.Generator().manual_seed(0)
    return pack(torch.randint(3, VOCABULARY, (number, tokens), generator=rng).tolist(), 2048)


def loss(rows: Tensor) -> Tensor:
    """Of n queries, then 2n passages."""
    queries, passages = rows.tensor_split([len(rows) // 3])
    scores = queries @ passages.T / TEMPERATURE
    return torch.nn.functional.cross_entropy(scores, 2 * torch.arange(len(queries)))


def measured(queries: int, chunk: int | None) -> tuple[float, float, float]:
    """Seconds a step, the peak of the process in MB, and the norm of the gradient."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, intermediate_size=688, use_cache=False, **shape)
    model = BiEncoder(LlamaModel(config), Encoding())
    batch = Packed.joined([texts(queries, 16), texts(2 * queries, 48)])
    started = time.perf_counter()
    if chunk is None:
        value = loss(model.embed(batch))
    else:
        value = GradCache(chunk)(model.of, batch.split(chunk), loss)
    value.backward()
    seconds = time.perf_counter() - started
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return seconds, highest(), float(torch.nn.utils.get_total_norm(gradients))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--chunk", type=int, default=16, help="texts a chunk")
    parser.add_argument("--queries", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--whole", type=int, default=256, help="the largest batch without caching")
    options = parser.parse_args()
    rows = []
    for queries in options.queries:
        seconds, peak, norm = apart(measured, queries, options.chunk)
        row = {"queries": queries, "peak MB": round(peak), "over the first": 0.0}
        row |= {"peak MB uncached": "", "times as long": "", "gradients apart": ""}
        if queries <= options.whole:
            their_seconds, their_peak, their_norm = apart(measured, queries, None)
            row["peak MB uncached"] = round(their_peak)
            row["times as long"] = seconds / their_seconds
            row["gradients apart"] = f"{abs(norm / their_norm - 1):.1e}"
        rows.append(row)
        row["over the first"] = peak / rows[0]["peak MB"]
    report(
        f"Gradient caching, {options.chunk} texts a chunk",
        rows,
        [
            "Peaks are those of a process that does this and nothing else, libraries and model"
            " counted in. `gradients apart` compares their norms, as a share.",
        ],
        options.save,
    )


if __name__ == "__main__":
    main()
