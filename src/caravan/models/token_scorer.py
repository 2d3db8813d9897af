"""Rerank by the logits of two tokens: a language model that answers yes or no.

The model reads instruction, query and document in a chat template, and the score is the logit of
the positive token minus that of the negative one after it (Qwen3-Reranker, arXiv 2506.05176,
section 2; monoT5, arXiv 2003.06713). Its sigmoid is the probability of the positive one of the two.
Only two rows of the output layer are computed, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models.crossencoder import CrossEncoder, Head, with_head
from caravan.models.output_layer import check_output_layer, logit_form, token_logits
from caravan.models.pooling import Last, pooled_states
from caravan.models.positions import refuse_too_long


class TokenScorer(CrossEncoder):
    """Scores a pair by the logit of one token minus that of another, at the last position.

    Args:
        scorer: a causal language model of transformers, with or without an adapter.
        tokens: ids of the positive and the negative token (`caravan.data.pairs.answer_ids`).

    Raises:
        InputError: If the model is not a causal language model, or has fewer positions than a pair
            may have tokens.
    """

    def __init__(self, scorer: nn.Module, encoding: Encoding, tokens: tuple[int, int]) -> None:
        nn.Module.__init__(self)
        self.scorer, self.tokens = scorer, tokens
        self.pooling = Last()
        check_output_layer(self.plain, "encoding.scoring=token")
        refuse_too_long(scorer, encoding)

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
            InputError: If the score is not linear in the state.
        """
        model, layer = self.plain, self.output_layer
        scale, cap = logit_form(model)
        positive, negative = self.tokens
        bias = 0.0
        if layer.bias is not None:
            bias = float(layer.bias[positive] - layer.bias[negative])
        if cap or bias:
            problem = "caps its logits" if cap else "has a bias in its output layer"
            raise InputError(
                "not-expressible",
                f"{type(model).__name__} {problem}, which a head without bias cannot compute;"
                " export it as a causal language model",
            )
        rows = layer.weight.float()
        scorer: Any = with_head(model.base_model)
        scorer.score = Head(rows.shape[1], 1, bias=False)
        scorer.score.weight.copy_(scale * (rows[positive] - rows[negative]))
        return scorer
