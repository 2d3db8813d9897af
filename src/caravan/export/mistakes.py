"""What a model folder's test texts give, and what they would give with a server's usual mistakes.

`Embeddings` and `Scores` have the texts to send and the ways to read them: first the folder's own,
then one mistake each, in prompts, tokens at the end, special tokens or truncation. Each way is
computed with the folder's pooling and normalization and with others, or with a sigmoid after the
score.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from caravan.data.batch import pack
from caravan.data.pairs import Pair, PairTemplates
from caravan.data.tokenization import Template, plain_ids
from caravan.export import verify
from caravan.models.pooling import Cls, Last, Mean, pooled_states, pooling_of
from caravan.retrieval.inference import Inference

LONG = 2048
"""Tokens; truncation at more is not tested, since the texts would take too long."""
LIMITS = (64, 128, 256, 512, 1024)
"""Lengths that servers truncate to by default."""

Causes = dict[str, str]
"""Mistakes: their kind, and what is wrong."""
Readings = Iterator[tuple[Causes, list[Pair]]]
"""The ids of all texts with some mistake, or with none."""
Values = Iterator[tuple[Causes, np.ndarray]]
"""The numbers of all texts with some mistake, or with none."""


class Embeddings:
    """Embeddings of queries or passages.

    Args:
        side: "query" or "passage".
        plain: send texts without the prompt. The server always adds the tokens at the end.

    Attributes:
        sent: the texts to send, a tuple of one for each.
        length: tokens at which the folder truncates.
    """

    def __init__(self, model: Inference, side: str, plain: bool) -> None:
        self.model, self.side, self.plain = model, side, plain
        self.length = getattr(model.encoding, f"{side}_length")
        given, encode = _given(self.length), model.templates.passages
        if side == "query":
            given, encode = [("", text) for _, text in given], model.templates.queries
        template = Template(model.encoding.template(side))
        self.sent = [(_joined(text) if plain else template.render(*text),) for text in given]
        self._own = [Pair(ids, 0) for ids in encode(given)]

    def readings(self) -> Readings:
        """Ways to read what was sent."""
        templates = self.model.templates
        tokenizer, before, after = templates.tokenizer, templates.before, templates.tails[self.side]
        prompts = {"": ""}
        for side in ("query", "passage"):
            whole = Template(self.model.encoding.template(side)).render("", "\0")
            prompts[side] = whole.partition("\0")[0]

        def bodies(prompt: str) -> list[Pair]:
            ids = plain_ids(tokenizer, [prompt + text for (text,) in self.sent])
            return [Pair(one, 0) for one in ids]

        yield {}, self._own
        for prompt in prompts.values():
            text = f"the server adds {prompt!r} to a {self.side}"
            yield {"prompt": text}, _framed(bodies(prompt), before, after, self.length)
        own = bodies(prompts[self.side] if self.plain else "")
        yield from _framings(own, before, after, self.length, tokenizer.eos_token_id)

    @torch.inference_mode()
    def values(self, read: list[Pair]) -> Values:
        """Embeddings [N, d] of texts as read, with the folder's pooling and normalization first."""
        encoding, model = self.model.encoding, self.model.model
        own, states = encoding.pooling, []
        for ids, _ in read:
            given = torch.tensor([ids], device=self.model.device)
            mask = torch.ones_like(given)
            one = pooled_states(model.transformer, given, mask, _all_states, model.causal, True)
            states.append(one.cpu())
        poolings = {own: pooling_of(encoding), "last": Last(), "mean": Mean(), "cls": Cls()}
        for scaled in (encoding.normalize, not encoding.normalize):
            for name, pooling in poolings.items():
                pooled = torch.cat([pooling(one, torch.ones(one.shape[:2])) for one in states])
                pooled = pooled[:, : encoding.dim or None]
                causes = {}
                if name != own:
                    causes["pooling"] = f"{name} instead of {own}"
                if scaled != encoding.normalize:
                    causes["normalization"] = f"it is {'on' if scaled else 'off'}"
                yield causes, (torch.nn.functional.normalize(pooled) if scaled else pooled).numpy()


