"""Long documents cut into segments, the baseline to reading them whole.

A model of short texts scores a document by its first or its best segment (FirstP and MaxP, arXiv
1905.09217); LLaRA adapts a language model on segments. Segments are rows of a table, so code that
takes a corpus takes segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from caravan.data.texts import Texts

READ = 1024  # documents at once


class Segments:
    """The segments of some documents as a table of texts.

    Args:
        corpus: the documents.
        rows: [n], those to cut; any order, repeats allowed.
        words: per segment.
    """

    def __init__(self, corpus: Texts, rows: np.ndarray, words: int) -> None:
        if words < 1:
            raise ValueError(f"a segment has at least one word, not {words}")
        self.corpus = corpus
        self.words = words
        self.rows = np.unique(rows)  # [D]
        counts = np.empty(len(self.rows), dtype=np.int64)
        for start in range(0, len(self.rows), READ):
            texts = corpus.get(self.rows[start : start + READ])
            counts[start : start + READ] = [
                max(-(-len(text.split()) // words), 1) for _, text in texts
            ]
        self.counts = counts  # [D]
        self.starts = np.concatenate(([0], np.cumsum(counts)))  # [D + 1]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(segment rows end to end, how many each document has [n]) of document rows [n]."""
        at = np.searchsorted(self.rows, rows)
        counts = self.counts[at]
        ends = np.cumsum(counts)
        inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        return np.repeat(self.starts[at], counts) + inside, counts

    def last(self, segments: np.ndarray) -> np.ndarray:
        """Whether each of the segments [n] ends its document, [n] bool."""
        at = np.searchsorted(self.starts, segments, side="right")
        return self.starts[at] == segments + 1

    def get(self, segments: Sequence[int] | np.ndarray) -> list[tuple[str, str]]:
        """(title, text) of segments; each has its document's title."""
        segments = np.asarray(segments)
        at = np.searchsorted(self.starts, segments, side="right") - 1
        distinct, inverse = np.unique(at, return_inverse=True)
        documents = [(title, text.split()) for title, text in self.corpus.get(self.rows[distinct])]
        found = []
        for document, number in zip(inverse, segments - self.starts[at], strict=True):
            title, words = documents[document]
            start = int(number) * self.words
            found.append((title, " ".join(words[start : start + self.words])))
        return found
