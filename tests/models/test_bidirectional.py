"""Decoders that look both ways: equal to a mask that hides nothing, remembered, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from tests.commands import ROOT, evaluate, train, train_arguments, train_config
from tests.models.test_biencoder import TEXTS, _padded
from tests.models.test_presets import GROUPED
from tests.tiny import tiny_backbone
from tests.training.test_adaptation import adapt
from torch import Tensor

from caravan.batches import pack
from caravan.compose import compose
from caravan.contract import Contract, read_contract
from caravan.errors import InputError
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained, Trained, set_attention
from caravan.models.bidirectional import hold_to, look_both_ways
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, with_head
from caravan.models.likelihood import QueryLikelihood
from caravan.models.pooling import is_causal
from caravan.models.slots import Layout, SlotEncoder

BOTH = Contract(bidirectional=True, query_length=16, passage_length=24)
WINDOW = 4
MIXED = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, **MIXED, sliding_window=WINDOW),
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
OTHERS: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, **EXPERTS),
    "gpt2": lambda: transformers.GPT2Config(**GROUPED),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **GROUPED, attention_types=[[["global", "local"], 1]]
    ),
    "mamba": lambda: transformers.MambaConfig(**GROUPED),
    "jamba": lambda: transformers.JambaConfig(
        **GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=1, use_mamba_kernels=False
    ),
    "llama4": lambda: transformers.Llama4TextConfig(**GROUPED, **EXPERTS, head_dim=16),
    "stablelm": lambda: transformers.StableLmConfig(**GROUPED),
    "bert": lambda: transformers.BertConfig(**GROUPED),
}


def _model(name: str, attention: str = "auto") -> Any:
    """A decoder of transformers that looks to the left, its weights large enough to matter."""
    torch.manual_seed(0)
    config = {**DECODERS, **OTHERS}[name]()
    config.use_cache = False
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return set_attention(model.eval(), attention)


def _encoder(name: str, attention: str = "auto", pooling: str = "last") -> BiEncoder:
    model = look_both_ways(_model(name, attention))
    return BiEncoder(model, replace(BOTH, pooling=pooling)).eval()


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", DECODERS)
def test_an_embedding_depends_on_neither_batch_nor_padding(
    name: str, pooling: str, attention: str
) -> None:
    model = _encoder(name, attention, pooling)
    with torch.no_grad():
        alone = torch.cat([model(*_padded([text], "right", len(text)), True) for text in TEXTS])
        batched = [model(*_padded(TEXTS, side)) for side in ("left", "right")]
        filled = model(*_padded(TEXTS, "right", width=40))
        packed = model.embed(pack(TEXTS, token_budget=20))
    for other in (*batched, filled, packed):
        torch.testing.assert_close(other, alone, atol=1e-5, rtol=0)


def _with_a_mask(name: str, text: list[int]) -> Tensor:
    """States [1, L, d] of the decoder as it was made, under a mask of one's own."""
    places = torch.arange(len(text))
    near = (places[:, None] - places).abs() <= WINDOW
    masks = {"full_attention": torch.ones_like(near)[None, None], "sliding_attention": near}
    masks["sliding_attention"] = near[None, None]
    kinds = {"llama": "full_attention", "qwen3": "full_attention", "mistral": "sliding_attention"}
    model = _model(name, "sdpa")
    assert is_causal(model)
    mask: Any = masks if name == "gemma3" else masks[kinds[name]]
    states: Tensor = model(torch.tensor([text]), attention_mask=mask).last_hidden_state
    return states


@pytest.mark.parametrize("name", DECODERS)
def test_embeddings_equal_plain_transformers_under_a_mask_that_hides_nothing(name: str) -> None:
    model = _encoder(name)
    with torch.no_grad():
        for text in TEXTS:
            expected = torch.nn.functional.normalize(_with_a_mask(name, text)[:, -1], dim=-1)
            found = model.embed(pack([text], 100))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("name", [*DECODERS, "mixtral", "gpt2"])
def test_the_last_token_moves_the_first_tokens_state(name: str, both: bool) -> None:
    model = _model(name)
    contract = Contract(pooling="cls", bidirectional=both)
    encoder = BiEncoder(look_both_ways(model) if both else model, contract)
    with torch.no_grad():
        rows = encoder.embed(pack([[5, 6, 7, 8], [5, 6, 7, 9]], 100))
    assert bool((rows[0] - rows[1]).abs().max() > 1e-3) == both


def test_a_processors_own_attention_in_bf16_looks_both_ways() -> None:
    exact, rounded = _encoder("llama"), _encoder("llama")
    assert rounded.backbone.config._attn_implementation == "caravan"
    rounded.bfloat16()
    with torch.no_grad():
        cosines = (exact.embed(pack(TEXTS, 99)) * rounded.embed(pack(TEXTS, 99))).sum(dim=1)
    assert cosines.min() > 0.998
    hold_to(BOTH, rounded.backbone)


