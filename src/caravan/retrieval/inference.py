"""A model folder opened for inference: texts to embeddings, pairs to scores.

`caravan.load`, evaluations, search and MTEB use it. Texts are computed block by block: those of a
block are sorted by length and computed in chunks under a token budget. Blocks are independent, so
memory holds only the model and one block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caravan import manifests
from caravan.data.batch import Packed
from caravan.data.batching import PairBatches, TextBatches
from caravan.data.loaders import TextLoader
from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Templates
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.models import folder as model_folder
from caravan.models import hardware, varlen
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import pack_linears
from caravan.models.crossencoder import CrossEncoder, TokenScorer
from caravan.models.digests import folder_digest
from caravan.models.positions import refuse_too_long
from caravan.models.remote_code import FACT
from caravan.progress import progress
from caravan.retrieval.store import Compute

log = logging.getLogger(__name__)

BLOCK = 1024
"""Texts per block when embedding in memory; a block is sorted by length."""


class TextList:
    """(title, text) pairs in memory with the interface of `caravan.data.texts.Texts`."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def get(self, rows: Sequence[int] | np.ndarray) -> list[tuple[str, str]]:
        return [self.texts[row] for row in rows]


class Inference:
    """A retriever that embeds texts, or a reranker that scores pairs.

    Prompts, EOS, pooling, normalization and lengths come from the folder. Weights are loaded at
    first use, so an evaluation whose embeddings and scores are on disk loads no weights.

    Args:
        folder: a model folder.
        kind: "retriever" or "reranker"; None accepts both.
        precision: "auto", "bf16" or "float32".
        token_budget: padded tokens per chunk; None chooses by device.
        num_workers: worker processes for tokenization; None: see `caravan.models.hardware.workers`.
        attention, trust_remote_code: see `caravan.models.folder.load`.
        overrides: settings that replace those of the folder's encoding: `query_length`,
            `passage_length`, `dim`; None keeps the folder's.

    Attributes:
        encoding, facts: those of the folder (`caravan.encoding.read_encoding`), with `overrides`.
        precision, given_budget: "bf16" or "float32"; `token_budget` as given.

    Raises:
        InputError: If the folder is not a model folder or has another kind than `kind`.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str | None = None,
        precision: str = "auto",
        token_budget: int | None = None,
        num_workers: int | None = 0,
        attention: str = "auto",
        trust_remote_code: bool = False,
        overrides: Mapping[str, int | None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        encoding, self.facts = read_encoding(self.folder)
        if kind not in (None, encoding.kind):
            text = f"{folder} is a {encoding.kind}; give the folder of a {kind}"
            raise InputError("wrong-model-kind", text)
        given = (overrides or {}).items()
        self.overrides = {name: value for name, value in given if value is not None}
        self.encoding = replace(encoding, **self.overrides)  # type: ignore[arg-type]
        self.precision, self.device = hardware.resolve(precision), hardware.device()
        self.token_budget, self.num_workers = hardware.chunk(token_budget), num_workers
        self.attention, self.trust_remote_code = attention, trust_remote_code
        self.given_budget = token_budget
        self._latest: Templates | PairTemplates | None = None

    @cached_property
    def _loaded(self) -> tuple[BiEncoder | CrossEncoder, Any]:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        model, tokenizer, _, _ = model_folder.load(
            self.folder, dtype, self.attention, self.trust_remote_code
        )
        if self.device.type == "cpu":
            pack_linears(model, model.output_layer if isinstance(model, TokenScorer) else None)
        if self.overrides:
            refuse_too_long(model.transformer, self.encoding, self._section)
        if "dim" in self.overrides:
            model.cut_to(self.encoding.dim, self._section)
        model = model.to(self.device)
        varlen.try_out(model, self.device)
        return model, tokenizer

    @property
    def model(self) -> BiEncoder | CrossEncoder:
        """The network, on the device."""
        return self._loaded[0]

    @property
    def templates(self) -> Any:
        """Tokenizes texts (`Templates`) or pairs (`PairTemplates`)."""
        return self.reading(None)

    def reading(self, instruction: str | None) -> Any:
        """The templates with an instruction; None for that of the encoding.

        Raises:
            InputError: "invalid-encoding" if the encoding has no place for an instruction.
        """
        encoding = self.encoding
        if instruction is not None:
            encoding = replace(encoding, instruction=instruction)
        if self._latest is None or self._latest.encoding != encoding:
            tokenizer = self._loaded[1]
            if encoding.kind == "retriever":
                self._latest = Templates(tokenizer, encoding)
            else:
                self._latest = PairTemplates(tokenizer, encoding, self._section.rstrip("."))
        return self._latest

    @property
    def _section(self) -> str:
        """The prefix of the settings that determine lengths and size, for messages."""
        if not self.overrides:
            return "encoding."
        return "" if self.encoding.kind == "retriever" else "rerank."

    @property
    def dim(self) -> int | None:
        """Dimensions of an embedding, without loading weights; None if only remote code knows."""
        config = model_folder.config_of(self.folder, self.trust_remote_code)
        return self.encoding.dim or getattr(config.get_text_config(), "hidden_size", None)

    def load(self) -> None:
        """Load the weights now."""
        _ = self.templates

    def check_settings(self) -> None:
        """Raise an InputError if the model has too few positions or dimensions, without weights."""
        model_folder.refuse_unsuitable(
            self.folder, self.encoding, self._section, self.trust_remote_code
        )

    def embed(
        self, texts: Sequence[tuple[str, str]], side: str, instruction: str | None = None
    ) -> np.ndarray:
        """Embeddings [N, d] float32 of texts in memory.

        Args:
            texts: (title, text) of passages; ("" or its own instruction, text) of queries.
            side: "query" or "passage".
            instruction: of the collection; None for that of the encoding.
        """
        rows, templates = np.arange(len(texts)), self.reading(instruction)
        given: Any = TextList(texts)
        return self._in_memory(TextBatches(given, rows, templates, side, BLOCK, self.token_budget))

    def score_pairs(
        self,
        queries: Sequence[tuple[str, str]],
        passages: Sequence[tuple[str, str]],
        instruction: str | None = None,
    ) -> np.ndarray:
        """Scores [N] float32 of pairs in memory; arguments as in `embed`."""
        rows, templates = np.arange(len(queries)), self.reading(instruction)
        texts: tuple[Any, Any] = TextList(queries), TextList(passages)
        return self._in_memory(PairBatches(*texts, rows, rows, templates, BLOCK, self.token_budget))

    def encode_rows(
        self, texts: Any, rows: np.ndarray, side: str, block: int, instruction: str | None = None
    ) -> Compute:
        """Return a function that yields the embeddings [n, d] float16 of each of some blocks.

        Args:
            texts: `caravan.data.texts.Texts`.
            rows: text rows [N] int64; row i of the embeddings is the text at rows[i].
            side, instruction: see `embed`.
            block: texts per block.
        """

        def blocks() -> TextBatches:
            templates = self.reading(instruction)
            return TextBatches(texts, rows, templates, side, block, self.token_budget)

        unit = "queries" if side == "query" else "passages"
        limit = getattr(self.encoding, f"{side}_length")
        return partial(self._computed, blocks, len(rows), unit, limit)

    def score_rows(
        self,
        queries: Any,
        corpus: Any,
        query_rows: np.ndarray,
        passage_rows: np.ndarray,
        block: int,
        instruction: str | None = None,
    ) -> Compute:
        """Return a function that yields the scores [n] float32 of each of some blocks.

        Args:
            query_rows, passage_rows: rows of the pairs, [N] int64.
            The others: see `encode_rows`.
        """

        def blocks() -> PairBatches:
            rows, templates = (query_rows, passage_rows), self.reading(instruction)
            return PairBatches(queries, corpus, *rows, templates, block, self.token_budget)

        limit = self.encoding.query_length + self.encoding.passage_length
        return partial(self._computed, blocks, len(query_rows), "pairs", limit)

    def _in_memory(self, blocks: TextBatches | PairBatches) -> np.ndarray:
        parts = [self._rows(blocks[i].packed().texts) for i in range(len(blocks))]
        return torch.cat(parts).float().cpu().numpy()

    def _computed(
        self,
        make: Callable[[], TextBatches | PairBatches],
        size: int,
        unit: str,
        limit: int,
        missing: list[int],
    ) -> Iterator[np.ndarray]:
        """Yield the results of the missing blocks, with log lines and a progress bar.

        Args:
            make: loads the model, and makes the blocks of all `size` texts or pairs (`unit`), which
                are cut at `limit` tokens.
        """
        blocks = make()
        what, dtype = ("rerank", torch.float32) if unit == "pairs" else ("encode", torch.float16)
        left = sum(min(blocks.batch_size, size - i * blocks.batch_size) for i in missing)
        device = hardware.named(self.device)
        log.info(f"{what} {left:,} {unit} with {self.folder} on {device}, {self.precision}")
        workers = hardware.workers(self.num_workers, hardware.parameter_counts(self.model)[1])
        full = 0
        with progress(f"{what} {unit}", left, unit) as done:
            for batch in TextLoader(blocks, missing, min(workers, len(missing))):
                full += batch.texts.full(limit)
                yield self._rows(batch.texts, done).to(dtype).cpu().numpy()
        if full:
            log.info(f"{full:,} of {left:,} {unit} have {limit} tokens: what is longer is cut")

    def _rows(self, packed: Packed, done: Callable[[int], object] | None = None) -> Tensor:
        """Embeddings [N, d] or scores [N]; calls `done` with the number of texts of each chunk."""
        with torch.inference_mode():
            rows = packed.to(self.device, non_blocking=True).rows_of(self.model.of, done)
            finite = bool(rows.isfinite().all())
        if not finite:
            raise InputError(
                "diverged-model",
                f"{self.folder} computes values that are NaN or infinite: its config.json or its"
                " weights are damaged, or its training diverged; train or download it again",
            )
        return rows


@dataclass
class Models:
    """Opens model folders with the settings of one evaluation, keeping one model in memory.

    A 7B retriever and a 7B reranker are therefore never on the device together, and the collections
    of a suite share the loaded model. Arguments: see `Inference`.
    """

    precision: str = "auto"
    token_budget: int | None = None
    num_workers: int | None = None
    attention: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.digest = lru_cache(maxsize=None)(folder_digest)
        self._open: tuple[Any, Inference] | None = None

    def inputs(self, folder: Path) -> dict[str, Any]:
        """The settings that determine a model's embeddings and scores, for a manifest."""
        remote_code = read_encoding(folder)[1].get(FACT)  # not recorded by older versions
        return {
            "model": self.digest(folder),
            "precision": self.precision,
            "token_budget": self.token_budget,
            "attention": self.attention,
            "remote_code": self.trust_remote_code if remote_code is None else remote_code,
            "versions": manifests.versions(),
        }

    def new(self, folder: Path, kind: str, overrides: Mapping[str, int]) -> Inference:
        """Open a model without closing the current one."""
        settings = (self.precision, self.token_budget, self.num_workers, self.attention)
        return Inference(folder, kind, *settings, self.trust_remote_code, overrides)

    def open(self, folder: Path, kind: str, overrides: Mapping[str, int]) -> Inference:
        """Open a model in place of the current one; returns the current one if it matches."""
        key = (folder, kind, tuple(sorted(overrides.items())))
        if self._open is None or self._open[0] != key:
            self._open = None  # free its memory before loading the next one
            self._open = key, self.new(folder, kind, overrides)
        return self._open[1]
