"""Pairs to scores: a query and a passage read together.

- `CrossEncoder`: a linear head on one state. RankLLaMA (arXiv 2310.08319, section 2.2) puts it on
  the last token of a decoder; an encoder's head reads [CLS]. A decoder is transformers' own
  `...ForSequenceClassification` with one label, so that plain transformers and PEFT load it.
- `QueryLikelihood`: the mean log probability of the query's tokens after the passage (Ponte and
  Croft 1998; UPR, arXiv 2204.07496). It needs no new head, so a pretrained model ranks before any
  training, and a random one learns from every token.
- `TokenScorer`: the logit of a positive token minus that of a negative one after a chat template
  (Qwen3-Reranker, arXiv 2506.05176, section 2; monoT5, arXiv 2003.06713).

A score depends neither on the batch nor on the padding side, and is computed in float32.
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
from caravan.models.output_layer import (
    check_output_layer,
    log_probabilities,
    logit_form,
    token_logits,
)
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
    """Scores a query and a passage that it reads as one input, by a linear head.

    Args:
        scorer: a transformer with a head (`with_head`, `load_scorer`), or for the subclasses a
            causal language model; with or without an adapter.
        encoding: for pooling: the last token of a decoder, [CLS] of an encoder.

    Raises:
        InputError: If pooling does not suit the architecture, the attention direction differs from
            the encoding's, the model has fewer positions than a pair may have tokens, or
            encoding.scoring is "likelihood" or "token" and it is not a causal language model.
    """

    def __init__(self, scorer: nn.Module, encoding: Encoding) -> None:
        super().__init__()
        self.scorer = scorer
        self.pooling = pooling_of(encoding)
        self.causal = is_causal(scorer)
        if encoding.scoring == "head":
            self._check_head(encoding)
        else:
            check_output_layer(self.plain, f"encoding.scoring={encoding.scoring}")
        refuse_too_long(scorer, encoding)

    def _check_head(self, encoding: Encoding) -> None:
        decoder = is_decoder(self.scorer)
        if not isinstance(self.pooling, Last if decoder else Cls):
            wanted, stage = ("last", "reranker") if decoder else ("cls", "reranker_encoder")
            raise InputError(
                "unsuitable-pooling",
                f"encoding.pooling={encoding.pooling}: a reranker on {type(self.plain).__name__}"
                f" reads the {wanted} token; set encoding.pooling={wanted}, or stage={stage}",
            )
        check_direction(encoding, self.scorer)

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
        return self(chunk.input_ids, chunk.attention_mask, chunk.full, chunk.token_types)

    def score(self, pairs: Packed) -> Tensor:
        """Scores [N] float32 of packed pairs, in the order of the pairs."""
        return pairs.rows_of(self.of)


class QueryLikelihood(CrossEncoder):
    """Scores a pair by the likelihood of the query after the passage."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        full: bool = False,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Scores [n] float32 of pairs: mean log probabilities, in nats.

        Args: see `caravan.models.pooling.pooled_states`.
            token_types: [n, L], 1 for the tokens of the query.
        """
        if token_types is None:
            raise ValueError("a likelihood needs token_types to find the query's tokens")
        if not full:
            order = right_padded(attention_mask)
            input_ids, token_types = input_ids.gather(1, order), token_types.gather(1, order)
        model = self.plain
        # Causal: no real token sees the padding on its right, so no mask is needed.
        states = model.base_model(input_ids=input_ids).last_hidden_state
        wanted = token_types[:, 1:].bool()  # the state before a token predicts it
        terms = log_probabilities(model, states[:, :-1][wanted], input_ids[:, 1:][wanted])
        rows = wanted.nonzero()[:, 0]
        total = terms.new_zeros(len(input_ids)).index_add(0, rows, terms)
        return total / wanted.sum(dim=1).clamp(min=1)


class TokenScorer(CrossEncoder):
    """Scores a pair by the logit of one token minus that of another, at the last position.

    The sigmoid of a score is the probability of the positive one of the two. Only two rows of the
    output layer are computed.

    Args:
        tokens: ids of the positive and the negative token (`caravan.data.pairs.answer_ids`).
        The others: see `CrossEncoder`.
    """

    def __init__(self, scorer: nn.Module, encoding: Encoding, tokens: tuple[int, int]) -> None:
        super().__init__(scorer, encoding)
        self.tokens = tokens

    @property
    def output_layer(self) -> Any:
        """The layer whose two rows are used; it must keep its weight (`cpu.pack_linears`)."""
        return self.plain.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        full: bool = False,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Scores [n] float32 of pairs: log odds of the positive against the negative token.

        Args: see `caravan.models.pooling.pooled_states`.
            token_types: not used; the pair is one text.
        """
        model = self.plain
        trunk = model.base_model
        states = pooled_states(trunk, input_ids, attention_mask, self.pooling, True, full)
        logits = token_logits(model, states, self.tokens)
        return logits[:, 0] - logits[:, 1]

    @torch.no_grad()
    def as_classifier(self) -> nn.Module:
        """A scorer with a head that computes the same scores; it shares the transformer.

        The head's weight is the difference of the two rows (`W[yes] - W[no]`), which serves where
        transformers' sequence classification does.

        Raises:
            InputError: If the model soft-caps its logits, or the two tokens have different biases.
        """
        model, layer = self.plain, self.output_layer
        scale, cap = logit_form(model)
        positive, negative = self.tokens
        bias = 0.0 if layer.bias is None else float(layer.bias[positive] - layer.bias[negative])
        if cap or bias:
            problem = "caps its logits" if cap else "has a bias in its output layer"
            raise InputError(
                "not-expressible",
                f"{type(model).__name__} {problem}, which a head without bias cannot compute;"
                " export it as a causal language model",
            )
        rows = layer.weight.float()
        scorer: Any = with_head(model.base_model)
        scorer.score.weight.copy_(scale * (rows[positive] - rows[negative]))
        return scorer


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
    """Put a new linear head (`.score`) on a transformer, whose config is changed.

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
