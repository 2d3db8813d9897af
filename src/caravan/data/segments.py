"""Long documents cut into segments, the baseline to reading them whole.

A model of short texts scores a document by its first or its best segment (FirstP and MaxP, arXiv
1905.09217); LLaRA adapts a language model on segments. Segments are rows of a table, so code that
takes a corpus takes segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from caravan.data.texts import Texts

READ = 1024  # documents at once


@dataclass(frozen=True)
class Reading:
    """How much of a text a retriever or a reranker reads.

    Attributes:
        query_length, passage_length: in tokens; None keeps the length of the model folder.
        segment: None reads the document up to `passage_length`; "first" reads its first segment;
            "best" reads all segments, and the highest score is that of the document.
        segment_words: words per segment.
    """

    query_length: int | None = None
    passage_length: int | None = None
    segment: Literal["first", "best"] | None = None
    segment_words: int = 150

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths that override those of the model folder."""
        lengths = {"query_length": self.query_length, "passage_length": self.passage_length}
        return {name: length for name, length in lengths.items() if length is not None}

    @property
    def name(self) -> str:
        """The name of the run of this reading, without its ending."""
        settings = {**self.lengths, **self.segments}.items()
        return "_".join(["read", *(f"{name}_{value}" for name, value in settings)])

    @property
    def segments(self) -> dict[str, Any]:
        """The settings of segments, for the inputs of a product; empty without segments."""
        if self.segment is None:
            return {}
        return {"segment": self.segment, "segment_words": self.segment_words}


class Segments:
    """The segments of some documents as a table of texts.

    Args:
        corpus: the documents.
        rows: [n], those to cut; any order, repeats allowed.
        words: per segment.
    """

    def __init__(self, corpus: Texts, rows: np.ndarray, words: int) -> None:
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

    def documents(self, segments: np.ndarray) -> np.ndarray:
        """The corpus rows of the documents that the segments belong to."""
        return self.rows[np.searchsorted(self.starts, segments, side="right") - 1]

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


@dataclass(frozen=True)
class Cut:
    """The texts that are read of n documents: the documents, or segments of each.

    Attributes:
        texts: the corpus or its `Segments`.
        rows: rows of `texts`, document by document.
        counts: segments of each document [n]; None if each has one row.
    """

    texts: Any
    rows: np.ndarray
    counts: np.ndarray | None = None

    def repeated(self, values: np.ndarray) -> np.ndarray:
        """A value for each row, from one for each document [n]."""
        return values if self.counts is None else np.repeat(values, self.counts)

    def best(self, scores: np.ndarray) -> np.ndarray:
        """The highest score of each document [n], from one for each row."""
        if self.counts is None:
            return scores
        return np.maximum.reduceat(scores, np.cumsum(self.counts) - self.counts)

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """The corpus rows of the documents that rows of `texts` belong to."""
        return self.texts.documents(rows) if isinstance(self.texts, Segments) else rows


def cut(corpus: Any, rows: np.ndarray, reading: Reading) -> Cut:
    """Cut documents as the reading says.

    Args:
        corpus: `caravan.data.texts.Texts`.
        rows: [n] of the corpus; any order, repeats allowed.
    """
    if reading.segment is None or not len(rows):
        return Cut(corpus, rows)
    segments = Segments(corpus, rows, reading.segment_words)
    numbers, counts = segments.of(rows)
    if reading.segment == "first":
        return Cut(segments, numbers[np.cumsum(counts) - counts])
    return Cut(segments, numbers, counts)
