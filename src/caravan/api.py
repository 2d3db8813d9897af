"""A trained folder in Python: texts to embeddings, pairs to scores, queries to passages.

    import caravan

    model = caravan.load("runs/mine/retriever/model")
    embeddings = model.encode_passages(["Oases lie a day apart.", ("Salt", "It was gold's equal.")])
    for hit in model.search(["what was salt worth?"], embeddings, k=1)[0]:
        print(hit.row, hit.score)

The folder brings prompts, EOS, pooling and lengths; the numbers are those of `evaluate.py` in the
same precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.retrieval.exact import Exact
from caravan.retrieval.index import ArrayBlocks
from caravan.retrieval.inference import Inference

Text = str | tuple[str, str]
"""A passage: a text, or a title and a text. A query: a text, or an instruction and a text."""


@dataclass(frozen=True)
class Hit:
    """A retrieved passage: its place among the given ones, and its score."""

    row: int
    score: float


class Retriever(Inference):
    """Embeds queries and passages; returned by `caravan.load`.

    `instruction` of a method is for all its texts; None is the default of the model. That of a
    collection is `model.encoding.instruction_of(name)`.
    """

    @property
    def dim(self) -> int:
        """Dimensions of an embedding."""
        return self.encode_queries([""]).shape[1]

    def encode_queries(self, queries: Sequence[Text], instruction: str | None = None) -> np.ndarray:
        """Embeddings [N, dim] float32 of queries."""
        return self._encode(queries, "query", instruction)

    def encode_passages(
        self, passages: Sequence[Text], instruction: str | None = None
    ) -> np.ndarray:
        """Embeddings [N, dim] float32 of passages."""
        return self._encode(passages, "passage", instruction)

    def score(
        self, queries: Sequence[Text], passages: Sequence[Text], instruction: str | None = None
    ) -> np.ndarray:
        """Similarities [N] float32 of queries with passages, pair by pair."""
        asked, texts = _aligned(queries, passages)
        vectors = self.encode_passages(texts, instruction)
        return np.einsum("nd,nd->n", self.encode_queries(asked, instruction), vectors)

    def search(
        self,
        queries: Sequence[Text],
        passages: Sequence[Text] | np.ndarray,
        k: int = 10,
        instruction: str | None = None,
    ) -> list[list[Hit]]:
        """The k most similar passages of each query, the best first.

        Args:
            passages: texts, or their embeddings by `encode_passages`.
        """
        _check_k(k)
        vectors = passages
        if not isinstance(vectors, np.ndarray):
            vectors = self.encode_passages(vectors, instruction)
        query_vectors = self.encode_queries(queries, instruction)
        if not len(vectors) or not len(query_vectors):
            return [[] for _ in query_vectors]
        dim = query_vectors.shape[1]
        if vectors.dtype.kind != "f" or vectors.shape != (len(vectors), dim):
            raise InputError(
                "wrong-shape",
                f"the passages are an array {list(vectors.shape)} of {vectors.dtype}; give"
                f" embeddings [N, {dim}] of encode_passages, or a list of texts",
            )
        index = Exact(k=min(k, len(vectors)))
        index.build(ArrayBlocks(np.ascontiguousarray(vectors, dtype=np.float32)))
        return _hits(*index.search(query_vectors))

    def _encode(self, texts: Sequence[Text], side: str, instruction: str | None) -> np.ndarray:
        if not (pairs := _pairs(texts, side)):
            return np.empty((0, self.dim), dtype=np.float32)
        return self.embed(pairs, side, instruction)


class Reranker(Inference):
    """Scores pairs of a query and a passage; returned by `caravan.load`.

    For `instruction` see `Retriever`.
    """

    def score(
        self, queries: Sequence[Text], passages: Sequence[Text], instruction: str | None = None
    ) -> np.ndarray:
        """Scores [N] float32 of queries with passages, pair by pair; higher is better."""
        asked, texts = _aligned(queries, passages)
        if not asked:
            return np.empty(0, dtype=np.float32)
        return self.score_pairs(asked, texts, instruction)

    def search(
        self,
        queries: Sequence[Text],
        passages: Sequence[Text],
        k: int = 10,
        instruction: str | None = None,
    ) -> list[list[Hit]]:
        """The k passages with the highest scores of each query; scores every pair."""
        _check_k(k)
        asked, texts = _pairs(queries, "query"), _pairs(passages, "passage")
        repeated = [query for query in asked for _ in texts]
        flat = self.score(repeated, texts * len(asked), instruction)
        scores = flat.reshape(len(asked), len(texts))
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return _hits(np.take_along_axis(scores, rows, axis=1), rows)


def load(
    folder: str | Path,
    precision: str = "auto",
    token_budget: int | None = None,
    trust_remote_code: bool = False,
    dim: int | None = None,
) -> Retriever | Reranker:
    """Load a model folder.

    Args:
        folder: written by a training, or an adopted released model.
        precision: "bf16", "float32", or "auto": bf16 where the processor computes in it. Use
            float32 to compare with other libraries.
        token_budget: padded tokens that are computed at a time; None chooses by device.
        trust_remote_code: run remote code of the model; review it first.
        dim: of a retriever: keep the first dimensions of an embedding; None is as in training.

    Raises:
        InputError: If the folder is not a model folder, a file is missing or damaged, the model
            needs remote code and `trust_remote_code` is false, or it has fewer dimensions.
    """
    retrieves = read_encoding(Path(folder))[0].kind == "retriever"
    model = (Retriever if retrieves else Reranker)(
        folder,
        precision=precision,
        token_budget=token_budget,
        trust_remote_code=trust_remote_code,
        overrides={"dim": dim},
    )
    model.load()
    return model


def _pairs(texts: Sequence[Text], side: str) -> list[tuple[str, str]]:
    """(title, text) of passages, (instruction, text) of queries; "" where there is only a text."""
    if isinstance(texts, str):  # a sequence of letters
        raise InputError(
            "not-a-list", f"give a list of texts, such as [{texts!r}], instead of one text"
        )
    pairs: list[Any] = [("", one) if isinstance(one, str) else one for one in texts]
    for row, pair in enumerate(pairs):
        whole = isinstance(pair, tuple | list) and len(pair) == 2
        if not whole or not all(isinstance(part, str) for part in pair):
            before = "an instruction" if side == "query" else "a title"
            raise InputError(
                "not-a-text",
                f"{side} {row} is of type {type(pair).__name__}; give texts, or pairs of {before}"
                " and a text",
            )
    return pairs


def _check_k(k: int) -> None:
    if k < 1:
        raise InputError(
            "out-of-range", f"k={k}: give the number of passages per query, at least 1"
        )


def _aligned(
    queries: Sequence[Text], passages: Sequence[Text]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Queries and passages as pairs of texts, as many of one as of the other."""
    asked, texts = _pairs(queries, "query"), _pairs(passages, "passage")
    if len(asked) != len(texts):
        raise InputError(
            "uneven-pairs",
            f"there are {len(queries)} queries and {len(passages)} passages; give a passage for"
            " each query, or use search",
        )
    return asked, texts


def _hits(scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
    return [
        [Hit(int(row), float(score)) for row, score in zip(*pair, strict=True)]
        for pair in zip(rows, scores, strict=True)
    ]
