from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from tests.commands import train
from tests.tiny import tiny_backbone
from torch.utils.flop_counter import FlopCounterMode

from caravan.data.batch import pack
from caravan.data.collection import Collection
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import folder, tiny_llama
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained, parameter_counts, prepared
from caravan.models.biencoder import BiEncoder
from caravan.models.checkpointing import Checkpointing, _policy
from caravan.models.hardware import frozen_linears, settle_precisions
from caravan.models.loading import load_weights
from caravan.models.tiny_llama import TinyLlama

PRODUCTS = ("aten.mm", "aten.addmm")


def test_the_bpe_is_trained_once_a_collection(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, trained = tiny_backbone(), []
    train = tiny_llama.train_bpe
    monkeypatch.setattr(
        tiny_llama, "train_bpe", lambda *given: trained.append(given) or train(*given)
    )
    first = backbone.tokenizer(collection, tmp_path)
    again = backbone.tokenizer(collection, tmp_path)
    assert len(trained) == 1
    backbone.tokenizer(replace(collection, digest="f" * 32), tmp_path)
    assert len(trained) == 2
    text = "camel caravan \N{BACTRIAN CAMEL}\n"
    assert first(text)["input_ids"] == again(text)["input_ids"]
    assert first.decode(first(text)["input_ids"], skip_special_tokens=True) == text


def test_weights_are_a_function_of_torchs_seed(tokenizer: object) -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(tiny_backbone().model(tokenizer).state_dict())
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(models[0][name], models[1][name])
    assert not torch.equal(models[0][name], models[2][name])


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def _adapted(model: torch.nn.Module) -> set[str]:
    """Names of the layers that have adapters."""
    found = [name for name, _ in model.named_parameters() if "lora_A" in name]
    return {name.split(".lora_A")[0].rpartition(".")[2] for name in found}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", ATTENTION | MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        (["up_proj"], {"up_proj"}),
    ],
)
def test_lora_trains_adapters_alone(targets: Any, layers: set[str], tokenizer: object) -> None:
    adapters = LoRA(rank=2, alpha=4, targets=targets)
    model = adapters.apply(tiny_backbone().scorer(tokenizer))
    trainable, total = parameter_counts(model)
    assert 0 < trainable < total
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name and "score" not in name} == set()
    assert _adapted(model) == layers


def test_the_layers_of_an_encoder_are_told_apart_where_their_names_are_alike() -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LoRA(rank=2, targets="mlp").apply(transformers.BertModel(config))
    names = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    ends = ("layer.0.intermediate.dense", "layer.0.output.dense")
    assert len(names) == 2
    assert all(name.endswith(ends) and "attention" not in name for name in names)


