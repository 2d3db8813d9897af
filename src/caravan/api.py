"""A trained folder in Python: texts to embeddings, pairs to scores, questions to passages.

    import caravan

    model = caravan.load("runs/mine/retriever/model")
    embeddings = model.encode_passages(["Oases lie a day apart.", ("Salt", "It was gold's equal.")])
    for hit in model.search(["what was salt worth?"], embeddings, k=1)[0]:
        print(hit.row, hit.score)

The folder brings prompts, EOS, pooling and lengths; numbers are those that `evaluate.py` computes
in the same precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caravan.data.batch import Packed, pack
from caravan.data.batching import pair_ids
from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Templates
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.models import folder as model_folder
from caravan.models import hardware
from caravan.models.cpu import pack_linears
from caravan.retrieval.index import ArrayBlocks, Exact

Text = str | tuple[str, str]
"""A text, or a title and a text."""
BLOCK = 1024  # texts that are sorted by length together


@dataclass(frozen=True)
class Hit:
    """A passage that was found: its place among those that were given, and its score."""

    row: int
    score: float


class _Loaded:
    """A model folder on this machine's device."""

    reads: type[Templates] | type[PairTemplates]

    def __init__(
        self,
        folder: str | Path,
        precision: str = "auto",
        token_budget: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.precision = hardware.resolve(precision)
        self.device = hardware.device()
        self.token_budget = hardware.chunk(token_budget)
        dtype = hardware.dtype(self.precision)
        model, self.tokenizer, self.encoding, self.facts = model_folder.load(
            self.folder, dtype, trust_remote_code=trust_remote_code
        )
        if self.device.type == "cpu":
            pack_linears(model)
        self.model: Any = model.to(self.device)
        self._templates: Any = self.reads(self.tokenizer, self.encoding)

    def _rows(self, packed: Packed) -> np.ndarray:
        with torch.inference_mode():
            rows = packed.to(self.device).rows_of(self.model.of)
            found: np.ndarray = rows.float().cpu().numpy()
        if not np.isfinite(found).all():
            raise InputError(
                f"{self.folder} computes values that are NaN or infinite; its config.json or its"
                " weights are damaged, or its training has diverged: train or download it again"
            )
        return found


class Retriever(_Loaded):
    """Embeds queries and passages; of `caravan.load`."""

    reads = Templates

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return self.encode_queries([""]).shape[1]

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """Embeddings [N, dim] float32 of queries."""
        return self._encoded(_asked(queries), "queries")

    def encode_passages(self, passages: Sequence[Text]) -> np.ndarray:
        """Embeddings [N, dim] float32 of passages, each a text, or a title and a text."""
        return self._encoded(_titled(passages), "passages")

    def score(self, queries: Sequence[str], passages: Sequence[Text]) -> np.ndarray:
        """Similarities [N] float32 of queries with passages, pair by pair."""
        _refuse_uneven(queries, passages)
        return np.einsum("nd,nd->n", self.encode_queries(queries), self.encode_passages(passages))

    def search(
        self, queries: Sequence[str], passages: Sequence[Text] | np.ndarray, k: int = 10
    ) -> list[list[Hit]]:
        """The k passages most like each query, the best first.

        Args:
            passages: texts, or their embeddings as `encode_passages` gives them.
        """
        _refuse_few(k)
        found = passages if isinstance(passages, np.ndarray) else self.encode_passages(passages)
        asked = self.encode_queries(queries)
        if not len(found) or not len(asked):
            return [[] for _ in asked]
        if found.dtype.kind != "f" or found.shape != (len(found), asked.shape[1]):
            raise InputError(
                f"the passages are an array {list(found.shape)} of {found.dtype}; give embeddings"
                f" [N, {asked.shape[1]}] of encode_passages, or a list of texts"
            )
        index = Exact(k=min(k, len(found)))
        index.build(ArrayBlocks(np.ascontiguousarray(found, dtype=np.float32)))
        return _hits(*index.search(asked))

    def _encoded(self, texts: list[tuple[str, str]], side: str) -> np.ndarray:
        encode = getattr(self._templates, side)
        pad = self._templates.pad_id
        blocks = [
            self._rows(pack(encode(block), self.token_budget, pad)) for block in _blocks(texts)
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, self.dim), dtype=np.float32)


