"""Scores: the same alone, in any batch and as plain transformers and PEFT compute them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_biencoder import ARCHITECTURES, TEXTS, _architecture
from tests.tiny import tiny_backbone

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.models.adapters import LoRA, is_adapter
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.bidirectional import is_causal
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import pack_linears
from caravan.models.crossencoder import CrossEncoder, head_of, with_head

DECODER = Encoding(kind="reranker", query_length=16, passage_length=48)
ENCODER = Encoding(
    kind="reranker",
    pooling="cls",
    pair="pair",
    append_eos=False,
    query_length=16,
    passage_length=48,
)


def _crossencoder(name: str) -> CrossEncoder:
    torch.manual_seed(0)
    backbone = _architecture(name)
    return CrossEncoder(with_head(backbone, 0), DECODER if is_causal(backbone) else ENCODER).eval()


def _alone(model: CrossEncoder, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_score_is_the_same_alone_in_any_chunk_and_under_either_padding(name: str) -> None:
    model = _crossencoder(name)
    with torch.no_grad():
        alone = torch.stack([_alone(model, ids) for ids in TEXTS])
        for budget in (8, 30, 10_000):
            torch.testing.assert_close(model.score(pack(TEXTS, budget)), alone, atol=1e-5, rtol=0)
        width = max(map(len, TEXTS))
        for left in (False, True):
            rows = [
                [0] * (width - len(t)) + t if left else t + [0] * (width - len(t)) for t in TEXTS
            ]
            mask = [[0] * (width - len(t)) + [1] * len(t) for t in TEXTS]
            mask = mask if left else [row[::-1] for row in mask]
            found = model(torch.tensor(rows), torch.tensor(mask))
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    assert alone.std() > 1e-4


def test_a_decoders_folder_scores_as_plain_transformers_does(
    tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = CrossEncoder(tiny_backbone().scorer(tokenizer), DECODER).eval()
    folder.save(tmp_path / "m", model, tokenizer, DECODER, {})
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    loaded, _, encoding, _ = folder.load(tmp_path / "m", kind="reranker")
    ids = [[1, 7, 9, 2], [1, 8, 2]]
    with torch.no_grad():
        for text in ids:
            expected = plain(torch.tensor([text])).logits[0, 0]
            torch.testing.assert_close(_alone(loaded, text), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(_alone(model, text), expected, atol=1e-5, rtol=0)
    assert encoding == DECODER


def test_an_adapters_folder_scores_as_plain_transformers_with_peft_does(
    tokenizer: Any, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = _saved_base(tokenizer, tmp_path / "base")
    torch.manual_seed(1)
    scorer = LoRA(rank=4, alpha=8).apply(Pretrained(str(base)).scorer(tokenizer))
    _shake(scorer)
    model = CrossEncoder(scorer, DECODER).eval()
    folder.save(tmp_path / "m", model, tokenizer, DECODER, {})
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    peft = PeftModel.from_pretrained(plain, tmp_path / "m").eval()
    loaded, *_ = folder.load(tmp_path / "m")
    text = [1, 7, 9, 30, 2]
    with torch.no_grad():
        expected = peft(torch.tensor([text])).logits[0, 0]
        torch.testing.assert_close(_alone(model, text), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(_alone(loaded, text), expected, atol=1e-5, rtol=0)


def test_an_encoders_folder_brings_its_head_back(tmp_path: Path, tokenizer: Any) -> None:
    model = _crossencoder("bert")
    folder.save(tmp_path / "m", model, tokenizer, ENCODER, {})
    loaded, *_ = folder.load(tmp_path / "m")
    with torch.no_grad():
        for text in TEXTS:
            torch.testing.assert_close(_alone(loaded, text), _alone(model, text))
    (tmp_path / "m" / folder.HEAD).unlink()
    with pytest.raises(InputError, match="has no trained head"):
        folder.load(tmp_path / "m")


def test_an_encoder_that_was_released_with_a_head_keeps_it(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    config = _architecture("bert").config
    config.num_labels = 1
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    plain.save_pretrained(tmp_path / "released")
    scorer = Pretrained(str(tmp_path / "released")).scorer(tokenizer)
    model = CrossEncoder(scorer, ENCODER).eval()
    folder.save(tmp_path / "m", model, tokenizer, ENCODER, {})
    loaded, *_ = folder.load(tmp_path / "m")
    types = [[0, 0, 1, 1, 1]]
    ids, mask = torch.tensor([[2, 7, 3, 9, 3]]), torch.ones(1, 5, dtype=torch.int64)
    with torch.no_grad():
        expected = plain(ids, mask, token_type_ids=torch.tensor(types)).logits[:, 0]
        found = loaded(ids, mask, token_types=torch.tensor(types))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_head_of_several_labels_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    config = _architecture("bert").config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="a head of 3 labels; a reranker has one score"):
        Pretrained(str(tmp_path / "m")).scorer(tokenizer)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_laid_out_as_the_released_ones_is_adopted_whole(
    file: str, tokenizer: Any, tmp_path: Path
) -> None:
    released, expected = _released(tokenizer, tmp_path, file)
    spec = Pretrained(str(released))
    model = CrossEncoder(spec.scorer(tokenizer), DECODER).eval()
    text = [1, 7, 9, 30, 2]
    with torch.no_grad():
        torch.testing.assert_close(_alone(model, text), expected(text), atol=1e-5, rtol=0)
    folder.save(tmp_path / "m", model, tokenizer, DECODER, {})
    assert (tmp_path / "m" / "adapter_model.safetensors").is_file()
    loaded, *_ = folder.load(tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(_alone(loaded, text), expected(text), atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", ["no score", "foreign key"])
def test_an_adapter_with_a_weight_missing_or_left_over_is_refused(
    change: str, tokenizer: Any, tmp_path: Path
) -> None:
    released, _ = _released(tokenizer, tmp_path, "adapter_model.safetensors")
    path = released / "adapter_model.safetensors"
    weights = load_file(path)
    if change == "no score":
        del weights["base_model.model.score.weight"]
    else:
        weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(
            4, 32
        )
    save_file(weights, path)
    told = "score.weight missing" if change == "no score" else "layers.9.*not used"
    with pytest.raises(InputError, match=told):
        Pretrained(str(released)).scorer(tokenizer)


def test_pooling_that_the_architecture_cannot_be_scored_by_is_refused() -> None:
    with pytest.raises(InputError, match=r"reads the cls token.*stage=reranker_encoder"):
        CrossEncoder(with_head(_architecture("bert")), DECODER)
    with pytest.raises(InputError, match=r"reads the last token.*stage=reranker$"):
        CrossEncoder(with_head(_architecture("llama")), ENCODER)


def test_a_retriever_is_no_reranker(tokenizer: Any, tmp_path: Path) -> None:
    retriever = BiEncoder(tiny_backbone().model(tokenizer), Encoding())
    folder.save(tmp_path / "m", retriever, tokenizer, Encoding(), {})
    with pytest.raises(InputError, match="is a retriever; give the folder of a reranker"):
        folder.load(tmp_path / "m", kind="reranker")


def test_a_reranker_starts_from_a_retriever_with_a_new_head(tokenizer: Any, tmp_path: Path) -> None:
    retriever = BiEncoder(tiny_backbone().model(tokenizer), Encoding())
    folder.save(tmp_path / "m", retriever, tokenizer, Encoding(), {})
    spec = FromFolder(str(tmp_path / "m"))
    scorer: Any = spec.scorer(tokenizer)
    taken = sum(1 for _ in retriever.backbone.parameters())
    assert spec.told == f"{taken} weights taken from {tmp_path / 'm'}, 1 new (score.weight)"
    wanted = retriever.backbone.state_dict()
    assert all(torch.equal(scorer.model.state_dict()[key], wanted[key]) for key in wanted)
    assert scorer.head_is_new


@pytest.mark.parametrize("kind", ["retriever", "reranker"])
def test_a_merged_adapter_is_trained_on_in_full(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    spec = Pretrained(str(_saved_base(tokenizer, tmp_path / "base")))
    lora = LoRA(rank=4, alpha=8)
    encoding = Encoding(kind=kind)
    model: Any
    if kind == "retriever":
        model = BiEncoder(lora.apply(spec.model(tokenizer)), encoding)
    else:
        model = CrossEncoder(lora.apply(spec.scorer(tokenizer)), encoding)
    folder.save(tmp_path / "m", model, tokenizer, encoding, {})
    merged = FromFolder(str(tmp_path / "m"))
    for begun in (merged.model(tokenizer), merged.scorer(tokenizer)):
        assert all(weight.requires_grad for weight in begun.parameters())


def test_a_retrievers_adapter_goes_on_as_a_rerankers(tokenizer: Any, tmp_path: Path) -> None:
    base = _saved_base(tokenizer, tmp_path / "base")
    lora = LoRA(rank=4, alpha=8)
    adapted = lora.apply(Pretrained(str(base)).model(tokenizer))
    _shake(adapted)
    retriever = BiEncoder(adapted, Encoding()).eval()
    folder.save(tmp_path / "m", retriever, tokenizer, Encoding(), {})
    spec = FromFolder(str(tmp_path / "m"))
    scorer = spec.adapted(lora, spec.scorer(tokenizer))
    model = CrossEncoder(scorer, DECODER).eval()
    ids = torch.tensor([[1, 7, 9, 2]])
    with torch.no_grad():
        wanted = retriever.backbone(ids).last_hidden_state
        found = model.plain.model(ids).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="another rank"):
        spec.adapted(LoRA(rank=8), spec.scorer(tokenizer))


def test_a_rerankers_adapter_goes_on_with_its_head(tokenizer: Any, tmp_path: Path) -> None:
    base = _saved_base(tokenizer, tmp_path / "base")
    lora = LoRA(rank=4, alpha=8)
    adapted = lora.apply(Pretrained(str(base)).scorer(tokenizer))
    _shake(adapted)
    model = CrossEncoder(adapted, DECODER).eval()
    folder.save(tmp_path / "m", model, tokenizer, DECODER, {})
    spec = FromFolder(str(tmp_path / "m"))
    again = CrossEncoder(spec.adapted(lora, spec.scorer(tokenizer)), DECODER).eval()
    with torch.no_grad():
        for text in TEXTS:
            torch.testing.assert_close(_alone(again, text), _alone(model, text))
    stored = len(load_file(tmp_path / "m" / "adapter_model.safetensors"))
    whole = len(load_file(base / "model.safetensors"))
    assert (
        spec.told
        == f"{stored} weights taken from {tmp_path / 'm'} and {whole} from its base " + (str(base))
    )
    assert not getattr(again.plain, "head_is_new", False)
    with pytest.raises(InputError, match="another rank or alpha"):
        spec.adapted(LoRA(rank=4, alpha=16), spec.scorer(tokenizer))


def test_an_adopted_adapter_is_trained_on_and_never_wrapped_twice(
    tokenizer: Any, tmp_path: Path
) -> None:
    released, _ = _released(tokenizer, tmp_path, "adapter_model.safetensors")
    scorer = Pretrained(str(released)).scorer(tokenizer)
    trained = {name for name, p in scorer.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)
    assert any("score" in name for name in trained)
    with pytest.raises(InputError, match="is an adapter already"):
        LoRA(rank=4).apply(scorer)


def test_an_adapter_on_an_encoder_brings_its_head_back(tokenizer: Any, tmp_path: Path) -> None:
    _architecture("bert").save_pretrained(tmp_path / "base")
    scorer = LoRA(rank=4).apply(Pretrained(str(tmp_path / "base")).scorer(tokenizer))
    _shake(scorer)
    model = CrossEncoder(scorer, ENCODER).eval()
    folder.save(tmp_path / "m", model, tokenizer, ENCODER, {})
    loaded, *_ = folder.load(tmp_path / "m")
    with torch.no_grad():
        for text in TEXTS:
            expected = _alone(model, text)
            torch.testing.assert_close(_alone(loaded, text), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "bert", "bert with its own head"])
def test_the_head_stays_float32_in_bf16_and_when_linears_are_packed(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    if name.startswith("bert with"):
        scorer = Pretrained(str(_own_head(tmp_path / "released"))).scorer(tokenizer)
        saved = CrossEncoder(scorer, ENCODER)
    else:
        saved = _crossencoder(name)
    encoding = DECODER if saved.causal else ENCODER
    folder.save(tmp_path / "m", saved, tokenizer, encoding, {})
    model, *_ = folder.load(tmp_path / "m", torch.bfloat16)
    (_, head), (_, wanted) = head_of(model.plain), head_of(saved.plain)
    assert torch.equal(head.weight, wanted.weight)  # and not rounded to bf16
    assert next(model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        pack_linears(model)
        scores = model.score(pack(TEXTS, 40))
        with torch.autocast("cpu", torch.bfloat16):
            autocast = saved.eval().score(pack(TEXTS, 40))
        expected = saved.score(pack(TEXTS, 40))
    for found in (scores, autocast):
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_a_retriever_starts_from_a_reranker_without_its_head(
    tokenizer: Any, tmp_path: Path
) -> None:
    scorer = Pretrained(str(_own_head(tmp_path / "released"))).scorer(tokenizer)
    folder.save(tmp_path / "m", CrossEncoder(scorer, ENCODER), tokenizer, ENCODER, {})
    encoding = Encoding(pooling="mean")
    model = BiEncoder(FromFolder(str(tmp_path / "m")).model(tokenizer), encoding)
    with torch.no_grad():
        assert model.embed(pack(TEXTS, 40)).shape == (len(TEXTS), scorer.config.hidden_size)
    assert not any("pooler" in name or "classifier" in name for name, _ in model.named_parameters())


def test_activations_of_an_encoder_with_a_new_head_can_be_recomputed(
    tokenizer: Any, tmp_path: Path
) -> None:
    _architecture("bert").save_pretrained(tmp_path / "base")
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        spec = Pretrained(str(tmp_path / "base"), checkpointing=checkpointing)
        model = CrossEncoder(spec.scorer(tokenizer), ENCODER)
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == (
            checkpointing
        )
        model.scorer.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.score(pack(TEXTS, 40)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-5, rtol=1e-4)


def test_offline_an_unknown_hub_id_is_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not in the cache is told when the weights are loaded."""
    from huggingface_hub import constants
    from transformers.utils import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    assert not is_adapter("nobody/nothing")


