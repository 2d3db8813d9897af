"""A model folder remembers that its decoder looks both ways: trained, saved, gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from tests.commands import ROOT, evaluate, train, train_arguments, train_config
from tests.models.test_bidirectional import BOTH, DECODERS, _model
from tests.models.test_biencoder import TEXTS, _padded
from tests.training.test_adaptation import adapt

from caravan.cli.compose import compose
from caravan.data.batch import pack
from caravan.encoding import Encoding, read_encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.bidirectional import is_causal, make_bidirectional
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, with_head


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    _model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("name", "peft"),
    [
        pytest.param(name, peft, marks=[] if number % 3 == place else [pytest.mark.slow])
        for number, name in enumerate(DECODERS)
        for place, peft in enumerate(("none", "lora", "qlora"))
    ],
)
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
    assert read_encoding(saved)[0].bidirectional
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
    assert read_encoding(tmp_path / "second" / "model")[0].bidirectional
    evaluated = evaluate(beir, tmp_path / "eval", tmp_path / "second" / "model")
    run = tmp_path / "eval" / evaluated["run"]
    reranks = ["stage=reranker", "loss=listwise", f"validation.run={run}", "data.dev_split=test"]
    _train(beir, tmp_path / "third", f"init_from={first}", *reranks, *steps, *peft)
    _train(beir, tmp_path / "fourth", f"init_from={tmp_path / 'third' / 'model'}", *steps, *peft)
    for name in ("third", "fourth"):
        assert read_encoding(tmp_path / name / "model")[0].bidirectional
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
    begun = FromFolder(str(saved), bidirectional=True).model(tokenizer)
    again = BiEncoder(begun, BOTH).eval()
    with torch.no_grad():
        expected = model.embed(pack(TEXTS, 99))
        torch.testing.assert_close(again.embed(pack(TEXTS, 99)), expected)
        moved = model.embed(pack([[5, 6, 7, 8], [5, 6, 7, 9]], 99))
    assert not is_causal(model.backbone)
    assert not torch.equal(moved[0], moved[1])
    for begin in (
        lambda: FromFolder(str(saved)),
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
    encoding = Encoding()
    folder.save(tmp_path / "m", BiEncoder(_model("llama"), encoding), tokenizer, encoding, {})
    path = tmp_path / "m" / "caravan.json"
    record = json.loads(path.read_text())
    del record["bidirectional"]
    path.write_text(json.dumps(record))
    assert is_causal(folder.load(tmp_path / "m")[0].backbone)


@pytest.mark.parametrize("name", DECODERS)
def test_a_reranker_that_looks_both_ways_scores_as_plain_transformers_does(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    encoding = Encoding(kind="reranker", bidirectional=True)
    model = CrossEncoder(with_head(make_bidirectional(_model(name)), 0), encoding).eval()
    folder.save(tmp_path / "m", model, tokenizer, encoding, {})
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


def test_a_retriever_that_begins_with_an_adapted_model_may_make_bidirectional(
    beir: Path, tmp_path: Path
) -> None:
    adapt(beir, tmp_path / "adapted", "stage=adaptation_released", "trainer.max_steps=0")
    begun = [f"init_from={tmp_path / 'adapted' / 'model'}", "backbone.bidirectional=true"]
    lengths = ["encoding.query_length=80", "encoding.passage_length=90"]
    train(beir, tmp_path / "run", *begun, *lengths, "trainer.max_steps=2")
    model, _, encoding, _ = folder.load(tmp_path / "run" / "model")
    assert (encoding.pooling, encoding.bidirectional) == ("slots", True)
    with torch.no_grad():
        alone = torch.cat([model.embed(pack([text], 99)) for text in TEXTS if len(text) > 8])
        found = model(*_padded([text for text in TEXTS if len(text) > 8], "left", width=40))
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_a_tiny_llama_looks_both_ways(beir: Path, tmp_path: Path) -> None:
    train(beir, tmp_path / "run", "backbone.bidirectional=true", "trainer.max_steps=0")
    assert not is_causal(folder.load(tmp_path / "run" / "model")[0].backbone)
