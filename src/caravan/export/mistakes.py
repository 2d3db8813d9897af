"""What a model folder's test texts give, and what they would give with a server's usual mistakes.

`Embeddings` and `Scores` list the texts to send, and ways to read them: first the folder's own,
then one mistake each, in prompts, tokens at the end, special tokens or truncation. Each way is
computed with the folder's pooling and normalization and with others, or with a sigmoid after the
score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Template, plain_ids
from caravan.export import verify
from caravan.models.bidirectional import unwrapped
from caravan.models.pooling import Cls, Last, Mean, pooled_states, pooling_of
from caravan.models.positions import positions
from caravan.retrieval.inference import Inference

LONG = 2048
"""Tokens; truncation at more is not tested, since the texts would take too long."""
LIMITS = (64, 128, 256, 512, 1024)
"""Lengths that servers truncate to by default."""
GIVEN = [text for text in verify.TEXTS if text[1].strip()]

Causes = dict[str, str]
"""Mistakes: their kind, and what is wrong."""


class Text(NamedTuple):
    """What is sent for one text or one pair, and the ids that are read."""

    sent: tuple[str, ...]  # a text; or a query and a passage
    ids: list[int]
    second: int = 0  # of a pair: where the passage starts, for token types


class Embeddings:
    """Embeddings of one side's texts.

    Args:
        side: "query" or "passage".
    """

    def __init__(self, model: Inference, side: str) -> None:
        self.model, self.side, self.templates = model, side, model.templates
        self.length = getattr(model.encoding, f"{side}_length")
        self.before, self.tail = self.templates.before, self.templates.tails[side]
        self._given = _given(self.length)

    def texts(self, plain: bool) -> list[Text]:
        """The texts to send, with or without the prompt; the server adds the tokens at the end."""
        template = Template(self.model.encoding.template(self.side))
        retrieves = self.side == "passage"
        given = [text if retrieves else ("", text[1]) for text in self._given]
        encode = self.templates.passages if retrieves else self.templates.queries
        sent = [_joined(text) if plain else template.render(*text) for text in given]
        return [Text((one,), ids) for one, ids in zip(sent, encode(given), strict=True)]

    def readings(self, texts: list[Text], plain: bool) -> Iterator[tuple[Causes, list[Text]]]:
        """Ways to read what was sent."""
        yield {}, texts
        templates = {side: self.model.encoding.template(side) for side in ("query", "passage")}
        rendered = {side: Template(text).render("", "\0") for side, text in templates.items()}
        prompts = {side: text.partition("\0")[0] for side, text in rendered.items()}
        for prompt in ("", *prompts.values()):
            text = f"the server adds {prompt!r} to a {self.side}"
            yield {"prompt": text}, self._read(texts, prompt)
        own = prompts[self.side] if plain else ""
        end, eos = self.tail[-1:], self.templates.tokenizer.eos_token_id
        for text, tail in (
            ("no token follows a text", []),
            ("the last token is appended twice", [*self.tail, *end]),
            ("the EOS is appended, unlike in the folder", [*self.tail, eos]),
        ):
            if None not in tail:
                yield {"EOS": text}, self._read(texts, own, tail=tail)
        yield {"special tokens": "there are none"}, self._read(texts, own, before=[], tail=[])
        for text, cut in _cuts(self.length, len(self.before), len(self.tail)).items():
            yield {"truncation": text}, self._read(texts, own, cut=cut)

    def _read(
        self,
        texts: list[Text],
        prompt: str,
        before: list[int] | None = None,
        tail: list[int] | None = None,
        cut: Callable[[list[int]], list[int]] | None = None,
    ) -> list[Text]:
        """What was sent, with a prompt and ids around it, truncated by `cut` or at the end."""
        before = self.before if before is None else before
        tail = self.tail if tail is None else tail
        bodies = plain_ids(self.templates.tokenizer, [prompt + text.sent[0] for text in texts])
        room = self.length - len(before) - len(tail)
        whole = [[*before, *(ids if cut else ids[:room]), *tail] for ids in bodies]
        return [
            text._replace(ids=cut(ids) if cut else ids)
            for text, ids in zip(texts, whole, strict=True)
        ]

    def values(self, texts: list[Text]) -> Iterator[tuple[Causes, np.ndarray]]:
        """Embeddings [N, d] of texts as read, with the folder's pooling and normalization first."""
        encoding = self.model.encoding
        poolings: dict[str, Any] = {encoding.pooling: pooling_of(encoding)}
        poolings |= {"last": Last(), "mean": Mean(), "cls": Cls(), **poolings}
        states = [self._states(text.ids) for text in texts]
        for scaled in (encoding.normalize, not encoding.normalize):
            for name, pooling in poolings.items():
                pooled = torch.cat([pooling(one, torch.ones(one.shape[:2])) for one in states])
                pooled = pooled[:, : encoding.dim or None]
                causes = {}
                if name != encoding.pooling:
                    causes["pooling"] = f"{name} instead of {encoding.pooling}"
                if scaled != encoding.normalize:
                    causes["normalization"] = f"it is {'on' if scaled else 'off'}"
                yield causes, (torch.nn.functional.normalize(pooled) if scaled else pooled).numpy()

    @torch.inference_mode()
    def _states(self, ids: list[int]) -> Tensor:
        """States [1, L, d] float32 of the last layer."""
        model: Any = self.model.model
        given = torch.tensor([ids], device=self.model.device)
        mask = torch.ones_like(given)
        states = pooled_states(model.backbone, given, mask, _all_states, model.causal, full=True)
        return states.cpu()


