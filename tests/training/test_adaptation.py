"""Adaptation end to end: it learns, resumes, trains its slots, and a retriever starts from it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.commands import ROOT, curves, from_folder, train, train_arguments
from tests.tiny import tiny_backbone

from caravan.cli.compose import compose
from caravan.cli.inherited import completed
from caravan.cli.train import train as train_config
from caravan.data.batch import AdaptationBatch, pack
from caravan.data.collection import Collection
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding, read_encoding
from caravan.errors import InputError
from caravan.models import folder, llara, output_layer
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.loading import add_slots
from caravan.training.adaptation import Adaptation
from caravan.training.optim import AdamW

PAPER = {"self_prompt": " The original sentence:", "next_prompt": " The next sentence:"}
RELEASED = {
    "self_prompt": '", summarize the above passage within two words: {self}',
    "next_prompt": '", predict the following passage within two words: {next}',
    "targets": "content",
    "tasks": "ebae+ebar+lm",
    "ebae": 0.05,
    "ebar": 0.05,
}
PAPER_ENCODING = Encoding(
    query_template="{text}" + str(PAPER["next_prompt"]),
    passage_template="{title} {text}" + str(PAPER["self_prompt"]),
    query_length=48,
    passage_length=64,
)
RELEASED_ENCODING = Encoding(
    query_template='"{text}' + str(RELEASED["next_prompt"]),
    passage_template='"{title} {text}' + str(RELEASED["self_prompt"]),
    append_eos=False,
    pooling="slots",
    slots=2,
    query_length=64,
    passage_length=96,
)
SMALL = (
    *("stage.words=6", "encoding.query_length=96", "encoding.passage_length=128"),
    *("backbone.layers=1", "backbone.max_length=128"),
)
LORA = ("peft=lora", "peft.rank=2", "peft.alpha=4")


def adapt(beir: Path, run_dir: Path, *overrides: str) -> float | None:
    given = train_arguments(beir, run_dir, "stage=adaptation", *SMALL, *overrides)
    kept = [one for one in given if not one.startswith("sampler.")]
    return train_config(compose(ROOT / "conf", "train", kept))


def _module(tokenizer: Any, released: bool, peft: Any = None, backbone: Any = None) -> Adaptation:
    encoding = RELEASED_ENCODING if released else PAPER_ENCODING
    settings: dict[str, Any] = RELEASED if released else PAPER
    add_slots(tokenizer, encoding)
    parts = (backbone or tiny_backbone(), peft, tokenizer, encoding, AdamW())
    module = Adaptation(*parts, seed=0, words=6, **settings)
    module.configure_model()
    module.log = lambda *_, **__: None  # type: ignore[method-assign, misc, assignment]
    return module


@pytest.fixture
def own_tokenizer(tokenizer: Any) -> Any:
    return copy.deepcopy(tokenizer)


def _published(model: Any, batch: AdaptationBatch, module: Adaptation) -> torch.Tensor:
    """The released code's loss, as a straightforward reading of it: two passes, text by text."""
    first, second = module.layout.prompts
    slots = module.layout.slots
    sets = iter(batch.targets.split(batch.counts.flatten().tolist()))
    losses: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    language: list[torch.Tensor] = []
    rows = [
        row[mask.bool()].tolist()
        for chunk in batch.texts.chunks
        for row, mask in zip(chunk.input_ids, chunk.attention_mask, strict=True)
    ]
    by_text = dict(zip(batch.texts.order.tolist(), rows, strict=True))
    for text in range(len(batch.counts)):
        ids = by_text[text]
        whole = {0: ids[:-second], 1: ids[: -first - second] + ids[-second:]}
        for task in (0, 1):
            logits = model(torch.tensor([whole[task]])).logits[0]
            tokens = next(sets)
            if len(tokens):
                best = logits[-slots:].max(dim=0).values.log_softmax(dim=0)
                losses[task].append(-best[tokens.unique()].mean())
        if module.lm:
            logits = model(torch.tensor([whole[0]])).logits[0].log_softmax(dim=1)
            end = len(ids) - first - second
            language += [-logits[i - 1, ids[i]] for i in range(module.layout.skipped, end)]
    total = sum(
        weight * torch.stack(of_task).mean()
        for weight, of_task in zip(module.weights.values(), losses.values(), strict=True)
    )
    if module.lm:
        total = total + module.lm * torch.stack(language).mean()
    return torch.as_tensor(total)


@pytest.mark.parametrize("released", [False, True])
def test_loss_and_gradient_are_those_of_the_published_formula(
    released: bool, own_tokenizer: Any, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for of in (llara, output_layer):  # of two texts, or of four tokens, at a time
        monkeypatch.setattr(of, "MOST_LOGITS", 4 * 404)
    module = _module(own_tokenizer, released).double()
    batch = module.training_set(collection, "", None, 200)[0, np.arange(12)].packed()
    assert int((batch.counts == 0).sum()) > 0  # documents end
    model = module.network.language_model
    found = module.training_step(batch, 0)
    expected = _published(model, batch, module)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    one, other = torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights)
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)


def test_a_batch_without_targets_gives_zero_and_no_gradient_of_nan(own_tokenizer: Any) -> None:
    module = _module(own_tokenizer, released=False)
    ids, _ = module.templates.encode([("", "camel"), ("", "salt")])
    counts = torch.zeros(2, 2, dtype=torch.int64)
    nothing = AdaptationBatch(pack(ids, 99), torch.zeros(0, dtype=torch.int64), counts)
    loss = module.training_step(nothing, 0)
    loss.backward()
    assert float(loss) == 0
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients
    assert all(not gradient.any() for gradient in gradients)


