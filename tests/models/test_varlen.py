from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.small import TEXTS, close, model_of, padded
from tests.refusals import refused
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from caravan.data.batch import Packed, pack
from caravan.encoding import Encoding
from caravan.models import varlen
from caravan.models.backbone import Pretrained
from caravan.models.bidirectional import make_bidirectional
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, with_head
from caravan.models.loading import set_attention
from caravan.retrieval.inference import Inference

CPU = torch.device("cpu")


def embedded(backbone: Any, texts: Packed, pooling: str = "last", **settings: Any) -> Tensor:
    with torch.no_grad():
        return BiEncoder(backbone, Encoding(pooling=pooling, **settings)).embed(texts)


@pytest.mark.parametrize("name", sorted(varlen.ARCHITECTURES))
def test_every_accepted_architecture_embeds_as_each_text_alone(name: str) -> None:
    """Windows of 8 tokens and texts of up to 19; two texts of equal length are one product."""
    texts = [*TEXTS, [40, 41, 42], list(range(50, 69))]
    backbone = model_of(name)
    alone = torch.cat([embedded(backbone, pack([text], 100), "mean") for text in texts])
    set_attention(backbone, "unpadded")
    close(embedded(backbone, pack(texts, 1000), "mean"), alone)


@pytest.mark.parametrize("name", ["roberta", "mamba", "phimoe", "stablelm", "gemma2"])
def test_another_architecture_is_refused_by_name(name: str) -> None:
    with refused("attention-not-supported", "attention=unpadded", f"({name})"):
        set_attention(model_of(name), "unpadded")


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_bidirectional_decoder_attends_within_its_text(name: str) -> None:
    backbone = make_bidirectional(model_of(name))
    alone = torch.cat([embedded(backbone, pack([t], 99), bidirectional=True) for t in TEXTS])
    set_attention(backbone, "unpadded")
    close(embedded(backbone, pack(TEXTS, 1000), bidirectional=True), alone)


def test_padding_on_either_side_and_empty_texts_disturb_no_other() -> None:
    backbone = model_of("qwen3")
    expected = embedded(backbone, pack(TEXTS, 1000))
    set_attention(backbone, "unpadded")
    close(embedded(backbone, pack([[], *TEXTS], 1000))[1:], expected)
    with torch.no_grad():
        for side in ("left", "right"):
            close(BiEncoder(backbone, Encoding())(*padded(TEXTS, side)), expected)
    rounded = embedded(backbone.bfloat16(), pack(TEXTS, 1000))
    assert (rounded * expected).sum(dim=1).min() > 0.998


def test_linear_layers_compute_real_tokens_only() -> None:
    backbone: Any = set_attention(model_of("qwen3"), "unpadded")
    seen: list[int] = []
    backbone.layers[0].mlp.register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel()))
    embedded(backbone, pack(TEXTS, 1000))
    assert sum(seen) == sum(map(len, TEXTS)) * backbone.config.hidden_size


def test_gradients_equal_those_of_padded_texts(tmp_path: Path) -> None:
    """With and without checkpointing."""
    tokens = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [16, 17]]
    model_of("qwen3").save_pretrained(tmp_path)
    gradients = []
    for attention, checkpointing in itertools.product(("sdpa", "unpadded"), (False, True)):
        spec = Pretrained(str(tmp_path), attention=attention, checkpointing=checkpointing)
        model = BiEncoder(spec.model(None), Encoding()).train()
        (model.embed(pack(tokens, 1000)) @ torch.arange(32.0)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        assert len(other) == len(gradients[0]) > 10
        for found, expected in zip(other, gradients[0], strict=True):
            close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_pairs_get_the_scores_of_padded_ones(name: str) -> None:
    encoding = Encoding(kind="reranker", pooling="cls" if name == "bert" else "last")
    texts = pack(TEXTS, 1000, seconds=[1] * len(TEXTS) if name == "bert" else None)
    scorer = with_head(model_of(name), 0)
    with torch.no_grad():
        expected = CrossEncoder(scorer, encoding).score(texts)
        set_attention(scorer, "unpadded")
        close(CrossEncoder(scorer, encoding).score(texts), expected)
    assert varlen.is_enabled(getattr(scorer, scorer.base_model_prefix))


def test_dropout_of_attention_weights_is_refused_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "has_kernel", lambda states: True)
    backbone = set_attention(model_of("bert"), "unpadded").bfloat16()
    varlen.try_out(BiEncoder(set_attention(model_of("bert"), "sdpa"), Encoding()), CPU)
    with refused("attention-not-supported", "BertSelfAttention", "backbone.attention=auto"):
        embedded(backbone.train(), pack(TEXTS, 1000))


