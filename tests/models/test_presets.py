"""Every preset of conf/backbone on a tiny instance of its real architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tests.commands import ROOT, train
from tests.models.small import model_of, saved_base

from caravan.data.batch import pack
from caravan.data.collection import Collection
from caravan.data.tokenization import Templates
from caravan.models import folder

SIZE = {"vocab_size": 400, "max_position_embeddings": 64}
LONG = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LONG |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm": ("bert", {}),
    "modernbert_base": ("modernbert", {}),
    "smollm2_135m": ("llama", {"tie_word_embeddings": True}),
    "qwen3_0_6b": ("qwen3", {}),
    "qwen3_4b": ("qwen3", {"head_dim": 64}),
    "llama2_7b": ("llama", {"num_key_value_heads": 2}),
    "llama3_1_8b": ("llama", {"rope_parameters": LONG}),
    "hf": ("gemma3_text", {}),
}
"""The model type of each preset, and settings of its config."""
OWN = {"from_folder", "tiny_llama"}
"""No architecture, and one that has tests of its own."""
TRAINED = [
    pytest.param(preset, peft, marks=[] if number % 3 == place else [pytest.mark.slow])
    for number, preset in enumerate(sorted(ARCHITECTURES))
    for place, peft in enumerate(("none", "lora", "qlora"))
]
"""Every preset with every option; quick are each preset with one of them, in turn."""


def test_every_preset_has_a_tiny_instance() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml")}
    assert presets - OWN == set(ARCHITECTURES)


def _train(preset: str, tokenizer: Any, peft: str, beir: Path, to: Path) -> Path:
    """Two steps of a tiny base in `to`, by the command; the model folder."""
    kind, settings = ARCHITECTURES[preset]
    base = saved_base(tokenizer, to / "base", model_of(kind, **SIZE, **settings))
    given = [f"backbone={preset}", f"backbone.name={base}", f"peft={peft}"]
    given += ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    train(beir, to / "run", *given)
    return to / "run" / "model"


@pytest.mark.parametrize(("preset", "peft"), TRAINED)
def test_a_preset_trains_saves_and_embeds_as_plain_transformers_does(
    preset: str, peft: str, beir: Path, collection: Collection, tokenizer: Any, tmp_path: Path
) -> None:
    model, own, encoding, facts = folder.load(_train(preset, tokenizer, peft, beir, tmp_path))
    assert facts["weights"] == ("full" if peft == "none" else "adapter")
    ids = Templates(own, encoding).passages(collection.corpus.get(range(6)))
    place = {"last": lambda h: h[-1], "cls": lambda h: h[0], "mean": lambda h: h.mean(dim=0)}
    saved, auto = tmp_path / "run" / "model", transformers.AutoModel
    before = auto.from_pretrained(tmp_path / "base").eval()
    plain: Any = auto.from_pretrained(saved if peft == "none" else tmp_path / "base").eval()
    plain = plain if peft == "none" else PeftModel.from_pretrained(plain, str(saved)).eval()
    with torch.no_grad():
        found = model.embed(pack(ids, 999))
        for read, equal in ((plain, True), (before, False)):
            states = [read(input_ids=torch.tensor([text])).last_hidden_state[0] for text in ids]
            rows = torch.stack([place[encoding.pooling](state) for state in states])
            expected = torch.nn.functional.normalize(rows, dim=1)
            assert bool((found - expected).abs().max() < 1e-5) == equal