@pytest.mark.parametrize(
    ("name", "attention", "told"),
    [
        ("gpt_neo", "auto", "is for decoders.*GPTNeoModel's does not"),
        ("mamba", "auto", "is for decoders.*MambaModel's does not"),
        ("bert", "auto", "is for decoders.*BertModel's does not"),
        ("jamba", "auto", r"JambaModel has layers \(linear_attention\) that look to the left"),
        ("llama4", "auto", r"Llama4TextModel has layers \(chunked_attention\)"),
        ("stablelm", "sdpa", "StableLmModel does not heed .*=sdpa .* in layers 0, 1; set it"),
    ],
)
def test_an_architecture_that_cannot_look_both_ways_is_refused_by_name(
    name: str, attention: str, told: str
) -> None:
    with pytest.raises(InputError, match=rf"backbone\.bidirectional.* {told}"):
        _encoder(name, attention)


def test_an_attention_that_heeds_the_setting_where_another_does_not_is_taken() -> None:
    model = _encoder("stablelm", "eager")
    with torch.no_grad():
        alone = torch.cat([model.embed(pack([text], 100)) for text in TEXTS])
        torch.testing.assert_close(model(*_padded(TEXTS, "left")), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fault", ["to the left", "padding"])
def test_one_layer_that_goes_its_own_way_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model("llama", "sdpa")
    attention = model.layers[1].self_attn
    forward = attention.forward

    def other(**given: Any) -> Any:
        if fault == "padding":
            return forward(**{**given, "attention_mask": None})
        return forward(**{**given, "is_causal": True})

    monkeypatch.setattr(attention, "forward", other)
    with pytest.raises(InputError, match=r"LlamaModel does not heed .* in layers 1; set it to"):
        BiEncoder(look_both_ways(model), BOTH)


def test_a_model_and_its_contract_look_the_same_way() -> None:
    with pytest.raises(InputError, match=r"looks both ways .* set backbone\.bidirectional=true"):
        BiEncoder(look_both_ways(_model("qwen3")), Contract())
    with pytest.raises(InputError, match="looks to the left alone, but its contract says"):
        BiEncoder(_model("qwen3"), BOTH)


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    _model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("peft", ["none", "lora", "qlora"])
@pytest.mark.parametrize("name", DECODERS)
def test_it_trains_is_remembered_and_loads_as_plain_transformers_does(
    name: str, peft: str, beir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    base, run_dir = tmp_path / "base", tmp_path / "run"
    _model(name).save_pretrained(base)
    tokenizer.save_pretrained(base)
    given = ["backbone=hf", f"backbone.name={base}", "backbone.bidirectional=true", f"peft={peft}"]
    given += ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    _train(beir, run_dir, *given)
    saved = run_dir / "model"
    assert read_contract(saved)[0].bidirectional
    assert "config.is_causal=False" in (saved / "README.md").read_text()
    plain: Any
    if peft == "none":
        plain = transformers.AutoModel.from_pretrained(saved)  # config.json says it
        assert json.loads((saved / "config.json").read_text())["is_causal"] is False
    else:
        from peft import PeftModel

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


def _train(beir: Path, run_dir: Path, *given: str) -> None:
    """A run on a tiny collection; what shapes the tiny Llama is left out for saved backbones."""
    tiny = [text for text in train_arguments(beir, run_dir) if not text.startswith("backbone.")]
    train_config(compose(ROOT / "conf", "train", [*tiny, *given]))


@pytest.mark.parametrize("peft", [[], ["peft=lora", "peft.rank=2", "peft.alpha=4"]])
def test_what_begins_with_it_looks_both_ways_too(
    peft: list[str], base: Path, beir: Path, tmp_path: Path
) -> None:
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    given = ["backbone=hf", f"backbone.name={base}", "backbone.bidirectional=true"]
    _train(beir, tmp_path / "first", *given, *steps, *peft)
    first = tmp_path / "first" / "model"
    _train(beir, tmp_path / "second", f"init_from={first}", *steps, *peft)
    assert read_contract(tmp_path / "second" / "model")[0].bidirectional
    evaluated = evaluate(beir, tmp_path / "eval", tmp_path / "second" / "model")
    run = tmp_path / "eval" / evaluated["run"]
    reranks = ["stage=reranker", "loss=listwise", f"validation.run={run}", "data.dev_split=test"]
    _train(beir, tmp_path / "third", f"init_from={first}", *reranks, *steps, *peft)
    _train(beir, tmp_path / "fourth", f"init_from={tmp_path / 'third' / 'model'}", *steps, *peft)
    for name in ("third", "fourth"):
        assert read_contract(tmp_path / name / "model")[0].bidirectional
        folder.load(tmp_path / name / "model")
    with pytest.raises(InputError, match="was trained to look both ways"):
        _train(beir, tmp_path / "x", f"init_from={first}", "backbone.bidirectional=false", *peft)


def _adapted(base: Path, tokenizer: Any, to: Path) -> Path:
    """A model folder with an adapter on a base whose own config looks to the left."""
    model = LoRA(rank=2, alpha=4).apply(Pretrained(str(base), bidirectional=True).model(tokenizer))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    folder.save(to, BiEncoder(model, BOTH), tokenizer, BOTH, {})
    return to


def test_an_adapters_folder_never_looks_to_the_left_in_silence(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    saved = _adapted(base, tokenizer, tmp_path / "m")
    assert "is_causal" not in json.loads((base / "config.json").read_text())
    model = folder.load(saved)[0]
    begun = Trained(str(saved), adapter=False, bidirectional=True).model(tokenizer)
    again = BiEncoder(begun, BOTH).eval()
    with torch.no_grad():
        expected = model.embed(pack(TEXTS, 99))
        torch.testing.assert_close(again.embed(pack(TEXTS, 99)), expected)
        moved = model.embed(pack([[5, 6, 7, 8], [5, 6, 7, 9]], 99))
    assert not is_causal(model.backbone)
    assert not torch.equal(moved[0], moved[1])
    for begin in (
        lambda: Trained(str(saved), adapter=True),
        lambda: Pretrained(str(saved)).model(tokenizer),
        lambda: Pretrained(str(saved)).scorer(tokenizer),
    ):
        with pytest.raises(
            InputError, match=r"was trained to look both ways, .* set backbone\.bidirectional=true"
        ):
            begin()


def test_a_folder_from_before_the_setting_looks_to_the_left(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    contract = Contract()
    folder.save(tmp_path / "m", BiEncoder(_model("llama"), contract), tokenizer, contract, {})
    path = tmp_path / "m" / "caravan.json"
    record = json.loads(path.read_text())
    del record["bidirectional"]
    path.write_text(json.dumps(record))
    assert is_causal(folder.load(tmp_path / "m")[0].backbone)


@pytest.mark.parametrize("name", DECODERS)
def test_a_reranker_that_looks_both_ways_scores_as_plain_transformers_does(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    contract = Contract(kind="reranker", bidirectional=True)
    model = CrossEncoder(with_head(look_both_ways(_model(name)), 0), contract).eval()
    folder.save(tmp_path / "m", model, tokenizer, contract, {})
    auto = transformers.AutoModelForSequenceClassification
    plain = auto.from_pretrained(tmp_path / "m").eval()
    loaded = folder.load(tmp_path / "m")[0]
    with torch.no_grad():
        expected = torch.stack([plain(torch.tensor([text])).logits[0, 0] for text in TEXTS])
        for scorer in (model, loaded):
            torch.testing.assert_close(scorer(*_padded(TEXTS, "left")), expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3


def test_recomputed_activations_give_the_same_gradient(base: Path, tokenizer: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        spec = Pretrained(str(base), checkpointing=checkpointing, bidirectional=True)
        model = BiEncoder(spec.model(tokenizer), BOTH).train()
        model(*_padded(TEXTS, "right")).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_a_trial_leaves_a_quantised_base_trainable(base: Path, tokenizer: Any) -> None:
    spec, adapters = Pretrained(str(base), bidirectional=True), LoRA(rank=2, quant_type="nf4")
    spec.quantization = adapters.quantization()
    model = BiEncoder(adapters.apply(spec.model(tokenizer)), BOTH).train()
    assert any(isinstance(layer, Linear4bit) for layer in model.modules())
    model(*_padded(TEXTS, "right")).sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(grad is not None and bool(grad.any()) for grad in grads)


def test_neither_likelihood_nor_adaptation_looks_both_ways(tokenizer: Any) -> None:
    language_model = look_both_ways(tiny_backbone().language_model(tokenizer))
    likelihood = Contract(kind="reranker", scoring="likelihood", append_eos=False)
    with pytest.raises(InputError, match="is no causal language model"):
        QueryLikelihood(language_model, likelihood)
    with pytest.raises(InputError, match=r"contract\.bidirectional is set, but a likelihood"):
        replace(likelihood, bidirectional=True)
    with pytest.raises(InputError, match="does not look to the left alone"):
        SlotEncoder(language_model, language_model.base_model, BOTH, Layout(1, (3, 3), 1))


def test_a_retriever_that_begins_with_an_adapted_model_may_look_both_ways(
    beir: Path, tmp_path: Path
) -> None:
    adapt(beir, tmp_path / "adapted", "stage=adaptation_released", "trainer.max_steps=0")
    begun = [f"init_from={tmp_path / 'adapted' / 'model'}", "backbone.bidirectional=true"]
    lengths = ["contract.query_length=80", "contract.passage_length=90"]
    train(beir, tmp_path / "run", *begun, *lengths, "trainer.max_steps=2")
    model, _, contract, _ = folder.load(tmp_path / "run" / "model")
    assert (contract.pooling, contract.bidirectional) == ("slots", True)
    with torch.no_grad():
        alone = torch.cat([model.embed(pack([text], 99)) for text in TEXTS if len(text) > 8])
        found = model(*_padded([text for text in TEXTS if len(text) > 8], "left", width=40))
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_a_tiny_llama_looks_both_ways(beir: Path, tmp_path: Path) -> None:
    train(beir, tmp_path / "run", "backbone.bidirectional=true", "trainer.max_steps=0")
    assert not is_causal(folder.load(tmp_path / "run" / "model")[0].backbone)