def _own_head(to: Path) -> Path:
    """An encoder released as a cross-encoder, with pooler and classifier."""
    from transformers import AutoModelForSequenceClassification

    config = _architecture("bert").config
    config.num_labels = 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(to)
    return to


def _saved_base(tokenizer: Any, to: Path) -> Path:
    torch.manual_seed(0)
    tiny_backbone().model(tokenizer).save_pretrained(to)  # type: ignore[operator]
    tokenizer.save_pretrained(to)
    return to


def _shake(model: torch.nn.Module) -> None:
    """Give adapters, which begin as nothing, and the head something to do."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def _released(tokenizer: Any, home: Path, file: str) -> tuple[Path, Any]:
    """A SEQ_CLS adapter as castorini released RankLLaMA, and what plain PEFT scores with it."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = _saved_base(tokenizer, home / "base")
    scorer = LoRA(rank=4, alpha=8).apply(Pretrained(str(base)).scorer(tokenizer))
    _shake(scorer)
    released = home / "released"
    scorer.save_pretrained(released)  # type: ignore[operator]
    tokenizer.save_pretrained(released)
    settings = json.loads((released / "adapter_config.json").read_text())
    settings["modules_to_save"] = None
    (released / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(released / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in weights
    if file.endswith(".bin"):
        torch.save(weights, released / file)
        (released / "adapter_model.safetensors").unlink()
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    peft = PeftModel.from_pretrained(plain, released).eval()
    return released, lambda text: peft(torch.tensor([text])).logits[0, 0]
