"""Every preset of conf/backbone on a tiny instance of its real architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.commands import ROOT, TINY

from caravan.batches import pack
from caravan.compose import compose
from caravan.data.collection import Collection
from caravan.data.templates import Templates
from caravan.models import folder
from caravan.training.run import train

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
LONG = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LONG |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ARCHITECTURES: dict[str, Any] = {
    "minilm": lambda: transformers.BertConfig(**SHAPE),
    "bert_base": lambda: transformers.BertConfig(**SHAPE),
    "modernbert_base": lambda: transformers.ModernBertConfig(**SHAPE),
    "smollm2_135m": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3_0_6b": lambda: transformers.Qwen3Config(**GROUPED, head_dim=32),
    "qwen3_4b": lambda: transformers.Qwen3Config(**GROUPED, head_dim=64),
    "llama2_7b": lambda: transformers.LlamaConfig(**{**GROUPED, "num_key_value_heads": 2}),
    "llama2_13b": lambda: transformers.LlamaConfig(**{**GROUPED, "num_key_value_heads": 2}),
    "llama3_1_8b": lambda: transformers.LlamaConfig(**GROUPED, rope_parameters=LONG),
    "mistral_7b": lambda: transformers.MistralConfig(**GROUPED, sliding_window=None),
    "gemma3_1b": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8),
}
OWN = {"hf", "tiny_llama"}  # no architecture, and one that has tests of its own


def test_every_preset_has_a_tiny_instance() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml")}
    assert presets - OWN == set(ARCHITECTURES)


@pytest.mark.parametrize("peft", ["none", "lora", "qlora"])
@pytest.mark.parametrize("preset", sorted(ARCHITECTURES))
def test_a_preset_trains_saves_and_embeds_as_plain_transformers_does(
    preset: str, peft: str, beir: Path, collection: Collection, tokenizer: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    torch.manual_seed(0)
    transformers.AutoModel.from_config(ARCHITECTURES[preset]()).save_pretrained(base)
    tokenizer.save_pretrained(base)
    given = [text for text in TINY if not text.startswith("backbone.")]
    cfg = compose(
        ROOT / "conf",
        "train",
        [
            *("data=beir", f"data.path={beir}", f"cache_dir={tmp_path / 'cache'}", *given),
            *(f"run_dir={tmp_path / 'run'}", f"backbone={preset}", f"backbone.name={base}"),
            *(f"peft={peft}", "trainer.max_steps=2", "trainer.val_check_interval=2"),
        ],
    )
    train(cfg)
    saved = tmp_path / "run" / "model"
    model, own, contract, facts = folder.load(saved)
    assert facts["weights"] == ("full" if peft == "none" else "adapter")
    plain = transformers.AutoModel.from_pretrained(saved if peft == "none" else base)
    before = transformers.AutoModel.from_pretrained(base).eval()
    if peft != "none":
        from peft import PeftModel

        plain = PeftModel.from_pretrained(plain, str(saved))
    ids = Templates(own, contract).passages(collection.corpus.get(range(6)))
    found = model.embed(pack(ids, 999)).detach()
    place = {"last": lambda h: h[-1], "cls": lambda h: h[0], "mean": lambda h: h.mean(dim=0)}
    for read, equal in ((plain.eval(), True), (before, False)):
        with torch.no_grad():
            states = [read(input_ids=torch.tensor([text])).last_hidden_state[0] for text in ids]
        rows = torch.stack([place[contract.pooling](state) for state in states])
        expected = torch.nn.functional.normalize(rows, dim=1)
        assert bool((found - expected).abs().max() < 1e-5) == equal
