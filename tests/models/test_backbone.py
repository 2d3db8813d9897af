from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from tests.models.small import TEXTS, close, model_of, padded, saved_base, shaken
from tests.refusals import refused
from tests.tiny import tiny_backbone
from torch.utils._python_dispatch import TorchDispatchMode

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import BaseBackbone, FromFolder, Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder
from caravan.models.hardware import frozen_linears, parameter_counts, settle_precisions
from caravan.models.loading import load_weights

SCORES = Encoding(kind="reranker", query_length=16, passage_length=48)
LORA = LoRA(rank=4, alpha=8, dropout=0.0)


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> str:
    return str(saved_base(tokenizer, tmp_path / "base"))


def _saved(kind: str, base: str, tokenizer: Any, to: Path, peft: LoRA | None) -> Any:
    """A model folder of a kind, with an adapter or without; the model."""
    spec, encoding = Pretrained(base), Encoding(kind=kind, query_length=16, passage_length=48)
    torch.manual_seed(1)
    transformer = spec.model(tokenizer) if kind == "retriever" else spec.scorer(tokenizer)
    transformer = transformer if peft is None else shaken(peft.apply(transformer))
    model: Any = (BiEncoder if kind == "retriever" else CrossEncoder)(transformer, encoding)
    folder.save(to, model.eval(), tokenizer, encoding, {})
    return model


def _from_folder(path: Path, peft: LoRA | None = None) -> FromFolder:
    spec = FromFolder(str(path))
    spec.use_adapters(peft)
    return spec


