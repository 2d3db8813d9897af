"""Adaptation end to end: it learns, resumes, trains its slots, and hands its prompts on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.commands import ROOT, train
from tests.tiny import tiny_backbone

from caravan.cli.compose import compose
from caravan.cli.train import train as train_config
from caravan.data.batch import AdaptationBatch, pack
from caravan.data.collection import Collection
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding, read_encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained, Trained
from caravan.models.loading import add_slots
from caravan.models.query_likelihood import QueryLikelihood
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
PAPER_CONTRACT = Encoding(
    query_template="{text}" + str(PAPER["next_prompt"]),
    passage_template="{title} {text}" + str(PAPER["self_prompt"]),
    query_length=48,
    passage_length=64,
)
RELEASED_CONTRACT = Encoding(
    query_template='"{text}' + str(RELEASED["next_prompt"]),
    passage_template='"{title} {text}' + str(RELEASED["self_prompt"]),
    append_eos=False,
    pooling="slots",
    slots=2,
    query_length=64,
    passage_length=96,
)
SMALL = [
    *("stage.words=6", "encoding.query_length=96", "encoding.passage_length=128"),
    *("backbone.hidden_size=32", "backbone.heads=2", "backbone.intermediate_size=48"),
    *("backbone.vocab_size=400", "backbone.layers=1", "backbone.max_length=128"),
    *("batching.queries_per_batch=6", "batching.num_workers=0", "optimizer.lr=1e-2"),
    "optimizer.warmup_steps=2",
    *("trainer.max_epochs=20", "trainer.max_steps=8", "trainer.val_check_interval=4"),
    *("trainer.accelerator=cpu", "callbacks.progress=null", "precision=float32"),
]


def adapt(beir: Path, run_dir: Path, *overrides: str) -> Any:
    data = (
        []
        if any(text.startswith("data=") for text in overrides)
        else ["data=beir", f"data.path={beir}"]
    )
    cfg = compose(
        ROOT / "conf",
        "train",
        [
            *([] if any(text.startswith("stage=") for text in overrides) else ["stage=adaptation"]),
            *data,
            f"run_dir={run_dir}",
            f"cache_dir={run_dir.parent / 'cache'}",
            *SMALL,
            *overrides,
        ],
    )
    return train_config(cfg)


def _module(tokenizer: Any, released: bool, peft: Any = None) -> Adaptation:
    encoding = RELEASED_CONTRACT if released else PAPER_CONTRACT
    settings: dict[str, Any] = RELEASED if released else PAPER
    add_slots(tokenizer, encoding)
    module = Adaptation(
        tiny_backbone(), peft, tokenizer, encoding, AdamW(), seed=0, words=6, **settings
    )
    module.configure_model()
    module.log = lambda *_, **__: None  # type: ignore[method-assign, misc, assignment]
    return module


@pytest.fixture
def own_tokenizer(tokenizer: Any) -> Any:
    import copy

    return copy.deepcopy(tokenizer)


def _published(model: Any, batch: AdaptationBatch, module: Adaptation) -> torch.Tensor:
    """The released code's loss, as a straightforward reading of it: two passes, text by text."""
    first, second = module.layout.prompts
    slots = module.layout.slots
    sets = iter(batch.targets.split(batch.counts.flatten().tolist()))
    told: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    language: list[torch.Tensor] = []
    order = batch.texts.order.tolist()
    by_text: dict[int, list[int]] = {}
    rows = [
        row[mask.bool()].tolist()
        for chunk in batch.texts.chunks
        for row, mask in zip(chunk.input_ids, chunk.attention_mask, strict=True)
    ]
    for at, row in zip(order, rows, strict=True):
        by_text[at] = row
    for text in range(len(batch.counts)):
        ids = by_text[text]
        whole = {0: ids[:-second], 1: ids[: -first - second] + ids[-second:]}
        for task in (0, 1):
            logits = model(torch.tensor([whole[task]])).logits[0]
            tokens = next(sets)
            if len(tokens):
                best = logits[-slots:].max(dim=0).values.log_softmax(dim=0)
                told[task].append(-best[tokens.unique()].mean())
        if module.lm:
            logits = model(torch.tensor([whole[0]])).logits[0].log_softmax(dim=1)
            end = len(ids) - first - second
            language += [-logits[i - 1, ids[i]] for i in range(module.layout.skipped, end)]
    total = sum(
        weight * torch.stack(losses).mean()
        for weight, losses in zip(module.weights.values(), told.values(), strict=True)
    )
    if module.lm:
        total = total + module.lm * torch.stack(language).mean()
    return torch.as_tensor(total)