def test_adapters_train_the_rows_of_the_slots_too_and_nothing_else(own_tokenizer: Any) -> None:
    module = _module(own_tokenizer, released=True, peft=LoRA(rank=2, alpha=4))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = [p for name, p in trained.items() if "lora_" not in name]
    assert [tuple(p.shape) for p in rows] == [(4, 32)]  # two slots a task
    assert not any(p.requires_grad for p in module.network.head.parameters())


@pytest.mark.parametrize("peft", [None, LoRA(rank=2, alpha=4, dropout=0.0)])
def test_a_trained_slot_is_in_the_folder(
    peft: Any, own_tokenizer: Any, collection: Collection, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    module = _module(own_tokenizer, released=True)
    folder.save(base, module.network, own_tokenizer, RELEASED_ENCODING, {"name": "base"})
    if peft is not None:  # on a model of transformers that has never seen a slot
        plain = tmp_path / "plain"
        fresh = tiny_backbone().language_model(own_tokenizer)
        fresh.resize_token_embeddings(400)
        fresh.save_pretrained(plain)
        module = _module(own_tokenizer, True, peft, Pretrained(str(plain)))
    batch = module.training_set(collection, "", None, 200)[0, np.arange(6)].packed()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    module.training_step(batch, 0).backward()
    optimizer.step()
    to = tmp_path / "adapted"
    folder.save(to, module.network, own_tokenizer, RELEASED_ENCODING, {"name": "adapted"})
    loaded, tokenizer, encoding, facts = folder.load(to)
    assert encoding == RELEASED_ENCODING
    assert facts["weights"] == ("full" if peft is None else "adapter")
    texts = pack(Templates(tokenizer, encoding).passages(collection.corpus.get(range(5))), 99)
    with torch.no_grad():
        module.eval()
        expected = module.network.embed(texts)
        torch.testing.assert_close(loaded.embed(texts), expected, atol=1e-5, rtol=0)
        before = folder.load(base)[0].embed(texts)
    assert (before - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("stage", "peft"),
    [
        ("adaptation", ()),
        pytest.param("adaptation_released", LORA, marks=pytest.mark.slow),
    ],
)
def test_a_retriever_inherits_the_prompts_of_the_adapted_model(
    stage: str, peft: tuple[str, ...], beir: Path, tmp_path: Path
) -> None:
    adapt(beir, tmp_path / "adapted", f"stage={stage}", *peft, "trainer.max_steps=2")
    init = from_folder(tmp_path / "adapted" / "model")
    lengths = ("encoding.query_length=80", "encoding.passage_length=90")
    train(beir, tmp_path / "tuned", *init, *lengths, *peft, "trainer.max_steps=1")
    adapted, tuned = (read_encoding(tmp_path / name / "model")[0] for name in ("adapted", "tuned"))
    assert tuned == replace(adapted, query_length=80, passage_length=90)
    assert "original" in tuned.passage_template or tuned.slots == 8
    folder.load(tmp_path / "tuned" / "model")
    prompt = "{text} {self}" if adapted.slots else "{text} The original sentence:"
    cfg = compose(ROOT / "conf", "train", [*init, f"encoding.query_template='{prompt}'"])
    cfg, _ = completed(cfg)
    assert cfg.encoding.query_template == prompt
    assert cfg.encoding.passage_template == adapted.passage_template


def test_a_merged_adapter_with_slots_can_be_trained_further(
    own_tokenizer: Any, tmp_path: Path
) -> None:
    plain = tiny_backbone().language_model(own_tokenizer)  # has never seen a slot
    plain.save_pretrained(tmp_path / "base")
    peft, base = LoRA(rank=2, alpha=4), Pretrained(str(tmp_path / "base"))
    module = _module(own_tokenizer, True, peft, base)
    folder.save(tmp_path / "m", module.network, own_tokenizer, RELEASED_ENCODING, {})
    model: Any = FromFolder(str(tmp_path / "m")).language_model(own_tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == len(own_tokenizer)


def test_unlabelled_text_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"text": "camel salt dune " * n}) + "\n" for n in range(1, 9))
    )
    assert adapt(tmp_path, tmp_path / "run", "data=texts", f"data.path={file}") is None
    folder.load(tmp_path / "run" / "model")


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_weights(beir: Path, tmp_path: Path) -> None:
    released = ("stage=adaptation_released", "encoding.slots=2", "optimizer.schedule=constant")
    settings = (*released, *LORA, "resume=true")
    for name, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        adapt(beir, tmp_path / name, *settings, f"trainer.max_steps={steps}")
    paths = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_it_learns_to_predict_the_tokens_of_a_text(beir: Path, tmp_path: Path) -> None:
    steps = ("trainer.max_steps=60", "trainer.log_every_n_steps=1", "stage.words=12")
    adapt(beir, tmp_path / "run", *steps)
    found = {name: list(values.values()) for name, values in curves(tmp_path / "run").items()}
    assert found.keys() >= {"train/loss", "train/ebae", "train/ebar", "val/MRR@10"}
    for task in ("ebae", "ebar"):
        hits, losses = found[f"train/{task}_hits"], found[f"train/{task}_above_floor"]
        assert np.mean(hits[-9:]) > np.mean(hits[:9]) + 0.04
        assert 0 < np.mean(losses[-9:]) < 0.9 * np.mean(losses[:9])


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("stage.tasks=ebae+mlm", r"stage\.tasks"),
        ("encoding.passage_length=12", "passage"),
        ("encoding.pooling=mean", r"encoding\.pooling"),
        ("encoding.passage_template='{text} in short:'", r"encoding\.passage_template"),
    ],
)
def test_settings_that_cannot_be_adapted_with_are_refused(
    override: str, place: str, beir: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=place):
        adapt(beir, tmp_path / "run", override)
    assert not (tmp_path / "run" / "checkpoints").exists()
