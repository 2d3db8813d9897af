"""Pairs to scores: a query and a passage read together, and a linear head on one state.

RankLLaMA (arXiv 2310.08319, section 2.2) puts a bias-free head on the last token's state of a
decoder; an encoder's head reads the state of [CLS]. A decoder is transformers' own
`...ForSequenceClassification` with one label, so that plain transformers and PEFT load the model
folder. A score depends neither on the batch nor on the padding side, and is computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from caravan.data.batch import Chunk, Packed
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import cpu as _registered  # noqa: F401
from caravan.models.bidirectional import check_direction, is_causal, is_decoder, unwrapped
from caravan.models.pooling import Cls, Last, pooled_states, pooling_of, right_padded
from caravan.models.positions import refuse_too_long


class Head(nn.Linear):
    """A linear head in float32, whatever the precision around it: bf16 would tie many scores."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Head:
        head = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        head.load_state_dict(linear.float().state_dict(), assign=True)
        return head

    def forward(self, states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), self.weight.float(), bias)


class Headed(PreTrainedModel):
    """A transformer and a head, for architectures with another kind of classifier."""

    base_model_prefix = "backbone"
    # Attention is chosen on the backbone, and must not be refused a second time here.
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, backbone: Any, head: nn.Linear) -> None:
        super().__init__(backbone.config)
        self.backbone = backbone
        self.score = head


class CrossEncoder(nn.Module):
    """Scores a query and a passage that it reads as one input.

    Args:
        scorer: as `with_head` or `load_scorer` returns it; with or without an adapter.
        encoding: for pooling: the last token of a decoder, [CLS] of an encoder.

    Raises:
        InputError: If pooling does not suit the architecture, the attention direction differs from
            the encoding's, or the model has fewer positions than a pair may have tokens.
    """

    def __init__(self, scorer: nn.Module, encoding: Encoding) -> None:
        super().__init__()
        self.scorer = scorer
        self.pooling = pooling_of(encoding)
        self.causal = is_causal(scorer)
        decoder = is_decoder(scorer)
        if not isinstance(self.pooling, Last if decoder else Cls):
            wanted, stage = ("last", "reranker") if decoder else ("cls", "reranker_encoder")
            raise InputError(
                "unsuitable-pooling",
                f"encoding.pooling={encoding.pooling}: a reranker on {type(self.plain).__name__}"
                f" reads the {wanted} token; set encoding.pooling={wanted}, or stage={stage}",
            )
        check_direction(encoding, scorer)
        refuse_too_long(scorer, encoding)

    @property
    def transformer(self) -> nn.Module:
        """The part that a model folder saves: transformer and head, with the adapter if any."""
        return self.scorer

    @property
    def plain(self) -> Any:
        """The scorer inside its adapter."""
        return unwrapped(self.scorer)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        full: bool = False,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Scores [n] float32 of pairs.

        Args: see `caravan.models.pooling.pooled_states`.
        """
        scorer = self.plain
        if getattr(scorer, "score", None) is None:
            return self._released_head(scorer, input_ids, attention_mask, token_types)
        backbone = getattr(scorer, scorer.base_model_prefix)
        pooled = pooled_states(
            backbone, input_ids, attention_mask, self.pooling, self.causal, full, token_types
        )
        return scorer.score(pooled)[:, 0]

    @staticmethod
    def _released_head(
        scorer: Any, input_ids: Tensor, attention_mask: Tensor, token_types: Tensor | None
    ) -> Tensor:
        """A released encoder's score, by its own forward pass and head."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_types is not None:
            inputs["token_type_ids"] = token_types
        order = right_padded(attention_mask)
        inputs = {name: rows.gather(1, order) for name, rows in inputs.items()}
        return scorer(**inputs).logits[:, 0].float()

    def of(self, chunk: Chunk) -> Tensor:
        """Scores [n] float32 of a chunk."""
        inputs = (chunk.input_ids, chunk.attention_mask, chunk.full, chunk.token_types)
        return self(*inputs)

    def score(self, pairs: Packed) -> Tensor:
        """Scores [N] float32 of packed pairs, in the order of the pairs."""
        return pairs.rows_of(self.of)


def head_of(scorer: Any) -> tuple[str, nn.Linear] | None:
    """The name and layer of a scorer's head; None if it is not a linear layer of one output."""
    inner = f"{scorer.base_model_prefix}."
    found = [
        (name, layer)
        for name, layer in scorer.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == 1 and not name.startswith(inner)
    ]
    return found[-1] if found else None


def with_head(backbone: Any, pad_id: int | None = None) -> nn.Module:
    """Put a new head on a transformer.

    Args:
        backbone: a transformers model without a head.
        pad_id: written to a config that has none, since transformers' own code needs one.
    """
    config = backbone.config
    config.num_labels = 1
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_id
    head = Head(config.get_text_config().hidden_size, 1, bias=False)
    nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if is_decoder(backbone) and kind is not None:
        with torch.device("meta"):
            scorer = kind(config)
        own = getattr(scorer, scorer.base_model_prefix, None)
        if type(own) is type(backbone) and getattr(scorer, "score", None) is not None:
            setattr(scorer, scorer.base_model_prefix, backbone)
            scorer.score = head
            return scorer
    return Headed(backbone, head)
