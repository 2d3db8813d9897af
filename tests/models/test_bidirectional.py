"""Bidirectional decoders: equal to a mask that hides nothing, saved as such, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from tests.commands import ROOT, evaluate, from_folder, train, train_arguments, train_config
from tests.models.small import TEXTS, close, model_of, padded, shaken
from tests.refusals import refused
from tests.tiny import tiny_backbone
from tests.training.test_adaptation import adapt
from torch import Tensor

from caravan.cli.compose import compose
from caravan.data.batch import pack
from caravan.encoding import Encoding, read_encoding
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.bidirectional import check_direction, is_causal, make_bidirectional
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, with_head
from caravan.models.llara import Layout, SlotEncoder
from caravan.models.loading import set_attention
from caravan.models.query_likelihood import QueryLikelihood

BOTH = Encoding(bidirectional=True, query_length=16, passage_length=24)
WINDOW = 4
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen3": {},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def _model(name: str, attention: str = "auto") -> Any:
    model = model_of(name, noise=0.05, vocab_size=400, **DECODERS.get(name, {}))
    return set_attention(model, attention)


def _encoder(name: str, attention: str = "auto", pooling: str = "last") -> BiEncoder:
    model = make_bidirectional(_model(name, attention))
    return BiEncoder(model, replace(BOTH, pooling=pooling)).eval()


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", DECODERS)
def test_an_embedding_depends_on_neither_batch_nor_padding(
    name: str, pooling: str, attention: str
) -> None:
    model = _encoder(name, attention, pooling)
    with torch.no_grad():
        alone = torch.cat([model(*padded([text], "right", len(text)), True) for text in TEXTS])
        batched = [model(*padded(TEXTS, side)) for side in ("left", "right")]
        wider = model(*padded(TEXTS, "right", width=40))
        for other in (*batched, wider, model.embed(pack(TEXTS, token_budget=20))):
            close(other, alone)


def _with_a_mask(name: str, text: list[int]) -> Tensor:
    """States [1, L, d] of the causal decoder, under an explicit mask that hides nothing."""
    places = torch.arange(len(text))
    near = ((places[:, None] - places).abs() <= WINDOW)[None, None]
    masks: Any = {"full_attention": torch.ones_like(near), "sliding_attention": near}
    if name != "gemma3_text":
        masks = masks["sliding_attention" if name == "mistral" else "full_attention"]
    model = _model(name, "sdpa")
    assert is_causal(model)
    states: Tensor = model(torch.tensor([text]), attention_mask=masks).last_hidden_state
    return states


@pytest.mark.parametrize("name", DECODERS)
def test_embeddings_equal_plain_transformers_under_a_mask_that_hides_nothing(name: str) -> None:
    model = _encoder(name)
    with torch.no_grad():
        for text in TEXTS:
            expected = torch.nn.functional.normalize(_with_a_mask(name, text)[:, -1], dim=-1)
            close(model.embed(pack([text], 100)), expected)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("name", [*DECODERS, "mixtral", "gpt2"])
def test_the_last_token_moves_the_first_tokens_state(name: str, both: bool) -> None:
    model = _model(name)
    encoding = Encoding(pooling="cls", bidirectional=both, query_length=8, passage_length=8)
    encoder = BiEncoder(make_bidirectional(model) if both else model, encoding)
    with torch.no_grad():
        rows = encoder.embed(pack([[5, 6, 7, 8], [5, 6, 7, 9]], 100))
    assert bool((rows[0] - rows[1]).abs().max() > 1e-3) == both


def test_a_processors_own_attention_in_bf16_is_bidirectional() -> None:
    exact, rounded = _encoder("llama"), _encoder("llama")
    assert rounded.backbone.config._attn_implementation == "caravan"
    rounded.bfloat16()
    with torch.no_grad():
        cosines = (exact.embed(pack(TEXTS, 99)) * rounded.embed(pack(TEXTS, 99))).sum(dim=1)
    assert cosines.min() > 0.998
    check_direction(BOTH, rounded.backbone)


@pytest.mark.parametrize(
    ("name", "attention", "named"),
    [
        ("gpt_neo", "auto", "GPTNeoModel"),
        ("mamba", "auto", "MambaModel"),
        ("bert", "auto", "BertModel"),
        ("jamba", "auto", "JambaModel has layers (linear_attention)"),
        ("llama4_text", "auto", "Llama4TextModel has layers (chunked_attention)"),
        ("stablelm", "sdpa", "in layers 0, 1 with backbone.attention=sdpa"),
    ],
)
def test_an_architecture_that_cannot_be_made_bidirectional_is_refused_by_name(
    name: str, attention: str, named: str
) -> None:
    with refused("not-bidirectional", "backbone.bidirectional", named):
        _encoder(name, attention)


def test_another_attention_of_that_architecture_is_accepted() -> None:
    model = _encoder("stablelm", "eager")
    with torch.no_grad():
        alone = torch.cat([model.embed(pack([text], 100)) for text in TEXTS])
        close(model(*padded(TEXTS, "left")), alone)


@pytest.mark.parametrize("fault", ["causal", "padding"])
def test_a_single_wrong_layer_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llama", "sdpa")
    attention = model.layers[1].self_attn
    forward = attention.forward
    changed = {"attention_mask": None} if fault == "padding" else {"is_causal": True}
    monkeypatch.setattr(attention, "forward", lambda **given: forward(**{**given, **changed}))
    with refused("not-bidirectional", "LlamaModel", "in layers 1 "):
        BiEncoder(make_bidirectional(model), BOTH)


def test_a_model_and_its_encoding_have_the_same_direction() -> None:
    with refused("direction-mismatch", "backbone.bidirectional=true"):
        BiEncoder(make_bidirectional(_model("qwen3")), Encoding())
    with refused("direction-mismatch", "backbone.bidirectional=true"):
        BiEncoder(_model("qwen3"), BOTH)


def test_neither_likelihood_nor_adaptation_is_bidirectional(tokenizer: Any) -> None:
    language_model = make_bidirectional(tiny_backbone().language_model(tokenizer))
    likelihood = Encoding(kind="reranker", scoring="likelihood", append_eos=False)
    with refused("no-language-model", "encoding.scoring"):
        QueryLikelihood(language_model, likelihood)
    with refused("invalid-encoding", "encoding.bidirectional"):
        replace(likelihood, bidirectional=True)
    with refused("model-not-supported", "LlamaModel"):
        SlotEncoder(language_model, language_model.base_model, BOTH, Layout(1, (3, 3), 1))


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    return _saved("llama", tokenizer, tmp_path / "base")


def _saved(name: str, tokenizer: Any, to: Path) -> Path:
    _model(name).save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def _train(beir: Path, run_dir: Path, *given: str) -> Path:
    """Two steps of a saved backbone, which has its own shape; the model folder."""
    tiny = [text for text in train_arguments(beir, run_dir) if not text.startswith("backbone.")]
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    train_config(compose(ROOT / "conf", "train", [*tiny, *steps, *given]))
    return run_dir / "model"


@pytest.mark.parametrize(
    ("name", "peft"),
    [
        pytest.param(name, peft, marks=[] if number % 3 == place else [pytest.mark.slow])
        for number, name in enumerate(DECODERS)
        for place, peft in enumerate(("none", "lora", "qlora"))
    ],
)
def test_a_trained_folder_embeds_as_plain_transformers_does(
    name: str, peft: str, beir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    base = _saved(name, tokenizer, tmp_path / "base")
    given = ["backbone=hf", f"backbone.name={base}", "backbone.bidirectional=true", f"peft={peft}"]
    saved = _train(beir, tmp_path / "run", *given)
    assert read_encoding(saved)[0].bidirectional
    plain: Any
    if peft == "none":
        plain = transformers.AutoModel.from_pretrained(saved)  # config.json has the setting
        assert json.loads((saved / "config.json").read_text())["is_causal"] is False
    else:
        plain = transformers.AutoModel.from_pretrained(base)
        plain.config.is_causal = False
        plain = PeftModel.from_pretrained(plain, str(saved))
    untrained = transformers.AutoModel.from_pretrained(base)
    untrained.config.is_causal = False
    loaded = folder.load(saved)[0]
    with torch.no_grad():
        for text in TEXTS:
            found = loaded.embed(pack([text], 100))
            for model, equal in ((plain, True), (untrained, False)):
                states = model.eval()(input_ids=torch.tensor([text])).last_hidden_state
                expected = torch.nn.functional.normalize(states[:, -1], dim=-1)
                assert bool((found - expected).abs().max() < 1e-5) == equal


@pytest.mark.parametrize("peft", [[], ["peft=lora", "peft.rank=2", "peft.alpha=4"]])
def test_later_stages_stay_bidirectional(
    peft: list[str], base: Path, beir: Path, tmp_path: Path
) -> None:
    given = ["backbone=hf", f"backbone.name={base}", "backbone.bidirectional=true"]
    first = _train(beir, tmp_path / "first", *given, *peft)
    second = _train(beir, tmp_path / "second", *from_folder(first), *peft)
    evaluated = evaluate(beir, tmp_path / "eval", second)
    run = tmp_path / "eval" / evaluated["run"]
    reranks = ["stage=reranker", "loss=listwise", f"validation.run={run}", "data.dev_split=test"]
    third = _train(beir, tmp_path / "third", *from_folder(first), *reranks, *peft)
    fourth = _train(beir, tmp_path / "fourth", *from_folder(third), *peft)
    for saved in (second, third, fourth):
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
        moved = model.embed(pack([[5, 6, 7, 8], [5, 6, 7, 9]], 99))
    assert not is_causal(model.backbone)
    assert not torch.equal(moved[0], moved[1])
    with refused("direction-mismatch", "backbone.bidirectional=true"):
        FromFolder(str(tmp_path / "m"), bidirectional=False)
    for name in ("model", "scorer"):
        with refused("direction-mismatch", "backbone.bidirectional=true"):
            getattr(Pretrained(str(tmp_path / "m")), name)(tokenizer)


def test_an_older_folder_without_the_setting_is_causal(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    encoding = Encoding()
    folder.save(tmp_path / "m", BiEncoder(_model("llama"), encoding), tokenizer, encoding, {})
    path = tmp_path / "m" / "caravan.json"
    record = json.loads(path.read_text())
    del record["bidirectional"]
    path.write_text(json.dumps(record))
    assert is_causal(folder.load(tmp_path / "m")[0].backbone)


@pytest.mark.parametrize("name", DECODERS)
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


def test_checkpointing_gives_the_same_gradient(base: Path, tokenizer: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        spec = Pretrained(str(base), checkpointing=checkpointing, bidirectional=True)
        model = BiEncoder(spec.model(tokenizer), BOTH).train()
        model(*padded(TEXTS, "right")).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_retriever_from_an_adapted_model_may_be_bidirectional(beir: Path, tmp_path: Path) -> None:
    adapt(beir, tmp_path / "adapted", "stage=adaptation_released", "trainer.max_steps=0")
    given = [*from_folder(tmp_path / "adapted" / "model"), "backbone.bidirectional=true"]
    lengths = ["encoding.query_length=80", "encoding.passage_length=90"]
    train(beir, tmp_path / "run", *given, *lengths, "trainer.max_steps=2")
    model, _, encoding, _ = folder.load(tmp_path / "run" / "model")
    assert (encoding.pooling, encoding.bidirectional) == ("slots", True)
    texts = [text for text in TEXTS if len(text) > 8]
    with torch.no_grad():
        alone = torch.cat([model.embed(pack([text], 99)) for text in texts])
        close(model(*padded(texts, "left", width=40)), alone)
