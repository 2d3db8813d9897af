"""What each setting of a training step costs and saves, beside the step as it is by default.

    python benchmarks/settings.py [--texts 64] [--repeats 2]

A Llama of six layers of width 512 from random weights, texts of 16 to 256 tokens, in bf16 where the
processor has it. Every setting is measured in processes of its own, in turn with the default.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import apart, highest, report

from caravan.batches import pack
from caravan.contract import Contract
from caravan.models import hardware
from caravan.models.biencoder import BiEncoder
from caravan.models.loading import set_attention
from caravan.models.preparing import prepared
from caravan.training.optim import AdamW

VOCABULARY = 8192
DEFAULT: dict[str, Any] = {
    "attention": "auto",
    "checkpointing": False,
    "compile": False,
    "fused": True,
    "precision": "auto",
}
SETTINGS: list[dict[str, Any]] = [
    {"attention": "sdpa"},
    {"attention": "eager"},
    {"attention": "unpadded"},
    {"checkpointing": True},
    {"checkpointing": "selective"},
    {"compile": True},
    {"fused": False},
    {"precision": "float32"},
]


def measured(number: int, setting: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds a step, peak memory in MB, and the first step's loss."""
    from transformers import LlamaConfig, LlamaModel

    chosen = {**DEFAULT, **setting}
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=VOCABULARY, intermediate_size=1376, use_cache=False, **shape)
    model = set_attention(LlamaModel(config), chosen["attention"])
    model = prepared(model, chosen["checkpointing"], False, chosen["compile"])
    device = hardware.device()
    encoder = BiEncoder(model, Contract()).to(device).train()
    optimizer = AdamW(lr=1e-4, fused=chosen["fused"]).build(encoder, 100)["optimizer"]
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 257, (number,), generator=rng).tolist()
    ids = [torch.randint(3, VOCABULARY, (n,), generator=rng).tolist() for n in lengths]
    batch = pack(ids, hardware.chunk(None)).to(device)
    bf16 = hardware.resolve(chosen["precision"]) == "bf16"
    seconds, losses = [], []
    for _ in range(5):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            embeddings = encoder.embed(batch)
        scores = embeddings[0::2] @ embeddings[1::2].T / 0.05
        loss = torch.nn.functional.cross_entropy(
            scores, torch.arange(len(scores), device=scores.device)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
    peak = highest()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e6
    return statistics.median(seconds[2:]), peak, losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=64, help="texts a step")
    parser.add_argument("--repeats", type=int, default=2, help="pairs of processes")
    options = parser.parse_args()
    rows = []
    for setting in SETTINGS:
        pairs = [
            (apart(measured, options.texts, {}), apart(measured, options.texts, setting))
            for _ in range(options.repeats)
        ]
        ratios = [other[0] / default[0] for default, other in pairs]
        rows.append(
            {
                "setting": ", ".join(f"{name}={value}" for name, value in setting.items()),
                "times as long": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "peak MB": round(statistics.median(other[1] for _, other in pairs)),
                "of default": round(statistics.median(default[1] for default, _ in pairs)),
                "losses apart": f"{max(abs(a[2] - b[2]) for a, b in pairs):.1e}",
            }
        )
    report(
        "settings",
        f"A training step of {options.texts} texts of 16 to 256 tokens under each setting",
        rows,
        [
            "`times as long` is the setting's median step over the default's, the median of pairs"
            " of processes taken in turn. Peaks are those of a process that does this and nothing"
            " else, libraries and model counted in; on a GPU those of its memory.",
            "The default is attention=auto, no recomputation, not compiled, the fused AdamW, and"
            " bf16 where the processor has it.",
        ],
    )


if __name__ == "__main__":
    main()