class Scores:
    """Scores of a query with passages."""

    side = "pair"

    def __init__(self, model: Inference) -> None:
        self.model, self.templates, self.length = model, model.templates, model.templates.length
        self._given = _given(self.length)
        tokenizer, encoding = self.templates.tokenizer, model.encoding
        none: dict[str, Any] = {"query_template": "{text}", "passage_template": "{text}"}
        none |= {"prefix": "", "suffix": "", "instruction": "", "instructions": {}}
        bare = replace(encoding, **none)
        long = replace(encoding, passage_length=4 * self.length + LONG)
        self._bare, self._long = PairTemplates(tokenizer, bare), PairTemplates(tokenizer, long)

    def texts(self, plain: bool) -> list[Text]:
        """The pairs to send, with or without templates."""
        encoding, query = self.model.encoding, ("", verify.QUERY)
        pairs = self.templates.pairs([query] * len(self._given), self._given)
        first, second = (Template(encoding.template(side)) for side in ("query", "passage"))
        before = encoding.prefix + first.render(*query) + first.suffix
        gap = " " if encoding.pair == "joined" else ""
        texts = []
        for given, pair in zip(self._given, pairs, strict=True):
            sent = (before, gap + second.render(*given) + encoding.suffix)
            sent = (verify.QUERY, _joined(given)) if plain else sent
            texts.append(Text(sent, pair.ids, pair.second))
        return texts

    def readings(self, texts: list[Text], plain: bool) -> Iterator[tuple[Causes, list[Text]]]:
        """Ways to read what was sent."""
        yield {}, texts
        queries, passages = ([("", text.sent[i]) for text in texts] for i in (0, 1))
        yield (
            {"prompt": "the server applies no template"},
            _with(texts, self._bare.pairs(queries, passages)),
        )
        long = self._long.pairs(queries, passages)
        yield {"prompt": "the server applies the template to what has it"}, _with(texts, long)
        after, eos = len(self.templates.after), self.templates.tokenizer.eos_token_id
        ends: dict[str, Callable[[list[int]], list[int]]] = {
            "no token follows a text": lambda ids: ids[: len(ids) - after],
            "the last token is appended twice": lambda ids: [*ids, *ids[-1:]],
            "the EOS is appended, unlike in the folder": lambda ids: [*ids, eos],
        }
        for text, change in ends.items():
            if eos is not None:
                yield {"EOS": text}, [one._replace(ids=change(one.ids)) for one in texts]
        whole = self._long.pairs([("", verify.QUERY)] * len(texts), self._given)
        for text, cut in _cuts(self.length, len(self.templates.before), after).items():
            cut_pairs = [pair._replace(ids=cut(pair.ids)) for pair in whole]
            yield {"truncation": text}, _with(texts, cut_pairs)

    def values(self, texts: list[Text]) -> Iterator[tuple[Causes, np.ndarray]]:
        """Scores [N] of pairs as read, then their sigmoid."""
        scores = np.array([self._score(text) for text in texts], dtype=np.float32)
        yield {}, scores
        yield {"activation": "a sigmoid follows the score"}, 1 / (1 + np.exp(-scores))

    @torch.inference_mode()
    def _score(self, text: Text) -> float:
        ids = torch.tensor([text.ids], device=self.model.device)
        types = None
        if self.templates.typed:
            types = (torch.arange(ids.shape[1], device=ids.device) >= text.second).long()[None]
        return float(self.model.model(ids, torch.ones_like(ids), True, types))


def fits(model: Inference, texts: Sequence[Text]) -> bool:
    """Whether the model has positions for all texts as read; no server can read longer ones."""
    loaded: Any = model.model
    limit = positions(unwrapped(loaded.transformer).base_model)
    return limit is None or max(len(text.ids) for text in texts) <= limit


def _given(length: int) -> list[tuple[str, str]]:
    """Titles and texts, the last one longer than `length` tokens, unless that is too long."""
    return [*GIVEN, *([("", "sand dunes " * length)] if length <= LONG else [])]


def _joined(text: tuple[str, str]) -> str:
    return " ".join(filter(None, text))


def _all_states(states: Tensor, attention_mask: Tensor) -> Tensor:
    return states.float()


def _with(texts: list[Text], pairs: Sequence[Any]) -> list[Text]:
    read = zip(texts, pairs, strict=True)
    return [text._replace(ids=pair.ids, second=pair.second) for text, pair in read]


def _cuts(length: int, before: int, after: int) -> dict[str, Callable[[list[int]], list[int]]]:
    """Ways to truncate ids that are longer than `length`, by name."""

    def at(limit: int) -> Callable[[list[int]], list[int]]:
        def cut(ids: list[int]) -> list[int]:
            end = ids[len(ids) - after :]
            return ids if len(ids) <= limit else [*ids[: limit - after], *end]

        return cut

    def left(ids: list[int]) -> list[int]:
        return ids if len(ids) <= length else [*ids[:before], *ids[len(ids) - length + before :]]

    cuts: dict[str, Callable[[list[int]], list[int]]] = {
        "long texts are not truncated": lambda ids: ids,
        "long texts lose their last tokens": lambda ids: ids[:length],
        "long texts lose their start": left,
    }
    return cuts | {f"texts have at most {n} tokens": at(n) for n in LIMITS if n < length}
