from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.commands import evaluate, train
from tests.models.test_biencoder import ARCHITECTURES, TEXTS, _architecture
from tests.tiny import tiny_backbone
from torch import Tensor

from caravan.data.batch import Packed, pack
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import varlen
from caravan.models.backbone import Pretrained, prepared
from caravan.models.bidirectional import make_bidirectional
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, with_head
from caravan.models.llara import MASKED
from caravan.models.loading import set_attention


def _embedded(backbone: Any, texts: Packed, pooling: str = "last") -> Tensor:
    with torch.no_grad():
        return BiEncoder(backbone, Encoding(pooling=pooling)).embed(texts)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_texts_end_to_end_get_the_embeddings_that_they_get_alone(name: str, pooling: str) -> None:
    """Windows of 8 tokens and texts of up to 19; lengths that come twice are one product."""
    texts = [*TEXTS, [40, 41, 42], list(range(50, 69))]
    backbone = _architecture(name)
    alone = torch.cat([_embedded(backbone, pack([text], 100), pooling) for text in texts])
    set_attention(backbone, "unpadded")
    together = _embedded(backbone, pack(texts, 1000), pooling)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_decoder_that_looks_both_ways_does_so_within_its_text(name: str) -> None:
    backbone = make_bidirectional(_architecture(name))
    encoding = Encoding(bidirectional=True)
    with torch.no_grad():
        alone = torch.cat([BiEncoder(backbone, encoding).embed(pack([t], 99)) for t in TEXTS])
        set_attention(backbone, "unpadded")
        together = BiEncoder(backbone, encoding).embed(pack(TEXTS, 1000))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_left_out(side: str) -> None:
    from tests.models.test_biencoder import _padded

    backbone = _architecture("qwen3")
    expected = _embedded(backbone, pack(TEXTS, 1000))
    set_attention(backbone, "unpadded")
    with torch.no_grad():
        found = BiEncoder(backbone, Encoding())(*_padded(TEXTS, side))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_linear_layers_compute_real_tokens_only() -> None:
    backbone: Any = set_attention(_architecture("qwen3"), "unpadded")
    seen: list[int] = []
    backbone.layers[0].mlp.register_forward_hook(lambda _m, args, _o: seen.append(args[0].numel()))
    _embedded(backbone, pack(TEXTS, 1000))
    assert sum(seen) == sum(map(len, TEXTS)) * backbone.config.hidden_size


def test_gradients_equal_those_of_padded_texts(tmp_path: Path) -> None:
    """With activations computed again and without."""
    tokens = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [16, 17]]
    _architecture("qwen3").save_pretrained(tmp_path)
    gradients = []
    for attention in ("sdpa", "unpadded"):
        for checkpointing in (False, True):
            spec = Pretrained(str(tmp_path), attention=attention, checkpointing=checkpointing)
            model = BiEncoder(spec.model(None), Encoding()).train()
            weights = torch.arange(32.0)
            (model.embed(pack(tokens, 1000)) @ weights).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        assert len(other) == len(gradients[0]) > 10
        for found, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "qwen3"])
def test_pairs_get_the_scores_that_they_get_alone(name: str) -> None:
    pooling = "cls" if name == "bert" else "last"
    texts = pack(TEXTS, 1000, seconds=[1] * len(TEXTS) if name == "bert" else None)
    scorer = with_head(_architecture(name), 0)
    with torch.no_grad():
        expected = CrossEncoder(scorer, Encoding(kind="reranker", pooling=pooling)).score(texts)
        set_attention(scorer, "unpadded")
        model = CrossEncoder(scorer, Encoding(kind="reranker", pooling=pooling))
        torch.testing.assert_close(model.score(texts), expected, atol=1e-5, rtol=0)
    assert varlen.is_enabled(getattr(scorer, scorer.base_model_prefix))


def test_a_text_without_tokens_disturbs_no_other() -> None:
    backbone = _architecture("qwen3")
    expected = _embedded(backbone, pack(TEXTS, 1000))
    set_attention(backbone, "unpadded")
    found = _embedded(backbone, pack([[], *TEXTS], 1000))
    torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=0)


def test_bf16_embeds_as_padded_bf16_does() -> None:
    backbone = _architecture("qwen3")
    expected = _embedded(backbone, pack(TEXTS, 1000))
    set_attention(backbone.bfloat16(), "unpadded")
    assert (_embedded(backbone, pack(TEXTS, 1000)) * expected).sum(dim=1).min() > 0.998


