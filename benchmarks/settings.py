"""Time and memory of a training step under each setting, compared with the default.

    python benchmarks/settings.py [--texts 64] [--repeats 5]

A Llama of six layers of width 512 from random weights, texts of 16 to 256 tokens, in bf16 where the
processor has it. Each setting's steps are timed in turn with the default's; its memory is that of a
process of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import apart, arguments, highest, paired, report

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models import hardware
from caravan.models.adapters import LoRA
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
    "lora": False,
    "bf16_norms": False,
}
SETTINGS: list[dict[str, Any]] = [
    {"attention": "sdpa"},
    {"attention": "eager"},
    {"attention": "unpadded"},
    {"checkpointing": True},
    {"compile": True},
    {"fused": False},
    {"precision": "float32"},
    {"lora": True},
    {"lora": True, "bf16_norms": True},
]


class Step:
    """A training step of a model under one setting, on one batch."""

    def __init__(self, number: int, setting: dict[str, Any]) -> None:
        from transformers import LlamaConfig, LlamaModel

        chosen = {**DEFAULT, **setting}
        torch.manual_seed(0)
        shape = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
        config = LlamaConfig(
            vocab_size=VOCABULARY, intermediate_size=1376, use_cache=False, **shape
        )
        model = set_attention(LlamaModel(config), chosen["attention"])
        model = prepared(model, chosen["checkpointing"], False, chosen["compile"])
        self.device = hardware.device()
        self.bf16 = hardware.resolve(chosen["precision"]) == "bf16"
        if chosen["lora"]:
            model = LoRA().apply(model)
            model.active_peft_config.base_model_name_or_path = "base"  # not saved with its base
        self.encoder = BiEncoder(model, Encoding()).to(self.device).train()
        hardware.settle_precisions(self.encoder, self.bf16, chosen["bf16_norms"])
        optimizer = AdamW(lr=1e-4, fused=chosen["fused"])
        self.optimizer = optimizer.build(self.encoder, 100)["optimizer"]
        rng = torch.Generator().manual_seed(0)
        lengths = torch.randint(16, 257, (number,), generator=rng).tolist()
        ids = [torch.randint(3, VOCABULARY, (n,), generator=rng).tolist() for n in lengths]
        self.batch = pack(ids, hardware.chunk(None)).to(self.device)

    def __call__(self) -> float:
        """The loss before the step; by then a GPU has done its work as well."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.encoder.embed(self.batch)
        scores = embeddings[0::2] @ embeddings[1::2].T / 0.05
        targets = torch.arange(len(scores), device=scores.device)
        loss = torch.nn.functional.cross_entropy(scores, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def in_turn(number: int, setting: dict[str, Any], repeats: int) -> dict[str, float]:
    """Steps by default and under the setting, one after the other in one process."""
    return paired(Step(number, {}), Step(number, setting), repeats)


def of_one(number: int, setting: dict[str, Any]) -> tuple[float, float]:
    """Peak memory in MB of two steps, and the first one's loss."""
    step = Step(number, setting)
    loss = step()
    step()
    on_gpu = step.device.type == "cuda"
    return torch.cuda.max_memory_allocated(step.device) / 1e6 if on_gpu else highest(), loss


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--texts", type=int, default=64, help="texts a step")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of steps")
    options = parser.parse_args()
    default_peak, default_loss = apart(of_one, options.texts, {})
    rows = []
    for setting in SETTINGS:
        if setting.get("compile") and " " in torch.__path__[0] and not torch.cuda.is_available():
            sys.stderr.write(f"{setting}: left out, torch cannot link where its path has a space\n")
            continue
        if setting.get("bf16_norms") and hardware.resolve("auto") != "bf16":
            sys.stderr.write(f"{setting}: left out, the processor has no bf16\n")
            continue
        times = apart(in_turn, options.texts, setting, options.repeats)
        peak, loss = apart(of_one, options.texts, setting)
        rows.append(
            {
                "setting": ", ".join(f"{name}={value}" for name, value in setting.items()),
                "times as long": times["ratio"],
                "lowest": times["lowest"],
                "highest": times["highest"],
                "peak MB": round(peak),
                "of default": round(default_peak),
                "losses apart": f"{abs(loss - default_loss):.1e}",
            }
        )
        sys.stderr.write(f"{rows[-1]}\n")
    report(
        f"A training step of {options.texts} texts of 16 to 256 tokens under each setting",
        rows,
        [
            "`times as long` is the setting's step over the default's, the median of pairs taken"
            " in turn in one process. Peaks are those of a process that does this and nothing"
            " else, libraries and model counted in; on a GPU those of its memory.",
            "The default is attention=auto, no recomputation, not compiled, the fused AdamW, and"
            " bf16 where the processor has it; all weights are trained. `lora=True` trains"
            " adapters, with `bf16_norms=True` beside norms and embeddings in bf16.",
        ],
        options.save,
    )


if __name__ == "__main__":
    main()