def test_a_reranker_starts_from_a_retriever_with_a_new_head(
    base: str, tokenizer: Any, tmp_path: Path
) -> None:
    retriever = _saved("retriever", base, tokenizer, tmp_path / "m", None)
    spec = _from_folder(tmp_path / "m")
    scorer: Any = spec.scorer(tokenizer)
    assert spec.head_is_new
    wanted = retriever.backbone.state_dict()
    assert all(torch.equal(scorer.model.state_dict()[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["retriever", "reranker"])
def test_a_merged_adapter_is_trained_in_full(
    kind: str, base: str, tokenizer: Any, tmp_path: Path
) -> None:
    _saved(kind, base, tokenizer, tmp_path / "m", LORA)
    merged = _from_folder(tmp_path / "m")
    for transformer in (merged.model(tokenizer), merged.scorer(tokenizer)):
        assert all(weight.requires_grad for weight in transformer.parameters())


def test_a_retrievers_adapter_starts_a_rerankers(base: str, tokenizer: Any, tmp_path: Path) -> None:
    retriever = _saved("retriever", base, tokenizer, tmp_path / "m", LORA)
    spec = _from_folder(tmp_path / "m", LORA)
    model = CrossEncoder(spec.adapted(LORA, spec.scorer(tokenizer)), SCORES).eval()
    ids = torch.tensor([[1, 7, 9, 2]])
    with torch.no_grad():
        wanted = retriever.backbone(ids).last_hidden_state
        close(model.plain.model(ids).last_hidden_state, wanted)
    for other in (LoRA(rank=8), LoRA(rank=4, alpha=16), LoRA(rank=4, targets=["up_proj"])):
        with refused("adapter-mismatch", str(tmp_path / "m"), "peft.rank"):
            spec.adapted(other, spec.scorer(tokenizer))


def test_a_rerankers_adapter_continues_with_its_head(
    base: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = _saved("reranker", base, tokenizer, tmp_path / "m", LORA)
    spec = _from_folder(tmp_path / "m", LORA)
    again = CrossEncoder(spec.adapted(LORA, spec.scorer(tokenizer)), SCORES).eval()
    with torch.no_grad():
        close(again(*padded(TEXTS, "right")), model(*padded(TEXTS, "right")))
    assert not spec.head_is_new


def test_qlora_continues_adapters_and_full_retrievers_only(
    base: str, tokenizer: Any, tmp_path: Path
) -> None:
    qlora = LoRA(rank=4, alpha=8, quant_type="nf4")
    for kind, peft in (("retriever", LORA), ("reranker", LORA), ("retriever", None)):
        to = tmp_path / f"{kind}-{peft is None}"
        _saved(kind, base, tokenizer, to, peft)
        spec = _from_folder(to, qlora)
        loaded = spec.model(tokenizer) if kind == "retriever" else spec.scorer(tokenizer)
        assert any(isinstance(layer, Linear4bit) for layer in loaded.modules())
    _saved("reranker", base, tokenizer, tmp_path / "full", None)
    with refused("not-quantizable", "peft=qlora", str(tmp_path / "full")):
        _from_folder(tmp_path / "full", qlora).scorer(tokenizer)
    with refused("not-quantizable", "tiny_llama"):
        tiny_backbone().use_adapters(qlora)


def test_a_backbone_without_a_language_model_is_refused_by_name() -> None:
    with refused("no-language-model", "backbone=mine"):
        BaseBackbone("mine").language_model(None)


@pytest.mark.slow
def test_layers_are_compiled_one_by_one(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the same gradient with adapters, which are added later."""
    compiled = []
    compile_module = torch.nn.Module.compile

    def eagerly(module: torch.nn.Module, **settings: Any) -> None:
        compiled.append(module)
        compile_module(module, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    gradients = []
    for compile in (False, True):
        backbone = tiny_backbone()
        backbone.compile = compile
        torch.manual_seed(0)
        model = BiEncoder(LoRA(rank=4).apply(backbone.model(tokenizer)), Encoding()).train()
        for length in (5, 3):
            ids = torch.arange(5, 5 + 2 * length).reshape(2, length)
            model(ids, torch.ones_like(ids), True).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert [type(module).__name__ for module in compiled] == ["LlamaDecoderLayer"] * 2
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_a_quantized_base_has_four_bits_and_its_adapters_are_float32(
    base: str, tokenizer: Any
) -> None:
    qlora = LoRA(rank=2, alpha=4, quant_type="nf4")
    spec = Pretrained(base)
    spec.use_adapters(qlora)
    model = qlora.apply(spec.model(tokenizer))
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 14  # seven a block
    assert {layer.weight.quant_state.quant_type for layer in layers} == {"nf4"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    plain = LoRA(rank=2, alpha=4).apply(Pretrained(base).model(tokenizer))
    assert parameter_counts(model) == parameter_counts(plain)


@pytest.mark.parametrize("given", [{}, {"attention": "unpadded"}])
def test_a_quantized_base_passes_gradients_after_a_validation(
    given: dict[str, Any], base: str, tokenizer: Any
) -> None:
    qlora = LoRA(rank=2, alpha=4, dropout=0.0, quant_type="nf4")
    spec = Pretrained(base, **given)
    spec.use_adapters(qlora)
    model = BiEncoder(qlora.apply(spec.model(tokenizer)), Encoding())
    with torch.no_grad():
        model.eval().embed(pack([[5, 6, 7, 8]], 99))
    model.train().embed(pack([[5, 6, 7, 8]], 99)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert any("layers.0" in name for name in grads)
    assert all(grad is not None and bool(grad.any()) for grad in grads.values())


class _Operations(TorchDispatchMode):
    """Counts the operations that are dispatched."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_a_frozen_base_in_bf16_computes_what_it_computed_under_autocast(
    base: str, tokenizer: Any
) -> None:
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(LORA.apply(Pretrained(base).model(tokenizer)))
    settle_precisions(models[1], bf16=True)
    halved = frozen_linears(models[1])
    assert len(halved) == 14  # the base's, in two blocks of seven
    assert {layer.weight.dtype for layer in halved} == {torch.bfloat16}
    assert {p.dtype for p in models[1].parameters() if p.requires_grad} == {torch.float32}
    ids = torch.tensor([[5, 6, 7, 8]])
    found, gradients, copies = [], [], []
    for model in models:
        counted = Counter[str]()
        with torch.autocast("cpu", torch.bfloat16), _Operations(counted):
            out = model(input_ids=ids).last_hidden_state
        copies.append(counted["aten._to_copy.default"])
        out.square().sum().backward()
        found.append(out)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(*found)
    assert copies[1] < copies[0] - 14  # fewer than without the copies of the base's weights
    assert len(gradients[0]) == 28
    assert all(map(torch.equal, *gradients))
    unsaved = LORA.apply(tiny_backbone().model(tokenizer))  # it is saved with its base, merged
    settle_precisions(unsaved, bf16=True)
    assert {p.dtype for p in unsaved.parameters()} == {torch.float32}


@pytest.mark.parametrize("rows", [(), (5, 7)])
def test_frozen_norms_and_embeddings_in_bf16_train_the_same_up_to_rounding(
    base: str, tokenizer: Any, rows: tuple[int, ...]
) -> None:
    found, gradients = [], []
    for bf16, bf16_norms in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model: Any = shaken(LORA.apply(Pretrained(base).model(tokenizer), rows))
        settle_precisions(model, bf16, bf16_norms)
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16} or not bf16_norms
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(input_ids=torch.tensor([[5, 6, 7, 8]])).last_hidden_state
        # Of four dimensions: after the last norm, the length of a state hardly depends on anything.
        out[..., :4].float().square().sum().backward()
        found.append(out.float())
        each = [p.grad for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat([gradient.flatten() for gradient in each]))
    assert len(gradients[0]) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for exact, default, rounded in (found, gradients):
        by_default, by_rounding = (float((one - exact).norm()) for one in (default, rounded))
        assert by_default < by_rounding < 4 * by_default < 0.1 * float(exact.norm())


def test_norms_in_bf16_need_a_frozen_base_that_is_stored(base: str, tokenizer: Any) -> None:
    unsaved = LORA.apply(tiny_backbone().model(tokenizer))
    for model in (unsaved, Pretrained(base).model(tokenizer)):
        with refused("no-frozen-base", "peft.bf16_norms"):
            settle_precisions(model, bf16=True, bf16_norms=True)


def test_a_buffer_that_no_file_has_is_not_rounded(tmp_path: Path) -> None:
    """Gemma's scale of its embeddings: 6.3246 here, and 6.3125 in bf16."""
    model_of("gemma3_text", hidden_size=40).bfloat16().save_pretrained(tmp_path)
    buffers = [
        dict(load_weights(str(tmp_path), dtype).named_buffers())
        for dtype in ("auto", torch.float32)
    ]
    assert any("embed_scale" in name for name in buffers[0])
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name]), name


def test_a_model_that_cannot_recompute_is_refused() -> None:
    class Old(transformers.LlamaModel):
        def gradient_checkpointing_enable(self) -> None:  # type: ignore[override]
            """As remote code of older transformers has it."""

    model = Old(model_of("llama").config)
    with refused("no-checkpointing", "Old"):
        BaseBackbone("old", checkpointing=True).prepared(model)
