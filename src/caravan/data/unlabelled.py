"""Unlabelled text for LLaRA: chunks of documents, and the sets of tokens their slots are to tell.

A document is cut into consecutive chunks of so many words. EBAE's target is the chunk itself,
EBAR's the chunk that follows; the last one of a document has none, which costs nothing and is
counted (arXiv 2312.15503, section 3.2; "content" targets are those of the released code).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from caravan.data.batch import AdaptationBatch, Fields, TokenIds, Unpacked
from caravan.data.batching import Permutation
from caravan.data.segments import Segments
from caravan.data.tokenization import JointTemplates
from caravan.errors import InputError

TARGETS = ("all", "content")
TASKS = ("ebae", "ebar")

_NO_WORD = re.compile(r"[\W_]+")


class Targets:
    """Texts to the sets of tokens that stand for them.

    Args:
        kind: "all" tokens, or of "content" words only: no punctuation and no English stop words
            (NLTK's list, as bm25s carries it).
    """

    def __init__(self, templates: JointTemplates, kind: str) -> None:
        if kind not in TARGETS:
            raise InputError(f"stage.targets is {kind!r}; it must be one of {', '.join(TARGETS)}")
        self.templates = templates
        self.stop_words: frozenset[str] = frozenset()
        if kind == "content":
            from bm25s.stopwords import STOPWORDS_EN_PLUS

            self.stop_words = frozenset(STOPWORDS_EN_PLUS)

    def __call__(self, texts: Sequence[str], read: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Distinct token ids of each text, ascending.

        Args:
            read: the texts' token ids, as far as they are read.
        """
        if self.stop_words:
            whole = zip(texts, read, strict=True)
            seen = [self.templates.beginning_of(text, ids) for text, ids in whole]
            read = self.templates.plain([self.content(text) for text in seen])
        return [np.unique(np.asarray(ids, dtype=np.int64)) for ids in read]

    def content(self, text: str) -> str:
        """The text's words without punctuation and stop words."""
        words = _NO_WORD.sub(" ", text).split()
        return " ".join(word for word in words if word.lower() not in self.stop_words)


class Unlabelled(Dataset[Unpacked[AdaptationBatch]]):
    """Batches of chunks: item (epoch, positions) is the batch at these places of the epoch.

    Args:
        corpus: documents.
        targets: "all" or "content", see `Targets`.
        words: of a chunk.
        tasks: of TASKS, those that are trained, in the order of the prompts.
        seed: with the epoch gives the order.

    Raises:
        InputError: EBAR is trained, and no chunk has one that follows.
    """

    def __init__(
        self,
        corpus: Any,
        templates: JointTemplates,
        targets: str,
        words: int,
        tasks: Sequence[str],
        token_budget: int,
        seed: int,
    ) -> None:
        self.chunks = Segments(corpus, np.arange(len(corpus)), words)
        self.templates = templates
        self.targets = Targets(templates, targets)
        self.tasks = tuple(tasks)
        self.token_budget = token_budget
        self.seed = seed
        self.permutation = Permutation(np.arange(len(self.chunks)), seed)
        self.followed = len(self.chunks) - len(self.chunks.rows)
        if "ebar" in tasks and not self.followed:
            raise InputError(
                f"no passage has more than {words} words, so that no chunk of them is followed by"
                " another and EBAR has nothing to tell; lower stage.words, or leave ebar out of"
                " stage.tasks"
            )

    def __len__(self) -> int:
        return len(self.chunks)

    def told(self, name: str, batch: int, accumulated: int) -> str:
        """What is trained on, in one line."""
        return (
            f"{len(self):,} chunks of {self.chunks.words} words from {len(self.chunks.rows):,}"
            f" passages of {name}, {self.followed:,} of them followed by another;"
            f" {batch * accumulated} chunks an update"
        )

    def __getitem__(self, item: tuple[int, np.ndarray]) -> Unpacked[AdaptationBatch]:
        epoch, positions = item
        chunks = self.permutation(epoch)[positions]
        read = self.chunks.get(chunks)
        ids, own = self.templates.encode(read)
        sets: dict[str, list[np.ndarray]] = {}
        if "ebae" in self.tasks:
            sets["ebae"] = self.targets([f"{title} {text}".strip() for title, text in read], own)
        if "ebar" in self.tasks:
            following = self.following(chunks)
            sets["ebar"] = self.targets(following, self.templates.plain(following))
        in_order = [sets[task][i] for i in range(len(chunks)) for task in self.tasks]
        counts = np.array([len(tokens) for tokens in in_order], dtype=np.int64)
        flat = np.concatenate(in_order) if in_order else np.zeros(0, dtype=np.int64)
        fields: Fields = {
            "texts": TokenIds.of(ids),
            "targets": flat,
            "counts": counts.reshape(len(chunks), len(self.tasks)),
        }
        return Unpacked(AdaptationBatch, fields, self.token_budget, self.templates.pad_id)

    def following(self, chunks: np.ndarray) -> list[str]:
        """The text after each chunk in its document, empty where there is none."""
        last = self.chunks.last(chunks)
        texts = iter(self.chunks.get(chunks[~last] + 1))
        return ["" if end else next(texts)[1] for end in last]