def test_a_custom_mask_is_computed_as_sdpa_does() -> None:
    backbone: Any = set_attention(model_of("qwen3"), "sdpa")
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., 4:, 1:3] = False
    given = {"input_ids": torch.arange(5, 11)[None], "attention_mask": mask}
    with torch.no_grad():
        expected = backbone(**given).last_hidden_state
        set_attention(backbone, "unpadded")
        close(backbone(**given).last_hidden_state, expected)


def test_a_gpu_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen.kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    monkeypatch.setattr(varlen, "has_kernel", lambda states: True)
    backbone: Any = set_attention(model_of("qwen3"), "unpadded")
    varlen.try_out(BiEncoder(backbone, Encoding()), CPU)  # float32 needs no kernel
    with refused("attention-not-supported", "PyTorch"):
        varlen.try_out(BiEncoder(backbone.bfloat16(), Encoding()), CPU)
    varlen.kernel.cache_clear()


@pytest.mark.parametrize("fault", [None, "no kernel image", "mixes texts", "NaN"])
def test_a_folder_is_tried_on_the_device_and_in_the_precision_of_the_run(
    fault: str | None, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has a kernel, which only bf16 uses."""

    def of_device(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, **given: Any) -> Tensor:
        if fault == "no kernel image":
            raise RuntimeError(fault)
        edges = [0, len(q)] if fault == "mixes texts" else bounds.tolist()
        parts = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in itertools.pairwise(edges)]
        found = [sdpa(*part, is_causal=True, scale=given["scale"]) for part in parts]
        return torch.cat(found, dim=1).transpose(0, 1) * (torch.nan if fault == "NaN" else 1)

    def to(model: BiEncoder, device: torch.device) -> BiEncoder:
        monkeypatch.setattr(varlen, "has_kernel", lambda states: True)
        return model

    monkeypatch.setattr(BiEncoder, "to", to)
    monkeypatch.setattr(varlen, "kernel", lambda: of_device)
    opened = {
        precision: Inference(folders["retriever"], precision=precision, attention="unpadded")
        for precision in ("float32", "bf16")
    }
    opened["float32"].load()
    if fault is None:
        opened["bf16"].load()
    else:
        reason = "differ" if fault in ("mixes texts", "NaN") else fault
        with refused("attention-not-supported", "on cpu", reason, "attention=auto"):
            opened["bf16"].load()


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("window", [(-1, 0), (3, 0), (3, 3), (-1, -1)])
def test_the_kernel_is_called_for_what_sdpa_computes(
    window: tuple[int, int], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is replaced by float64 loops over the documented meaning of its arguments."""
    torch.manual_seed(0)
    shapes = [(9, 4, 8), (9, heads, 8), (9, heads, 8)]
    query, key, value = (torch.randn(shape).bfloat16() for shape in shapes)
    bounds = torch.tensor([0, 6, 9], dtype=torch.int32)

    def exact(q: Tensor, k: Tensor, v: Tensor, *given: Any, **settings: Any) -> Tensor:
        assert given[0] is given[1] is bounds
        assert given[2:] == (6, 6)
        assert settings["enable_gqa"] == (heads == 2)
        left, right = settings["window_size"]
        out = torch.zeros(q.shape, dtype=torch.float64)
        for start, end in itertools.pairwise(bounds.tolist()):
            for i, h in itertools.product(range(start, end), range(4)):
                low = start if left < 0 else max(start, i - left)
                high = end if right < 0 else min(end, i + right + 1)
                shared = h * heads // 4
                scores = k[low:high, shared].double() @ q[i, h].double() * settings["scale"]
                out[i, h] = scores.softmax(0) @ v[low:high, shared].double()
        return out.float()

    monkeypatch.setattr(varlen, "kernel", lambda: exact)
    module = torch.nn.Module()
    module.is_causal = window[1] == 0
    module.num_key_value_groups = 4 // heads
    reach = None if window[0] < 0 else window[0] + 1
    states = [x.transpose(0, 1)[None] for x in (query, key, value)]
    given = {"scaling": 0.3, "sliding_window": reach, "max_length_q": 6}

    def computed(on_gpu: bool) -> Tensor:
        monkeypatch.setattr(varlen, "has_kernel", lambda states: on_gpu)
        found = varlen.attention(module, *states, None, cu_seq_lens_q=bounds, **given)[0]
        return found[0].float()

    close(computed(True), computed(False), atol=0.02, rtol=0.02)