class Reranker(_Loaded):
    """Scores pairs of a query and a passage; of `caravan.load`."""

    reads = PairTemplates

    def score(self, queries: Sequence[str], passages: Sequence[Text]) -> np.ndarray:
        """Scores [N] float32 of queries with passages, pair by pair; the higher the better."""
        _refuse_uneven(queries, passages)
        pairs = list(zip(_asked(queries), _titled(passages), strict=True))
        blocks = []
        for block in _blocks(pairs):
            asked, read = zip(*block, strict=True)
            pairs_read = pair_ids(self._templates, asked, read)
            blocks.append(self._rows(pairs_read.packed(self.token_budget, self._templates.pad_id)))
        return np.concatenate(blocks) if blocks else np.empty(0, dtype=np.float32)

    def search(
        self, queries: Sequence[str], passages: Sequence[Text], k: int = 10
    ) -> list[list[Hit]]:
        """The k passages that score best for each query, every one of them read with it."""
        _refuse_few(k)
        read = _titled(passages)
        number = len(read)
        asked = [query for query in _listed(queries) for _ in read]
        scores = self.score(asked, read * len(queries)).reshape(len(queries), number)
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return _hits(np.take_along_axis(scores, rows, axis=1), rows)


def load(
    folder: str | Path,
    precision: str = "auto",
    token_budget: int | None = None,
    trust_remote_code: bool = False,
) -> Retriever | Reranker:
    """Load a model folder.

    Args:
        folder: that a training left, or a released model that was adopted.
        precision: "bf16", "float32", or "auto": bf16 where the processor computes in it. Compare
            with other libraries in float32.
        token_budget: padded tokens that are computed at a time; None leaves them to the machine.
        trust_remote_code: run code that the model brings along; read it first.

    Raises:
        InputError: it is no model folder, something in it is missing or broken, or it wants code
            of its own that may not run.
    """
    kind = Retriever if read_encoding(Path(folder))[0].kind == "retriever" else Reranker
    return kind(folder, precision, token_budget, trust_remote_code)


def _listed(texts: Sequence[str]) -> Sequence[str]:
    """A single text would be taken for a list of letters."""
    if isinstance(texts, str):
        raise InputError(f"give a list of texts, such as [{texts!r}], not one text")
    return texts


def _asked(queries: Sequence[str]) -> list[tuple[str, str]]:
    listed = list(_listed(queries))
    for row, query in enumerate(listed):
        if not isinstance(query, str):
            raise InputError(f"query {row} is of type {type(query).__name__}; give texts")
    return [("", query) for query in listed]


def _titled(passages: Sequence[Text]) -> list[tuple[str, str]]:
    _listed(passages)  # type: ignore[arg-type]
    pairs: list[Any] = [("", one) if isinstance(one, str) else one for one in passages]
    for row, pair in enumerate(pairs):
        whole = isinstance(pair, tuple | list) and len(pair) == 2
        if not whole or not all(isinstance(part, str) for part in pair):
            raise InputError(
                f"passage {row} is of type {type(pair).__name__}; give texts, or pairs of a title"
                " and a text"
            )
    return pairs


def _refuse_few(k: int) -> None:
    if k < 1:
        raise InputError(f"k={k}: give the number of passages that a query is to have, 1 or more")


def _refuse_uneven(queries: Sequence[str], passages: Sequence[Text]) -> None:
    if len(_listed(queries)) != len(passages):
        raise InputError(
            f"there are {len(queries)} queries and {len(passages)} passages; give a passage for"
            " each query, or use search"
        )


def _blocks(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), BLOCK):
        yield items[start : start + BLOCK]


def _hits(scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
    return [
        [Hit(int(row), float(score)) for row, score in zip(*pair, strict=True)]
        for pair in zip(rows, scores, strict=True)
    ]