def test_a_group_that_a_model_lacks_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"peft\.targets=attention: Sequential has no such layers"):
        LoRA(targets="attention").apply(model)


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_variants_of_lora_are_in_the_folder(
    kind: str, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    tiny_backbone().model(tokenizer).save_pretrained(tmp_path / "base")
    base = Pretrained(str(tmp_path / "base"))
    embedded = []
    for settings in ({}, {kind: True}):
        torch.manual_seed(0)
        adapters = LoRA(rank=4, alpha=8, dropout=0.0, **settings)
        model = BiEncoder(adapters.apply(base.model(tokenizer)), encoding).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        to = tmp_path / f"model{len(embedded)}"
        folder.save(to, model, tokenizer, encoding, {"name": kind})
        with torch.no_grad():
            own = model.embed(pack([[5, 6, 7], [8, 9]], 99))
            torch.testing.assert_close(folder.load(to)[0].embed(pack([[5, 6, 7], [8, 9]], 99)), own)
        embedded.append(own)
    assert (embedded[0] - embedded[1]).abs().max() > 1e-4


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_activations_give_the_same_gradient(tokenizer: object, bf16: bool) -> None:
    """Of a batch in two chunks, the second of which finds weights that are cast already."""
    gradients = []
    choices: tuple[Checkpointing, ...] = (False, True, "selective")
    for checkpointing in choices:
        backbone = tiny_backbone()
        backbone.checkpointing = checkpointing
        torch.manual_seed(0)
        model = BiEncoder(backbone.model(tokenizer), Encoding()).train()
        texts = pack([[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]], 8)
        assert len(texts.chunks) == 2
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            embeddings = model.embed(texts)
        (embeddings @ torch.arange(32.0)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            # A chunk's gradient is rounded to bf16 before it is added to the other's, or after.
            far = 0.02 * float(gradient.abs().max()) if bf16 else 1e-5
            torch.testing.assert_close(gradient, other[name], atol=far, rtol=0.02, msg=name)


def test_selective_recomputation_repeats_no_product_with_weights(tokenizer: object) -> None:
    products = []
    choices: tuple[Checkpointing, ...] = (False, "selective", True)
    for checkpointing in choices:
        backbone = tiny_backbone()
        backbone.checkpointing = checkpointing
        model = BiEncoder(backbone.model(tokenizer), Encoding()).train()
        ids = torch.arange(5, 15).reshape(2, 5)
        with FlopCounterMode(display=False) as counter:
            model(ids, torch.ones_like(ids), True).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        products.append(sum(n for operation, n in counts.items() if str(operation) in PRODUCTS))
    assert products[0] == products[1] < 0.85 * products[2]


def test_a_kept_operation_that_draws_is_computed_again() -> None:
    """Else whatever draws after it would draw other numbers in the repetition."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    states = (None, None, None)
    for operation, before in ((flash, states), (efficient, (*states, None, True))):
        for dropout, wanted in ((0.0, "MUST_SAVE"), (0.1, "PREFER_RECOMPUTE")):
            assert _policy(None, operation, *before, dropout).name == wanted
        assert _policy(None, operation, *before).name == "MUST_SAVE"


def test_selective_recomputation_repeats_no_product_of_layers_with_biases() -> None:
    products = []
    choices: tuple[Checkpointing, ...] = (False, "selective", True)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for checkpointing in choices:
        config = transformers.BertConfig(vocab_size=60, intermediate_size=48, **shape)
        model = prepared(
            transformers.BertModel(config, add_pooling_layer=False), checkpointing, False
        )
        with FlopCounterMode(display=False) as counter:
            model.train()(torch.arange(5, 15).view(2, 5)).last_hidden_state.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        products.append(sum(n for operation, n in counts.items() if str(operation) in PRODUCTS))
    assert products[0] == products[1] < 0.85 * products[2]


def test_layers_are_compiled_one_by_one(tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the same gradient, adapters included, which come after."""
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


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of heads=3"):
        TinyLlama(hidden_size=32, heads=3)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_tiny_llama_begins_by_handing_on_a_share_of_what_it_attends_to(
    share: float, tokenizer: Any
) -> None:
    shape = {"vocab_size": 400, "hidden_size": 32, "heads": 2, "intermediate_size": 48}
    model: Any = TinyLlama(**shape, copying=share).model(tokenizer)  # type: ignore[arg-type]
    for layer in model.layers:
        product = layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight
        if share:
            torch.testing.assert_close(product, share * torch.eye(32), atol=1e-5, rtol=0)
        else:
            assert product.abs().max() < 0.05


def test_a_negative_share_is_refused() -> None:
    with pytest.raises(InputError, match=r"backbone\.copying is -1; it must be 0 or more"):
        TinyLlama(copying=-1)


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> Path:
    tiny_backbone().model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_quantised_base_has_four_bits_and_its_adapters_are_float32(
    saved: Path, tokenizer: Any
) -> None:
    plain, quantised = Pretrained(str(saved)), Pretrained(str(saved))
    adapters = LoRA(rank=2, alpha=4, quant_type="nf4")
    quantised.quantization = adapters.quantization()
    model = adapters.apply(quantised.model(tokenizer))
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 14  # seven a block
    assert all(layer.weight.quant_state.quant_type == "nf4" for layer in layers)
    assert all(layer.weight.quant_state.nested for layer in layers)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    of_plain = LoRA(rank=2, alpha=4).apply(plain.model(tokenizer))
    assert parameter_counts(model) == parameter_counts(of_plain)


def test_a_frozen_base_in_bf16_computes_what_it_computed_under_autocast(
    saved: Path, tokenizer: Any
) -> None:
    adapters = LoRA(rank=2, alpha=4, dropout=0.0)
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(adapters.apply(Pretrained(str(saved)).model(tokenizer)))
    settle_precisions(models[1], bf16=True)
    halved = frozen_linears(models[1])
    assert len(halved) == 14  # the base's, in two blocks of seven
    assert {layer.weight.dtype for layer in halved} == {torch.bfloat16}
    trained = [p for p in models[1].parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    ids = torch.tensor([[5, 6, 7, 8]])
    found, gradients = [], []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids).last_hidden_state
        out.square().sum().backward()
        found.append(out)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(*found)
    assert len(gradients[0]) == 28
    assert all(map(torch.equal, *gradients))


def test_random_weights_are_saved_as_they_are_and_so_not_halved(tokenizer: Any) -> None:
    model: Any = LoRA(rank=2, alpha=4).apply(tiny_backbone().model(tokenizer))
    settle_precisions(model, bf16=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_no_file_has_is_not_rounded_with_the_weights(tmp_path: Path) -> None:
    """Gemma's scale of its embeddings: 6.3246 here, and 6.3125 in bf16."""
    shape: dict[str, Any] = {"vocab_size": 60, "hidden_size": 40, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    config = transformers.Gemma3TextConfig(**shape, head_dim=8)
    transformers.Gemma3TextModel(config).bfloat16().save_pretrained(tmp_path)
    buffers = [
        dict(load_weights(str(tmp_path), dtype).named_buffers())
        for dtype in ("auto", torch.float32)
    ]
    assert any("embed_scale" in name for name in buffers[0])
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name]), name


@pytest.mark.parametrize("attention", ["auto", "unpadded"])
def test_a_quantised_base_lets_gradients_pass_after_a_validation(
    attention: str, saved: Path, tokenizer: Any
) -> None:
    """Or after the trial of an attention, which comes before the adapters."""
    base = Pretrained(str(saved), attention=attention)
    adapters = LoRA(rank=2, alpha=4, dropout=0.0, quant_type="nf4")
    base.quantization = adapters.quantization()
    model: Any = adapters.apply(base.model(tokenizer))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model.eval()(input_ids=ids)
    model.train()(input_ids=ids).last_hidden_state[0, -1].square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert any("layers.0" in name for name in grads)
    assert all(grad is not None and bool(grad.any()) for grad in grads.values())


def test_random_weights_are_not_quantised(beir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only saved weights are quantised"):
        train(beir, tmp_path / "run", "peft=qlora")
