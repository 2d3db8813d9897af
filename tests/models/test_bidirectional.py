"""Bidirectional decoders: equal to a mask that hides nothing, saved as such, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tests.commands import evaluate, from_folder, train
from tests.models.small import EVERY_DECODER, TEXTS, close, model_of, padded, saved_base, shaken
from tests.refusals import refused
from tests.tiny import tiny_backbone
from tests.training.test_adaptation import adapt
from torch import Tensor

from caravan.data.batch import pack
from caravan.encoding import Encoding, read_encoding
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.bidirectional import is_causal, make_bidirectional
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, QueryLikelihood, with_head
from caravan.models.loading import set_attention

BOTH = Encoding(bidirectional=True, query_length=16, passage_length=24)
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def _model(name: str, attention: str = "auto") -> Any:
    settings = {"vocab_size": 400, **WINDOWS.get(name, {})}
    return set_attention(model_of(name, noise=0.05, **settings), attention)


def _with_a_mask(model: Any, text: list[int]) -> Tensor:
    """States [1, L, d] of a causal decoder, under an explicit mask that hides nothing."""
    assert is_causal(model)
    config, places = model.config, torch.arange(len(text))
    window = getattr(config, "sliding_window", None) or len(text)
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if config.model_type in ("mistral", "mixtral", "phi3", "starcoder2"):
        kinds = ["sliding_attention"]
    seen = {
        "full_attention": torch.ones(1, 1, len(text), len(text), dtype=torch.bool),
        "sliding_attention": ((places[:, None] - places).abs() <= window)[None, None],
    }
    if config._attn_implementation == "eager":
        seen = {kind: (~mask).float() * -1e30 for kind, mask in seen.items()}
    masks: Any = seen if len(set(kinds)) > 1 else seen[kinds[0]]
    states: Tensor = model(torch.tensor([text]), attention_mask=masks).last_hidden_state
    return states


@pytest.mark.parametrize(("name", "attention"), EVERY_DECODER)
def test_embeddings_equal_plain_transformers_under_a_mask_that_hides_nothing(
    name: str, attention: str
) -> None:
    """Alone, in chunks, and padded on either side."""
    plain = _model(name, "eager" if name in ("gemma2", "gpt_oss") else attention)
    model = BiEncoder(make_bidirectional(_model(name, attention)), BOTH).eval()
    with torch.no_grad():
        states = torch.cat([_with_a_mask(plain, text)[:, -1] for text in TEXTS])
        expected = torch.nn.functional.normalize(states, dim=-1)
        close(torch.cat([model.embed(pack([text], 100)) for text in TEXTS]), expected)
        for found in (model.embed(pack(TEXTS, 20)), *(model(*padded(TEXTS, s)) for s in SIDES)):
            close(found, expected)


SIDES = ("left", "right")


def test_a_processors_own_attention_in_bf16_is_bidirectional() -> None:
    exact, rounded = (BiEncoder(make_bidirectional(_model("llama")), BOTH) for _ in range(2))
    assert rounded.backbone.config._attn_implementation == "caravan"  # type: ignore[union-attr]
    rounded.bfloat16()
    with torch.no_grad():
        cosines = (exact.embed(pack(TEXTS, 99)) * rounded.embed(pack(TEXTS, 99))).sum(dim=1)
    assert cosines.min() > 0.998


@pytest.mark.parametrize("name", ["mamba", "bert", "stablelm"])
def test_an_architecture_without_a_test_is_refused_by_name(name: str) -> None:
    with refused("model-not-supported", "backbone.bidirectional", f"({name})"):
        make_bidirectional(model_of(name))


def test_a_model_and_its_encoding_have_the_same_direction() -> None:
    for model, encoding in (
        (make_bidirectional(_model("qwen3")), Encoding()),
        (_model("qwen3"), BOTH),
    ):
        with refused("direction-mismatch", "backbone.bidirectional=true"):
            BiEncoder(model, encoding)


def test_a_likelihood_is_not_bidirectional(tokenizer: Any) -> None:
    language_model = make_bidirectional(tiny_backbone().language_model(tokenizer))
    likelihood = Encoding(kind="reranker", scoring="likelihood", append_eos=False)
    with refused("no-language-model", "encoding.scoring"):
        QueryLikelihood(language_model, likelihood)


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    return saved_base(tokenizer, tmp_path / "base", _model("llama"))


def _train(beir: Path, run_dir: Path, *given: str) -> Path:
    """Two steps of a saved backbone; the model folder."""
    train(beir, run_dir, "trainer.max_steps=2", "trainer.val_check_interval=2", *given)
    return run_dir / "model"


@pytest.mark.parametrize("peft", ["none", "lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_a_trained_folder_embeds_as_plain_transformers_does(
    peft: str, base: Path, beir: Path, tmp_path: Path
) -> None:
    given = ["backbone=hf", f"backbone.name={base}", "backbone.bidirectional=true", f"peft={peft}"]
    saved = _train(beir, tmp_path / "run", *given)
    assert read_encoding(saved)[0].bidirectional
    plain: Any
    if peft == "none":
        plain = transformers.AutoModel.from_pretrained(saved)  # config.json has the setting
    else:
        plain = transformers.AutoModel.from_pretrained(base)
        plain.config.is_causal = False
        plain = PeftModel.from_pretrained(plain, str(saved))
    loaded = folder.load(saved)[0]
    with torch.no_grad():
        for text in TEXTS:
            states = plain.eval()(input_ids=torch.tensor([text])).last_hidden_state
            expected = torch.nn.functional.normalize(states[:, -1], dim=-1)
            close(loaded.embed(pack([text], 100)), expected)


@pytest.mark.slow
def test_later_stages_stay_bidirectional(base: Path, beir: Path, tmp_path: Path) -> None:
    lora = ["peft=lora", "peft.rank=2", "peft.alpha=4"]
    given = ["backbone=hf", f"backbone.name={base}", "backbone.bidirectional=true"]
    first = _train(beir, tmp_path / "first", *given, *lora)
    run = tmp_path / "eval" / evaluate(beir, tmp_path / "eval", first)["run"]
    reranks = ["stage=reranker", "loss=infonce", f"validation.run={run}", "data.dev_split=test"]
    second = _train(beir, tmp_path / "second", *from_folder(first), *reranks, *lora)
    third = _train(beir, tmp_path / "third", *from_folder(second), *lora)
    for saved in (second, third):
        assert read_encoding(saved)[0].bidirectional
        folder.load(saved)


def test_an_adapters_folder_is_never_loaded_as_causal(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    spec = Pretrained(str(base), bidirectional=True)
    adapted = shaken(LoRA(rank=2, alpha=4).apply(spec.model(tokenizer)))
    folder.save(tmp_path / "m", BiEncoder(adapted, BOTH), tokenizer, BOTH, {})
    assert "is_causal" not in json.loads((base / "config.json").read_text())
    model = folder.load(tmp_path / "m")[0]
    merged = FromFolder(str(tmp_path / "m")).model(tokenizer)
    with torch.no_grad():
        close(BiEncoder(merged, BOTH).eval().embed(pack(TEXTS, 99)), model.embed(pack(TEXTS, 99)))
    assert not is_causal(model.backbone)
    for backbone in (FromFolder, Pretrained):
        with refused("direction-mismatch", "backbone.bidirectional=true"):
            backbone(str(tmp_path / "m"), bidirectional=False)


@pytest.mark.parametrize("name", ["llama", *WINDOWS])
def test_a_bidirectional_reranker_scores_as_plain_transformers_does(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    encoding = Encoding(kind="reranker", bidirectional=True)
    model = CrossEncoder(with_head(make_bidirectional(_model(name)), 0), encoding).eval()
    folder.save(tmp_path / "m", model, tokenizer, encoding, {})
    auto = transformers.AutoModelForSequenceClassification
    plain = auto.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        expected = torch.stack([plain(torch.tensor([text])).logits[0, 0] for text in TEXTS])
        for scorer in (model, folder.load(tmp_path / "m")[0]):
            close(scorer(*padded(TEXTS, "left")), expected)
    assert expected.std() > 1e-3


@pytest.mark.slow
def test_a_retriever_from_an_adapted_model_may_be_bidirectional(beir: Path, tmp_path: Path) -> None:
    adapt(beir, tmp_path / "adapted", "stage=adaptation_released", "trainer.max_steps=0")
    given = [*from_folder(tmp_path / "adapted" / "model"), "backbone.bidirectional=true"]
    lengths = ["encoding.query_length=80", "encoding.passage_length=90"]
    train(beir, tmp_path / "run", *given, *lengths, "trainer.max_steps=2")
    model, _, encoding, _ = folder.load(tmp_path / "run" / "model")
    assert (encoding.pooling, encoding.bidirectional) == ("slots", True)
    assert not is_causal(model.backbone)
