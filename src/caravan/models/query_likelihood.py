"""Rerank by query likelihood: a language model without a new head.

Ranking by a language model (Ponte and Croft 1998; with a large one UPR, arXiv 2204.07496): the
score is the mean log probability of the query's tokens after the passage. Every token is a training
signal, where a head has one label a pair, so a model from random weights learns it in minutes, and
a pretrained one ranks before any training.
"""

from __future__ import annotations

from torch import Tensor, nn

from caravan.encoding import Encoding
from caravan.models.crossencoder import CrossEncoder
from caravan.models.output_layer import check_output_layer, log_probabilities
from caravan.models.pooling import right_padded
from caravan.models.positions import refuse_too_long


class QueryLikelihood(CrossEncoder):
    """Scores a pair by the likelihood of the query after the passage.

    Args:
        scorer: a causal language model of transformers, with or without an adapter.

    Raises:
        InputError: If the model is not a causal language model, or has fewer positions than a pair
            may have tokens.
    """

    def __init__(self, scorer: nn.Module, encoding: Encoding) -> None:
        nn.Module.__init__(self)
        self.scorer = scorer
        check_output_layer(self.plain, "encoding.scoring=likelihood")
        refuse_too_long(scorer, encoding)

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
