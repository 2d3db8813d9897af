"""A corpus to embeddings on disk: float16 shards, written block by block, resumed after a kill.

A block of passages is sorted by length, embedded in chunks under a token budget, and written to
`00000042.npy` beside its final name before it is renamed. The next start keeps whole blocks and
computes the others; since a block is computed on its own, the files are the same bytes either way.
Memory is that of one block and the model, whatever the corpus' size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caravan.data.batch import Packed, pack
from caravan.data.batching import TextBlocks
from caravan.data.loaders import text_loader
from caravan.data.texts import Texts
from caravan.data.tokenization import Templates
from caravan.encoding import read_encoding
from caravan.models import folder as model_folder
from caravan.models import hardware
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import pack_linears
from caravan.models.positions import refuse_too_long
from caravan.progress import progress
from caravan.retrieval.shards import ShardFiles, fill

log = logging.getLogger(__name__)


class Shards:
    """Embeddings on disk, in row order: block i holds the rows from i * block on.

    `for start, vectors in shards` walks the blocks ([n, dim] float16, memory-mapped).
    """

    def __init__(self, files: ShardFiles, rows: int, block: int) -> None:
        self.files = files
        self.rows = rows
        self.block = block
        self.dim = int(files.read(0).shape[1])

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.rows, self.block):
            yield start, self.files.read(start // self.block)

    def read(self) -> np.ndarray:
        """All embeddings [rows, dim] float32; for queries, or a corpus that fits in memory."""
        return np.concatenate([vectors for _, vectors in self]).astype(np.float32)


class Encoder:
    """A model folder that embeds; it brings its own prompts, EOS, pooling and lengths.

    Args:
        folder: the model folder. Its weights load when the first text that is not on disk comes.
        precision: "auto", "bf16" or "float32".
        lengths: `query_length` and `passage_length` that replace the encoding's.
        token_budget: padded tokens a chunk; None leaves them to the machine.
        block: texts a shard.
        num_workers: processes that tokenise ahead.
        attention, trust_remote_code: as in `caravan.models.folder.load`.
    """

    def __init__(
        self,
        folder: Path,
        precision: str,
        lengths: dict[str, int],
        token_budget: int | None,
        block: int,
        num_workers: int,
        attention: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self.precision = hardware.resolve(precision)
        self.token_budget = hardware.chunk(token_budget)
        self.block = block
        self.num_workers = num_workers
        self.how: dict[str, Any] = {
            "attention": attention,
            "trust_remote_code": trust_remote_code,
        }
        self.device = hardware.device()
        self.encoding = replace(read_encoding(folder)[0], **lengths)  # type: ignore[arg-type]

    @cached_property
    def loaded(self) -> tuple[BiEncoder, Templates]:
        model, tokenizer, _, _ = model_folder.load(
            self.folder, hardware.dtype(self.precision), "retriever", **self.how
        )
        if self.device.type == "cpu":
            pack_linears(model)
        refuse_too_long(model.backbone, self.encoding, "")
        return model.to(self.device), Templates(tokenizer, self.encoding)

    def inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """The inputs in the manifest of embeddings, of those that `encode` is given."""
        return {**given, "resolved_precision": self.precision}

    def queries(self, questions: Sequence[str]) -> np.ndarray:
        """Embeddings [Q, dim] float32 of queries that are in no collection, rounded as on disk."""
        _, templates = self.loaded
        ids = templates.queries([("", question) for question in questions])
        with torch.inference_mode():
            return self._vectors(pack(ids, self.token_budget, templates.pad_id)).astype(np.float32)

    def encode(
        self, texts: Texts, rows: np.ndarray, side: str, folder: Path, inputs: dict[str, Any]
    ) -> Shards:
        """Embed texts into `folder`, or what an interrupted start left to do.

        Args:
            rows: which texts, [N] int64; row i of the embeddings is the text at rows[i].
            side: "query" or "passage".
            inputs: digests and settings that determine the embeddings.
        """
        inputs = self.inputs(inputs)
        count = -(-len(rows) // self.block)

        def compute(missing: list[int]) -> Iterator[np.ndarray]:
            left = sum(len(rows[i * self.block :][: self.block]) for i in missing)
            log.info(
                "encode %s %s with %s on %s, %s",
                *(f"{left:,}", "queries" if side == "query" else "passages"),
                *(self.folder, hardware.named(self.device), self.precision),
            )
            _, templates = self.loaded
            blocks = TextBlocks(texts, rows, templates, side, self.block, self.token_budget)
            with progress(f"encode {folder.name}", left, "texts") as done, torch.inference_mode():
                for batch in text_loader(blocks, missing, self.num_workers):
                    yield self._vectors(batch.texts, done)

        return Shards(fill(folder, inputs, count, compute), len(rows), self.block)

    def _vectors(self, texts: Packed, done: Callable[[int], None] | None = None) -> np.ndarray:
        """[N, dim] float16.

        Args:
            done: called after each chunk with its number of texts.
        """
        vectors = texts.to(self.device, non_blocking=True).rows_of(self.loaded[0].of, done)
        return vectors.to(torch.float16).cpu().numpy()