@pytest.mark.parametrize("released", [False, True])
def test_loss_and_gradient_are_those_of_the_published_formula(
    released: bool, own_tokenizer: Any, collection: Collection
) -> None:
    module = _module(own_tokenizer, released).double()
    batch = module.training_set(collection, "", None, 200)[0, np.arange(12)].packed()
    assert int((batch.counts == 0).sum()) > 0  # documents end
    model = module.model.language_model
    found = module.training_step(batch, 0)
    expected = _published(model, batch, module)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    one, other = torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights)
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)


def test_a_batch_without_anything_to_tell_gives_no_gradient_of_nan(own_tokenizer: Any) -> None:
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


def test_adapters_come_with_the_rows_of_the_slots_and_nothing_else(own_tokenizer: Any) -> None:
    module = _module(own_tokenizer, released=True, peft=LoRA(rank=2, alpha=4))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = [p for name, p in trained.items() if "lora_" not in name]
    assert [tuple(p.shape) for p in rows] == [(4, 32)]  # two slots a task
    assert not any(p.requires_grad for p in module.model.head.parameters())


@pytest.mark.parametrize("peft", [None, LoRA(rank=2, alpha=4, dropout=0.0)])
def test_a_trained_slot_is_in_the_folder(
    peft: Any, own_tokenizer: Any, collection: Collection, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    module = _module(own_tokenizer, released=True)
    folder.save(base, module.model, own_tokenizer, RELEASED_CONTRACT, {"name": "base"})
    if peft is not None:  # on a model of transformers that has never seen a slot
        plain = tmp_path / "plain"
        fresh = tiny_backbone().language_model(own_tokenizer)
        fresh.resize_token_embeddings(400)
        fresh.save_pretrained(plain)
        module = Adaptation(
            *(Pretrained(str(plain)), peft, own_tokenizer, RELEASED_CONTRACT, AdamW(), 0),
            words=6,
            **RELEASED,
        )
        module.configure_model()
        module.log = lambda *_, **__: None  # type: ignore[method-assign, misc, assignment]
    batch = module.training_set(collection, "", None, 200)[0, np.arange(6)].packed()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    module.training_step(batch, 0).backward()
    optimizer.step()
    to = tmp_path / "adapted"
    folder.save(to, module.model, own_tokenizer, RELEASED_CONTRACT, {"name": "adapted"})
    loaded, tokenizer, encoding, facts = folder.load(to)
    assert encoding == RELEASED_CONTRACT
    assert facts["weights"] == ("full" if peft is None else "adapter")
    texts = pack(Templates(tokenizer, encoding).passages(collection.corpus.get(range(5))), 99)
    with torch.no_grad():
        module.eval()
        expected = module.model.embed(texts)
        torch.testing.assert_close(loaded.embed(texts), expected, atol=1e-5, rtol=0)
        before = folder.load(base)[0].embed(texts)
    assert (before - expected).abs().max() > 1e-3


@pytest.mark.parametrize("peft", [(), ("peft=lora", "peft.rank=2", "peft.alpha=4")])
@pytest.mark.parametrize("stage", ["adaptation", "adaptation_released"])
def test_a_retriever_begins_with_the_prompts_of_the_adapted_model(
    stage: str, peft: tuple[str, ...], beir: Path, tmp_path: Path
) -> None:
    adapt(beir, tmp_path / "adapted", f"stage={stage}", *peft)
    adapted = read_encoding(tmp_path / "adapted" / "model")[0]
    train(
        beir,
        tmp_path / "tuned",
        f"init_from={tmp_path / 'adapted' / 'model'}",
        "encoding.query_length=80",
        "encoding.passage_length=90",
        *peft,
    )
    tuned = read_encoding(tmp_path / "tuned" / "model")[0]
    lengths = {"query_length": 80, "passage_length": 90}
    assert tuned == replace(adapted, **lengths)
    assert "original" in tuned.passage_template or tuned.slots == 8
    folder.load(tmp_path / "tuned" / "model")


@pytest.mark.parametrize("stage", ["adaptation_released", "reranker_likelihood"])
def test_a_merged_adapter_with_slots_is_trained_on(
    stage: str, own_tokenizer: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    plain = tiny_backbone().language_model(own_tokenizer)  # has never seen a slot
    plain.save_pretrained(base)
    add_slots(own_tokenizer, RELEASED_CONTRACT)
    module = Adaptation(
        *(Pretrained(str(base)), LoRA(rank=2, alpha=4), own_tokenizer, RELEASED_CONTRACT),
        *(AdamW(), 0),
        **RELEASED,
    )
    module.configure_model()
    folder.save(tmp_path / "m", module.model, own_tokenizer, RELEASED_CONTRACT, {})
    begun = Trained(str(tmp_path / "m"), adapter=False)
    model: Any = begun.language_model(own_tokenizer)
    encoding = RELEASED_CONTRACT
    if stage == "reranker_likelihood":
        encoding = Encoding(
            kind="reranker", scoring="likelihood", append_eos=False, query_length=16
        )
        scorer = QueryLikelihood(model, encoding)
        folder.save(tmp_path / "s", scorer, own_tokenizer, encoding, {})
        pairs = pack([[5, 6, 7, 8, 9], [5, 6, 7]], 99, 0, [2, 1])
        with torch.no_grad():
            found = folder.load(tmp_path / "s")[0].score(pairs)
            torch.testing.assert_close(found, scorer.eval().score(pairs))
    assert model.get_input_embeddings().weight.shape[0] == len(own_tokenizer)


def test_prompts_are_chosen_by_setting(beir: Path, tmp_path: Path) -> None:
    adapt(beir, tmp_path / "adapted")
    cfg = compose(
        ROOT / "conf",
        "train",
        [
            f"init_from={tmp_path / 'adapted' / 'model'}",
            "encoding.query_template='{text} The original sentence:'",
        ],
    )
    assert cfg.encoding.query_template == "{text} The original sentence:"
    assert cfg.encoding.passage_template == "{title} {text} The original sentence:"


def test_text_alone_will_do(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"text": "camel salt dune " * n}) + "\n" for n in range(1, 9))
    )
    assert adapt(tmp_path, tmp_path / "run", "data=texts", f"data.path={file}") is None
    folder.load(tmp_path / "run" / "model")


