"""Every preset of conf/backbone on a tiny instance of its real architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from tests.commands import ROOT, TINY
from tests.models.small import close

from caravan.cli.compose import compose
from caravan.cli.train import train
from caravan.data.batch import pack
from caravan.data.collection import Collection
from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Templates
from caravan.models import folder

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
    "modernbert_base": lambda: transformers.ModernBertConfig(**SHAPE),
    "smollm2_135m": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3_0_6b": lambda: transformers.Qwen3Config(**GROUPED, head_dim=32),
    "qwen3_4b": lambda: transformers.Qwen3Config(**GROUPED, head_dim=64),
    "llama2_7b": lambda: transformers.LlamaConfig(**{**GROUPED, "num_key_value_heads": 2}),
    "llama3_1_8b": lambda: transformers.LlamaConfig(**GROUPED, rope_parameters=LONG),
    "hf": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8),
}
OWN = {"from_folder", "tiny_llama"}
"""No architecture, and one that has tests of its own."""
FAMILIES = {"minilm", "modernbert_base", "smollm2_135m", "qwen3_0_6b", "hf"}
"""A preset of each architecture among them."""
ENCODERS = {"minilm", "modernbert_base"}
QUICK = {("minilm", "none"), ("smollm2_135m", "none"), ("qwen3_4b", "lora")}
TRAINED = [
    pytest.param(preset, peft, marks=[] if number % 3 == place else [pytest.mark.slow])
    for number, preset in enumerate(sorted(ARCHITECTURES))
    for place, peft in enumerate(("none", "lora", "qlora"))
]
"""Every preset with every option; quick are each preset with one of them, in turn."""
RERANKED = [
    pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
    for case in [*((name, "none") for name in sorted(FAMILIES)), ("qwen3_4b", "lora")]
]


def test_every_preset_has_a_tiny_instance() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml")}
    assert presets - OWN == set(ARCHITECTURES)
    kinds = {name: type(config()) for name, config in ARCHITECTURES.items()}
    assert {kinds[name] for name in FAMILIES} == set(kinds.values())


def _train(preset: str, tokenizer: Any, peft: str, beir: Path, to: Path, *given: str) -> Path:
    """Two steps of a tiny base in `to`, by the command; the model folder."""
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(ARCHITECTURES[preset]())
    base.save_pretrained(to / "base")
    tokenizer.save_pretrained(to / "base")
    tiny = [text for text in TINY if not text.startswith("backbone.")]
    overrides = [
        *("data=beir", f"data.path={beir}", f"cache_dir={to / 'cache'}", *tiny),
        *(f"run_dir={to / 'run'}", f"backbone={preset}", f"backbone.name={to / 'base'}"),
        *(f"peft={peft}", "trainer.max_steps=2", "trainer.val_check_interval=2", *given),
    ]
    train(compose(ROOT / "conf", "train", overrides))
    return to / "run" / "model"


def _plain(auto: Any, to: Path, peft: str, **settings: Any) -> Any:
    """The trained model as transformers and PEFT load it."""
    saved = to / "run" / "model"
    model = auto.from_pretrained(saved if peft == "none" else to / "base", **settings)
    return (model if peft == "none" else PeftModel.from_pretrained(model, str(saved))).eval()


@pytest.mark.parametrize(("preset", "peft"), TRAINED)
def test_a_preset_trains_saves_and_embeds_as_plain_transformers_does(
    preset: str, peft: str, beir: Path, collection: Collection, tokenizer: Any, tmp_path: Path
) -> None:
    model, own, encoding, facts = folder.load(_train(preset, tokenizer, peft, beir, tmp_path))
    assert facts["weights"] == ("full" if peft == "none" else "adapter")
    ids = Templates(own, encoding).passages(collection.corpus.get(range(6)))
    place = {"last": lambda h: h[-1], "cls": lambda h: h[0], "mean": lambda h: h.mean(dim=0)}
    plain = _plain(transformers.AutoModel, tmp_path, peft)
    before = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        found = model.embed(pack(ids, 999))
        for read, equal in ((plain, True), (before, False)):
            states = [read(input_ids=torch.tensor([text])).last_hidden_state[0] for text in ids]
            rows = torch.stack([place[encoding.pooling](state) for state in states])
            expected = torch.nn.functional.normalize(rows, dim=1)
            assert bool((found - expected).abs().max() < 1e-5) == equal


@pytest.mark.parametrize(("preset", "peft"), RERANKED)
def test_a_reranker_of_each_family_trains_saves_and_scores_as_plain_transformers_does(
    preset: str, peft: str, beir: Path, collection: Collection, tokenizer: Any, tmp_path: Path
) -> None:
    run = tmp_path / "candidates.trec"
    lines = [f"q{q} Q0 p{p} 1 {1 / (p + 1)} hand\n" for q in range(16, 20) for p in range(12, 24)]
    run.write_text("".join(lines))
    encodes = preset in ENCODERS
    stage = "reranker_encoder" if encodes else "reranker"
    reranks = [f"stage={stage}", "loss=infonce", f"validation.run={run}"]
    reranks += ["encoding.query_length=16", "encoding.passage_length=32"]
    saved = _train(preset, tokenizer, peft, beir, tmp_path, *reranks)
    model, own, encoding, _ = folder.load(saved)
    queries, passages = collection.queries.get(range(6)), collection.corpus.get(range(6))
    pairs = PairTemplates(own, encoding).pairs(queries, passages)
    auto: Any = transformers.AutoModelForSequenceClassification
    if encodes:
        auto, head = transformers.AutoModel, load_file(saved / folder.HEAD)["score.weight"]
    plain = _plain(auto, tmp_path, peft, **({} if encodes else {"num_labels": 1}))
    expected = []
    with torch.no_grad():
        seconds = [pair.second for pair in pairs]
        found = model.score(pack([pair.ids for pair in pairs], 999, seconds=seconds))
        for pair in pairs:
            types = torch.tensor([[int(i >= pair.second) for i in range(len(pair.ids))]])
            given = {"token_type_ids": types} if preset == "minilm" else {}
            out = plain(input_ids=torch.tensor([pair.ids]), **given)
            score = head @ out.last_hidden_state[0, 0] if encodes else out.logits[0]
            expected.append(score[0])
    close(found, torch.stack(expected))
    assert found.std() > 1e-3
    initial = transformers.AutoModel.from_pretrained(tmp_path / "base").state_dict()
    trained = model.plain.get_submodule(model.plain.base_model_prefix).state_dict()
    assert any(not torch.equal(trained[key], weight) for key, weight in initial.items())
