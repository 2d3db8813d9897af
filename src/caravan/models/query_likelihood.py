"""A passage and a query to the query's likelihood: reranking with a language model and no new head.

The older way to rank by a language model (Ponte and Croft 1998; with a large one UPR, arXiv
2204.07496): a passage is worth as much as it makes the query likely. The score is the mean log
probability of the query's tokens, read after the passage. Each token teaches, where a head has one
label for a pair, so a model from random weights learns it in minutes, and one that was pretrained
on text ranks before any training. In place of RankLLaMA's head by `encoding.scoring=likelihood`.
"""

from __future__ import annotations

from torch import Tensor, nn

from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models.crossencoder import CrossEncoder
from caravan.models.output_layer import log_probabilities, refuse_other_output
from caravan.models.pooling import is_causal, to_the_left
from caravan.models.positions import refuse_too_long


class QueryLikelihood(CrossEncoder):
    """Scores a pair by how likely the passage makes the query.

    Args:
        scorer: a causal language model of transformers, with or without an adapter.

    Raises:
        InputError: the model is none, looks to the right, or has fewer positions than a pair may
            have tokens.
    """

    def __init__(self, scorer: nn.Module, encoding: Encoding) -> None:
        nn.Module.__init__(self)
        self.scorer = scorer
        if not is_causal(scorer) or self.plain.get_output_embeddings() is None:
            raise InputError(
                f"encoding.scoring=likelihood: {type(self.plain).__name__} is no causal language"
                " model; choose a decoder, or encoding.scoring=head"
            )
        refuse_other_output(self.plain)
        refuse_too_long(scorer, encoding)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        full: bool = False,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Score pairs.

        Args:
            input_ids, attention_mask: [n, L], padded on either side.
            full: no pair is padded.
            token_types: [n, L], 1 for the tokens whose likelihood is the score.

        Returns:
            [n] float32, the mean log probability of these tokens, in nats.
        """
        if token_types is None:
            raise ValueError("a likelihood needs to know which tokens are the query's")
        if not full:
            left = to_the_left(attention_mask)
            input_ids, token_types = input_ids.gather(1, left), token_types.gather(1, left)
        model = self.plain
        # Causal: no real token sees the padding on its right, so no mask is needed.
        states = model.base_model(input_ids=input_ids).last_hidden_state
        wanted = token_types[:, 1:].bool()  # a token is told by the state before it
        terms = log_probabilities(model, states[:, :-1][wanted], input_ids[:, 1:][wanted])
        rows = wanted.nonzero()[:, 0]
        total = terms.new_zeros(len(input_ids)).index_add(0, rows, terms)
        return total / wanted.sum(dim=1).clamp(min=1)