class Scores:
    """Scores of a query with passages.

    Args:
        plain: send query and passages without templates.

    Attributes: as of `Embeddings`; a query and a passage are sent.
    """

    side = "pair"

    def __init__(self, model: Inference, plain: bool) -> None:
        self.model, self.plain, self.length = model, plain, model.templates.length
        encoding = model.encoding
        self._given = _given(self.length)
        self._queries = [("", verify.QUERY)] * len(self._given)
        first, second = (Template(encoding.template(side)) for side in ("query", "passage"))
        query = encoding.prefix + first.render("", verify.QUERY) + first.suffix
        gap = " " if encoding.pair == "joined" else ""
        passages = [gap + second.render(*text) + encoding.suffix for text in self._given]
        self.sent = [(query, passage) for passage in passages]
        if plain:
            self.sent = [(verify.QUERY, _joined(text)) for text in self._given]

    def readings(self) -> Readings:
        """Ways to read what was sent."""
        templates, encoding = self.model.templates, self.model.encoding
        queries = [("", query) for query, _ in self.sent]
        passages = [("", passage) for _, passage in self.sent]
        none: dict[str, Any] = {"query_template": "{text}", "passage_template": "{text}"}
        none |= {"prefix": "", "suffix": "", "instruction": "", "instructions": {}}
        bare = PairTemplates(templates.tokenizer, replace(encoding, **none))
        long = replace(encoding, passage_length=4 * self.length + LONG)
        whole = PairTemplates(templates.tokenizer, long)
        yield {}, templates.pairs(self._queries, self._given)
        yield {"prompt": "the server applies no template"}, bare.pairs(queries, passages)
        text = "the server applies the template to what has it"
        yield {"prompt": text}, whole.pairs(queries, passages)
        before, after = templates.before, templates.after
        bodies = [
            Pair(ids[len(before) : len(ids) - len(after)], second - len(before))
            for ids, second in whole.pairs(self._queries, self._given)
        ]
        eos = templates.tokenizer.eos_token_id
        yield from _framings(bodies, before, after, self.length, eos)

    @torch.inference_mode()
    def values(self, read: list[Pair]) -> Values:
        """Scores [N] of pairs as read, then their sigmoid."""
        ids = [pair.ids for pair in read]
        seconds = [pair.second for pair in read] if self.model.templates.typed else None
        packed = pack(ids, self.model.token_budget, seconds=seconds).to(self.model.device)
        scores = packed.rows_of(self.model.model.of).cpu()
        yield {}, scores.numpy()
        yield {"activation": "a sigmoid follows the score"}, scores.sigmoid().numpy()


def _framings(
    bodies: list[Pair], before: list[int], after: list[int], length: int, eos: int | None
) -> Readings:
    """Mistakes in the tokens around texts, and in truncation; arguments as of `_framed`."""
    yield {"EOS": "no token follows a text"}, _framed(bodies, before, [], length)
    twice = _framed(bodies, before, [*after, *after[-1:]], length)
    yield {"EOS": "the last token is appended twice"}, twice
    if eos is not None:
        appended = _framed(bodies, before, [*after, eos], length)
        yield {"EOS": "the EOS is appended, unlike in the folder"}, appended
    yield {"special tokens": "there are none"}, _framed(bodies, [], [], length)
    whole = _framed(bodies, before, after, sys.maxsize)
    yield {"truncation": "long texts are not truncated"}, whole
    cut = [pair._replace(ids=pair.ids[:length]) for pair in whole]
    yield {"truncation": "long texts lose their last tokens"}, cut
    room = length - len(before) - len(after)
    ends = [body._replace(ids=body.ids[-room:]) for body in bodies]
    yield {"truncation": "long texts lose their start"}, _framed(ends, before, after, length)
    for limit in (limit for limit in LIMITS if limit < length):
        text = f"texts have at most {limit} tokens"
        yield {"truncation": text}, _framed(bodies, before, after, limit)


def _framed(bodies: list[Pair], before: list[int], after: list[int], limit: int) -> list[Pair]:
    """Ids with others around them, truncated at `limit`; a pair's start is counted from there."""
    room = limit - len(before) - len(after)
    return [Pair([*before, *ids[:room], *after], len(before) + second) for ids, second in bodies]


def _given(length: int) -> list[tuple[str, str]]:
    """Titles and texts, the last one longer than `length` tokens, unless that is too long."""
    long = [("", "sand dunes " * length)] if length <= LONG else []
    return [*(text for text in verify.TEXTS if text[1].strip()), *long]


def _joined(text: tuple[str, str]) -> str:
    return " ".join(filter(None, text))


def _all_states(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return states.float()
