"""Unlabelled text for LLaRA: segments of documents, and the sets of tokens to predict from slots.

EBAE's target is a segment of a document itself, EBAR's the segment that follows, which the last one
does not have (arXiv 2312.15503, section 3.2; "content" targets are those of the released code).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from bm25s.stopwords import STOPWORDS_EN_PLUS

from caravan.data.batch import AdaptationBatch, Fields, TokenIds, Unpacked
from caravan.data.batching import Permutation, TrainingSet
from caravan.data.segments import Segments
from caravan.data.texts import Texts
from caravan.data.tokenization import Template, Templates, check_room, ids_of, token_ids
from caravan.encoding import Encoding
from caravan.errors import InputError

TASKS = ("ebae", "ebar")

_NO_WORD = re.compile(r"[\W_]+")


class JointTemplates:
    """Turns texts into token ids that end with several prompts, for one pass (`models.llara`).

    Args:
        encoding: its passage template gives the opening before the text, `passage_length` the
            length of the whole.
        prompts: the end of the text for each task, such as that with `{self}`.

    Attributes:
        prompts: tokens of each prompt.
        skipped: tokens before the text.

    Raises:
        InputError: "no-room-for-text"; see `Templates`.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding, prompts: Sequence[str]) -> None:
        single = Templates(tokenizer, encoding)
        self.tokenizer = tokenizer
        self.before, self.pad_id = single.before, single.pad_id
        self._text = Template(encoding.template("passage"))
        ends = [
            Template(f"{{text}}{prompt}").tail(tokenizer, encoding, single.after)
            for prompt in prompts
        ]
        self.prompts = tuple(map(len, ends))
        self.end = [token for end in ends for token in end]
        # A space before the text belongs to its first word.
        opening = self._text.untitled.partition("{text}")[0].rstrip()
        self._opening = len(ids_of(tokenizer, opening))
        self.skipped = len(self.before) + self._opening
        self.room = encoding.passage_length - len(self.before) - len(self.end)
        check_room(f"encoding.passage_length={encoding.passage_length}", self.room, len(self.end))

    def encode(self, texts: Sequence[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of (title, text) with the prompts, and those of the text alone."""
        read = self.plain([self._text.render(title, text) for title, text in texts])
        with_prompts = [[*self.before, *ids, *self.end] for ids in read]
        return with_prompts, [ids[self._opening :] for ids in read]

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts without anything around them, as many as there is room for."""
        return [ids[: self.room] for ids in token_ids(self.tokenizer, list(texts), self.room)]

    def covered(self, text: str, ids: Sequence[int]) -> str:
        """The part of a text that its token ids cover, if the text was truncated."""
        if len(ids) < self.room - self._opening:
            return text
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Unlabelled(TrainingSet):
    """Batches of segments: item (epoch, positions) is the batch at these positions of the epoch.

    Args:
        corpus: documents.
        targets: "all" tokens, or those of "content" words: no punctuation and no English stop
            words (NLTK's list, as in bm25s).
        words: of a segment.
        tasks: those of TASKS to train, in the order of the prompts.
        seed: with the epoch gives the order.

    Raises:
        InputError: "nothing-follows", EBAR is trained and no document has two segments.
    """

    def __init__(
        self,
        corpus: Texts,
        templates: JointTemplates,
        targets: Literal["all", "content"],
        words: int,
        tasks: Sequence[str],
        token_budget: int,
        seed: int,
    ) -> None:
        self.segments = Segments(corpus, np.arange(len(corpus)), words)
        self.templates = templates
        self.stop_words = frozenset(STOPWORDS_EN_PLUS) if targets == "content" else frozenset()
        self.tasks = tuple(tasks)
        self.token_budget, self.seed = token_budget, seed
        self.permutation = Permutation(np.arange(len(self.segments)), seed)
        self.followed = len(self.segments) - len(self.segments.rows)
        if "ebar" in tasks and not self.followed:
            raise InputError(
                "nothing-follows",
                f"no passage has more than {words} words, so EBAR has no following segment to"
                " predict; lower stage.words, or leave ebar out of stage.tasks",
            )

    def __len__(self) -> int:
        return len(self.segments)

    def summary(self, name: str, batch: int, accumulated: int) -> str:
        return (
            f"{len(self):,} segments of {self.segments.words} words from"
            f" {len(self.segments.rows):,} passages of {name}, {self.followed:,} of them followed"
            f" by another; {batch * accumulated} segments an update"
        )

    def __getitem__(self, item: tuple[int, np.ndarray]) -> Unpacked[AdaptationBatch]:
        epoch, positions = item
        rows = self.permutation(epoch)[positions]
        texts = self.segments.get(rows)
        ids, own = self.templates.encode(texts)
        sets: dict[str, list[np.ndarray]] = {}
        if "ebae" in self.tasks:
            sets["ebae"] = self.targets([f"{title} {text}".strip() for title, text in texts], own)
        if "ebar" in self.tasks:
            following = self.following(rows)
            sets["ebar"] = self.targets(following, self.templates.plain(following))
        in_order = [sets[task][i] for i in range(len(rows)) for task in self.tasks]
        counts = np.array([len(tokens) for tokens in in_order], dtype=np.int64)
        fields: Fields = {
            "texts": TokenIds.of(ids),
            "targets": np.concatenate([np.zeros(0, dtype=np.int64), *in_order]),
            "counts": counts.reshape(len(rows), len(self.tasks)),
        }
        return Unpacked(AdaptationBatch, fields, self.token_budget, self.templates.pad_id)

    def following(self, rows: np.ndarray) -> list[str]:
        """The text after each segment in its document, empty at the end of the document."""
        last = self.segments.last(rows)
        texts = iter(self.segments.get(rows[~last] + 1))
        return ["" if end else next(texts)[1] for end in last]

    def targets(self, texts: Sequence[str], read: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Distinct token ids of each text, ascending; `read` are the ids of the truncated texts."""
        if self.stop_words:
            covered = map(self.templates.covered, texts, read)
            read = self.templates.plain([self.content(text) for text in covered])
        return [np.unique(np.asarray(ids, dtype=np.int64)) for ids in read]

    def content(self, text: str) -> str:
        """The text's words without punctuation and stop words."""
        words = _NO_WORD.sub(" ", text).split()
        return " ".join(word for word in words if word.lower() not in self.stop_words)
