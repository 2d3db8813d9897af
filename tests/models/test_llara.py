"""One pass for both of LLaRA's tasks: two passes' states, the losses' bounds, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models.small import EVERY_DECODER, close, language_model_of
from tests.refusals import refused

from caravan.data.batch import Chunk, Packed, pack
from caravan.encoding import Encoding
from caravan.models import output_layer
from caravan.models.bidirectional import make_bidirectional
from caravan.models.llara import Layout, Read, SlotEncoder, joint, set_losses, token_losses
from caravan.models.loading import set_attention

ENCODING = Encoding(query_length=16, passage_length=48)
LAYOUT = Layout(skipped=1, prompts=(4, 3), slots=2)
TEXTS = [[1, *range(10, 10 + n)] for n in (9, 2, 30, 5, 17)]
SELF, NEXT = [50, 51, 52, 53], [54, 55, 56]
V = 64
WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3_text")


def _language_model(name: str) -> Any:
    shape = {"vocab_size": V, "hidden_size": 16, "head_dim": 8}
    return language_model_of(name, **shape, **({"sliding_window": 6} if name in WINDOWED else {}))


def _encoder(model: Any, layout: Layout = LAYOUT) -> SlotEncoder:
    return SlotEncoder(model, model.base_model, ENCODING, layout)


def _both(texts: list[list[int]] = TEXTS, budget: int = 100) -> Any:
    return pack([[*text, *SELF, *NEXT] for text in texts], budget)


def _padded() -> Packed:
    """All texts in one chunk, the short ones filled up with tokens that are not to be seen."""
    texts = [torch.tensor([*text, *SELF, *NEXT]) for text in TEXTS]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=7)
    mask = torch.stack([(torch.arange(ids.shape[1]) < len(text)).long() for text in texts])
    chunk = Chunk(ids, mask, full=False)
    return Packed((chunk,), torch.arange(len(texts)), int(mask.sum()), ids.numel())


def test_a_prompt_sees_the_text_and_itself_at_the_positions_after_the_text() -> None:
    positions, mask = joint(torch.tensor([[1] * 6, [1] * 5 + [0]]), Layout(0, (2, 1), 1))
    assert positions.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 2, 3]]
    assert mask[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert mask[1, 4].int().tolist() == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(("name", "attention"), EVERY_DECODER)
def test_the_joint_pass_equals_two_passes(name: str, attention: str) -> None:
    if name in ("gemma2", "gpt_oss") and attention != "eager":
        pytest.skip("its capped scores or sinks need its own kernel")
    model = set_attention(_language_model(name), attention)
    with torch.no_grad():
        reads = [_encoder(model).read(texts).slots for texts in (_both(), _padded())]
        for i, text in enumerate(TEXTS):
            for task, prompt in enumerate((SELF, NEXT)):
                alone = model.base_model(torch.tensor([[*text, *prompt]])).last_hidden_state[0, -2:]
                for found in reads:  # [N, T, K, d]
                    close(found[i, task], alone, atol=3e-5)


def test_one_task_alone_and_none_are_read_too() -> None:
    model = _language_model("llama")
    alone = _encoder(model, Layout(1, (3,), 2)).read(pack([[*t, *NEXT] for t in TEXTS], 100))
    both = _encoder(model).read(_both())
    close(alone.slots[:, 0], both.slots[:, 1])
    none = _encoder(model, Layout(1, (), 2)).read(pack(TEXTS, 100), tokens=True)
    assert none.slots.shape == (len(TEXTS), 0, 2, 16)
    assert len(none.tokens) == sum(len(text) - 1 for text in TEXTS)


def test_a_loss_does_not_fall_below_the_log_of_the_number_of_tokens() -> None:
    """Hits are the share of the tokens among as many likeliest."""
    model = _language_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(torch.eye(V)[:, :16] * 100)
    states = torch.zeros(1, 1, 16)
    states[0, 0, [2, 5, 7]] = 1.0
    loss, hits = set_losses(model, states, torch.tensor([2, 5, 7]), torch.tensor([3]), hits=True)
    assert float(loss) == pytest.approx(math.log(3), abs=1e-5)
    assert float(hits) == 1.0
    states = torch.arange(16.0).view(1, 1, 16)  # token 15 is the likeliest, then 14, ...
    _, hits = set_losses(model, states, torch.tensor([15, 13, 2]), torch.tensor([3]), hits=True)
    assert float(hits) == pytest.approx(2 / 3)


def test_no_more_logits_than_a_piece_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _language_model("llama")
    monkeypatch.setattr("caravan.models.llara.MOST_LOGITS", V * 2 * 3)
    monkeypatch.setattr(output_layer, "MOST_LOGITS", V * 4)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, out: sizes.append(out.numel())
    )
    states = torch.randn(8, 2, 16)
    set_losses(model, states, torch.arange(8), torch.ones(8, dtype=torch.int64))
    assert max(sizes) == V * 2 * 3
    sizes.clear()
    token_losses(model, Read(states, torch.randn(9, 16), torch.arange(9)))
    assert max(sizes) == V * 4


@pytest.mark.parametrize("name", ["bloom", "mamba", "bert", "modernbert-decoder"])
def test_an_architecture_without_a_test_is_refused_by_name(name: str) -> None:
    model = _language_model(name)
    with refused("model-not-supported", type(model.base_model).__name__):
        _encoder(model)


def test_an_attention_without_masks_and_a_bidirectional_model_are_refused() -> None:
    model = _language_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with refused("attention-not-supported", "flash_attention_2", "attention=sdpa"):
        _encoder(model)
    both = make_bidirectional(_language_model("llama"))
    with refused("no-language-model", "LlamaForCausalLM"):
        SlotEncoder(both, both.base_model, replace(ENCODING, bidirectional=True), LAYOUT)
