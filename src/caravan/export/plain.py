"""What a model computes by plain transformers, text by text: the measure of an exported folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caravan.data.batch import pack
from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.export import tokens
from caravan.models.crossencoder import Headed
from caravan.models.pooling import pooling_of
from caravan.models.query_likelihood import QueryLikelihood

QUERY = ("", "Which animals cross the desert?")


def refuse_foreign_head(folder: Path, model: Any) -> None:
    """Refuse a reranker whose head is none of transformers' own."""
    scorer = getattr(model, "plain", None)
    if isinstance(scorer, Headed):
        name = type(scorer.backbone).__name__
        raise InputError(
            f"{folder} scores by a linear layer on a token of {name}, and transformers has no class"
            " with such a head; export it as sentence-transformers"
        )


@dataclass(frozen=True)
class Sample:
    """Token ids, and what the model folder makes of them."""

    encoding: Encoding
    ids: list[list[int]]
    seconds: list[int] | None  # where a pair's second text begins, for models with token types
    wanted: Tensor  # [N, d] embeddings or [N] scores

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokenizer: Any, encoding: Encoding) -> Sample:
        if encoding.kind == "retriever":
            templates = Templates(tokenizer, encoding)
            texts = list(tokens.SHORT)
            ids = [row for row in templates.queries(texts) + templates.passages(texts) if row]
            return cls(encoding, ids, None, model.embed(pack(ids, 4096)))
        pairing = PairTemplates(tokenizer, encoding)
        pairs = pairing.pairs([QUERY] * len(tokens.SHORT), tokens.SHORT)
        ids = [pair.ids for pair in pairs]
        seconds = [pair.second for pair in pairs] if pairing.typed else None
        return cls(encoding, ids, seconds, model.score(pack(ids, 4096, seconds=seconds)))

    @torch.no_grad()
    def by(self, model: Any) -> Tensor:
        """The same by a model of transformers, or of PEFT on one."""
        if self.encoding.scoring == "likelihood":
            likelihood = QueryLikelihood(model, self.encoding)
            return likelihood.score(pack(self.ids, 4096, seconds=self.seconds))
        rows = []
        for i, ids in enumerate(self.ids):
            given = {"input_ids": torch.tensor([ids])}
            if self.encoding.kind == "reranker":
                if self.seconds is not None:
                    second = self.seconds[i]
                    types = [0] * second + [1] * (len(ids) - second)
                    given["token_type_ids"] = torch.tensor([types])
                rows.append(model(**given).logits[:, 0])
                continue
            states = model(**given).last_hidden_state
            whole = torch.ones_like(given["input_ids"])
            rows.append(pooling_of(self.encoding)(states, whole))
        found = torch.cat(rows).float()
        if self.encoding.kind == "retriever" and self.encoding.normalize:
            return torch.nn.functional.normalize(found, dim=-1)
        return found