def test_a_resumed_run_gives_the_same_weights(beir: Path, tmp_path: Path) -> None:
    weights = []
    for name, steps in (("whole", (8,)), ("parts", (4, 8))):
        for step in steps:
            adapt(
                beir,
                tmp_path / name,
                *("peft=lora", "peft.rank=2", "peft.alpha=4", "stage=adaptation_released"),
                *(f"trainer.max_steps={step}", "resume=true", "optimizer.schedule=constant"),
                "encoding.slots=2",
            )
        path = tmp_path / name / "model" / "model.safetensors"
        weights.append(path.read_bytes())
    assert weights[0] == weights[1]


def test_it_learns_to_tell_what_a_text_is_about(beir: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = ("trainer.max_steps=60", "trainer.log_every_n_steps=1", "stage.words=12")
    adapt(beir, tmp_path / "run", *steps)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    wanted = {
        f"train/{task}{what}" for task in ("ebae", "ebar") for what in ("", "_above_floor", "_hits")
    }
    assert names >= wanted | {"train/loss", "val/MRR@10"}
    for task in ("ebae", "ebar"):
        hits = [event.value for event in events.Scalars(f"train/{task}_hits")]
        assert np.mean(hits[-9:]) > np.mean(hits[:9]) + 0.04
        losses = [event.value for event in events.Scalars(f"train/{task}_above_floor")]
        assert 0 < np.mean(losses[-9:]) < 0.9 * np.mean(losses[:9])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stage.ebae=-1", r"stage\.ebae is -1.*must be above 0"),
        ("stage.ebar=inf", r"stage\.ebar is inf.*finite"),
        ("stage.tasks=ebae+mlm", "some of ebae, ebar and lm"),
        ("stage.targets=some", "must be one of all, content"),
        ("encoding.passage_length=12", "leaves no room for text"),
        ("encoding.pooling=mean", "read at its slots: set it to last"),
        ("encoding.passage_template='{text} in short:'", "ends with neither stage.self_prompt"),
    ],
)
def test_what_cannot_be_adapted_is_told(
    override: str, told: str, beir: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told):
        adapt(beir, tmp_path / "run", override)