def test_an_architecture_that_mixes_texts_is_refused_by_name() -> None:
    """RoBERTa counts positions from its padding id on, and Mamba has no attention."""
    shape = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1}
    roberta = transformers.RobertaModel(
        transformers.RobertaConfig(**shape, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(InputError, match=r"attention=unpadded: RobertaModel mixes texts"):
        set_attention(roberta, "unpadded")
    mamba = transformers.MambaModel(transformers.MambaConfig(**shape, state_size=4))
    with pytest.raises(InputError, match=r"attention=unpadded.*MambaModel"):
        set_attention(mamba, "unpadded")


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3", "mistral"])
def test_a_gpu_asks_the_kernel_for_the_same_states(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way a GPU takes, on a CPU: a stand-in computes text by text in the kernel's layout."""

    def stand_in(
        states: list[Tensor],
        bounds: Tensor,
        longest: int,
        scale: float | None,
        window: tuple[int, int],
    ) -> Tensor:
        query, key, value = states
        assert {one.dtype for one in states} == {torch.bfloat16}
        assert (bounds.dtype, int(bounds[-1])) == (torch.int32, len(query))
        assert longest == int(bounds.diff().max())
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        parts = []
        for begin, end in itertools.pairwise(bounds.tolist()):
            q, k, v = (x[begin:end].transpose(0, 1).float() for x in (query, key, value))
            back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
            seen = torch.ones_like(back, dtype=torch.bool)
            seen &= back <= window[0] if window[0] >= 0 else seen
            seen &= -back <= window[1] if window[1] >= 0 else seen
            scores = (q @ k.mT) * (scale or q.shape[-1] ** -0.5)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            parts.append((weights @ v).transpose(0, 1))
        return torch.cat(parts).to(query.dtype)

    backbone = _architecture(name)
    expected = _embedded(backbone, pack(TEXTS, 1000), "mean")
    set_attention(backbone, "unpadded")
    asked = []
    monkeypatch.setattr(varlen, "has_kernel", lambda states: asked.append(1) or True)
    monkeypatch.setattr(varlen, "_by_kernel", stand_in)
    with torch.autocast("cpu", torch.bfloat16):
        found = _embedded(backbone, pack(TEXTS, 1000), "mean")
    assert len(asked) == 2 * len(pack(TEXTS, 1000).chunks)
    assert (found * expected).sum(dim=1).min() > 0.998


def test_windows_that_stand_in_masks_alone_are_refused_by_name() -> None:
    shape: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.PhimoeConfig(
        **shape, num_key_value_heads=2, num_local_experts=2, sliding_window=20
    )
    with pytest.raises(InputError, match="PhimoeModel keeps windows of attention by its masks"):
        set_attention(transformers.PhimoeModel(config), "unpadded")
    config.sliding_window = None
    set_attention(transformers.PhimoeModel(config), "unpadded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_allows_what_rounding_does_and_no_more(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer's states a little off: by less, and by more than those of padded texts."""
    torch.manual_seed(0)
    of = varlen._of_one_length

    def off(by: float) -> Any:
        def shifted(flat: Any, bounds: Tensor) -> Any:
            for query, key, value in of(flat, bounds):
                yield query, key, value * (1 + by)

        return shifted

    small, large = (1e-6, 3e-3) if dtype == torch.float32 else (1e-3, 0.3)
    monkeypatch.setattr(varlen, "_of_one_length", off(small))
    set_attention(_architecture("qwen3").to(dtype), "unpadded")
    monkeypatch.setattr(varlen, "_of_one_length", off(large))
    with pytest.raises(InputError, match="mixes texts"):
        set_attention(_architecture("qwen3").to(dtype), "unpadded")


def test_a_model_that_drops_attention_weights_is_not_trained_so_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = set_attention(_architecture("bert"), "unpadded")
    prepared(backbone, False, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"BertModel drops attention weights \(attention_probs_dr"):
        prepared(backbone, False, False)


def test_a_text_that_is_read_under_a_mask_of_its_own_is_padded() -> None:
    assert varlen.NAME in MASKED
    backbone: Any = set_attention(_architecture("qwen3"), "sdpa")
    ids = torch.arange(5, 11)[None]
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., 4:, 1:3] = False
    with torch.no_grad():
        expected = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        set_attention(backbone, "unpadded")
        found = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_without_a_kernel_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen.kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"needs torch 2\.11 or flash-attn"):
        set_attention(_architecture("qwen3"), "unpadded")
    varlen.kernel.cache_clear()


@pytest.mark.parametrize("name", ["torch", "torch 2.11", "flash_attn"])
@pytest.mark.parametrize("window", [(-1, 0), (3, 0), (3, 3), (-1, -1)])
def test_a_kernel_for_variable_lengths_is_asked_for_what_sdpa_computes(
    name: str, window: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in computes in float64, from the published meaning of the kernel's arguments."""
    torch.manual_seed(0)
    query, key, value = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    bounds = torch.tensor([0, 6, 9], dtype=torch.int32)

    def exact(left: int, right: int, scale: float | None) -> Tensor:
        out = torch.zeros(query.shape, dtype=torch.float64)
        for begin, end in ((0, 6), (6, 9)):
            for i in range(begin, end):
                low = begin if left < 0 else max(begin, i - left)
                high = end if right < 0 else min(end, i + right + 1)
                for h in range(4):
                    scores = key[low:high, h // 2].double() @ query[i, h].double()
                    weights = (scores * (scale or 8**-0.5)).softmax(0)
                    out[i, h] = weights @ value[low:high, h // 2].double()
        return out.float()

    def of_torch(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert cu_seq_q is bounds
        assert max_q == max_k == 6
        assert enable_gqa
        return exact(*window_size, scale)

    def of_torch_2_11(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert k.shape == v.shape == q.shape
        assert torch.equal(k[:, 1], key[:, 0])
        return exact(*window_size, scale)

    def of_flash(
        *given: Any,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        left, right = window_size
        return exact(left, 0 if causal else right, softmax_scale)

    varlen.kernel.cache_clear()
    ours = types.ModuleType("torch.nn.attention.varlen")
    ours.varlen_attn = of_torch if name == "torch" else of_torch_2_11  # type: ignore[attr-defined]
    theirs = types.ModuleType("flash_attn")
    theirs.flash_attn_varlen_func = of_flash  # type: ignore[attr-defined]
    here = ours if name.startswith("torch") else None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", here)
    monkeypatch.setitem(sys.modules, "flash_attn", theirs)
    assert varlen.kernel()[0] == name
    found = varlen._by_kernel([query, key, value], bounds, 6, 0.3, window)
    varlen.kernel.cache_clear()

    module = torch.nn.Module()
    module.is_causal = window[1] == 0
    module.num_key_value_groups = 2
    reach = None if window[0] < 0 else window[0] + 1
    heads = [states.transpose(0, 1)[None] for states in (query, key, value)]
    expected = varlen.attention(
        module, *heads, None, scaling=0.3, sliding_window=reach, cu_seq_lens_q=bounds
    )[0][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_keys_that_no_heads_share_are_handed_on_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies of them would take as much memory again, in each layer until the backward pass."""
    given = [torch.randn(9, 4, 8) for _ in range(3)]
    for whose in ("torch", "torch 2.11", "flash_attn"):
        seen: list[Any] = []
        monkeypatch.setattr(
            varlen,
            "kernel",
            lambda whose=whose, seen=seen: (whose, lambda *all, **_: seen.extend(all)),
        )
        varlen._by_kernel(given, torch.tensor([0, 9]), 9, None, (-1, 0))
        assert all(one is other for one, other in zip(seen, given, strict=False))
        assert len(seen) == 7


def test_a_tiny_llama_reads_without_padding(tmp_path: Path) -> None:
    spec = tiny_backbone()
    spec.attention = "unpadded"
    assert varlen.is_enabled(spec.model(_Tokenizer()))


def test_a_run_without_padding_ends_with_the_same_weights_and_figures(
    beir: Path, tmp_path: Path
) -> None:
    """Cached gradients and adapters included; float32, so that only the order of sums differs."""
    weights, figures = [], []
    for attention in ("auto", "unpadded"):
        run_dir = tmp_path / attention
        given = (f"backbone.attention={attention}", "peft=lora", "peft.dropout=0")
        train(beir, run_dir, *given, "gradcache.chunk=4", "trainer.max_steps=4")
        (saved,) = (run_dir / "model").glob("*.safetensors")
        weights.append(load_file(saved))
        to = tmp_path / f"{attention}-test"
        given = (f"attention={attention}", "precision=float32", "measures=[nDCG@10]")
        figures.append(evaluate(beir, to, run_dir / "model", *given)["overall"]["nDCG@10"])
    assert len(weights[0]) > 10
    assert figures[0] == figures[1]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3, msg=name)


class _Tokenizer:
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __len__(self) -> int:
        return 100
