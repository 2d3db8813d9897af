"""A trained folder as an MTEB model, for the leaderboard's own evaluation.

    import mteb
    from caravan.mteb import load

    tasks = mteb.get_tasks(["SciFact"])
    print(mteb.evaluate(load("runs/mine/retriever/model"), tasks))

A retriever becomes an MTEB encoder, a reranker a cross-encoder. Prompts, EOS, lengths and pooling
are the folder's; MTEB's own prompts are for models without any. Needs the extra `mteb`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caravan import api
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.models.digests import adapter_base, folder_digest

try:
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType
except ImportError:
    raise InputError(
        "missing-extra", "mteb is not installed; run: pip install 'caravan-retrieval[mteb]'"
    ) from None

Batches = Iterable[dict[str, Any]]
"""MTEB's DataLoader: of queries `text`, of passages `title` and `body` too, each a list."""


class _Wrapped:
    """A loaded folder with MTEB's facts about it.

    Args:
        folder: a model folder; MTEB calls it the model's name.
        revision: ignored; results are filed under the digest of the folder.
        device: None, or the type of the device that folders are loaded on.
        precision, token_budget, trust_remote_code, dim: see `caravan.load`. MTEB files results with
            another `dim` under another name.
    """

    def __init__(
        self,
        folder: str | Path,
        revision: str | None = None,
        device: str | None = None,
        precision: str = "auto",
        token_budget: int | None = None,
        trust_remote_code: bool = False,
        dim: int | None = None,
    ) -> None:
        self.model: Any = api.load(folder, precision, token_budget, trust_remote_code, dim)
        if device is not None and torch.device(device).type != self.model.device.type:
            raise InputError(
                "wrong-device",
                f"device={device}: the model is loaded on {self.model.device}; leave it out, and"
                " choose a GPU, or none, with CUDA_VISIBLE_DEVICES",
            )
        self.mteb_model_meta = self._meta()

    def _meta(self) -> ModelMeta:
        encoding, facts = self.model.encoding, self.model.facts
        retrieves = encoding.kind == "retriever"
        longest = (encoding.query_length, encoding.passage_length)
        plain = {"{text}", "{title} {text}"}
        name = re.sub(r"[^\w.-]+", "-", str(facts.get("name") or self.model.folder.name))
        if "dim" in self.model.overrides:
            name += f"-{self.model.overrides['dim']}d"
        similarity = (ScoringFunction.DOT_PRODUCT, ScoringFunction.COSINE)[encoding.normalize]
        base = facts.get("base_model")
        if facts["weights"] == "adapter":
            base = adapter_base(self.model.folder)[0]
        return ModelMeta(
            loader=None,
            name=f"caravan/{name}",
            revision=folder_digest(self.model.folder),
            release_date=None,
            languages=None,
            n_parameters=sum(weight.numel() for weight in self.model.model.parameters()),
            memory_usage_mb=None,
            max_tokens=max(longest) if retrieves else sum(longest),
            embed_dim=self.model.dim if retrieves else None,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch", "Transformers"],
            similarity_fn_name=similarity if retrieves else None,
            use_instructions=not {encoding.query_template, encoding.passage_template} <= plain,
            training_datasets=None,
            adapted_from=None if base is None else str(base),
            model_type=["dense" if retrieves else "cross-encoder"],
        )


class Encoder(_Wrapped):
    """A retriever as MTEB's EncoderProtocol."""

    def encode(
        self, inputs: Batches, *, prompt_type: PromptType | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Embeddings [N, dim] float32.

        Args:
            prompt_type: queries or documents; without one (classification, say) texts are
                passages.
            kwargs: of MTEB, about the task and batches; they change no embedding.
        """
        if prompt_type == PromptType.query:
            return self.model.encode_queries(_texts(inputs))
        return self.model.encode_passages(_passages(inputs))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Dot products [N, M] float32, as `evaluate.py` ranks."""
        first, second = (torch.as_tensor(e).float() for e in (embeddings1, embeddings2))
        return torch.atleast_2d(first) @ torch.atleast_2d(second).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Dot products [N] float32, row by row."""
        first, second = (torch.as_tensor(e).float() for e in (embeddings1, embeddings2))
        return (first * second).sum(dim=-1)


class CrossEncoder(_Wrapped):
    """A reranker as MTEB's CrossEncoderProtocol."""

    def predict(self, inputs1: Batches, inputs2: Batches, **kwargs: Any) -> np.ndarray:
        """Scores [N] float32 of queries with passages, pair by pair; the higher the better.

        Args:
            kwargs: of MTEB, about the task and batches; they change no score.
        """
        return self.model.score(_texts(inputs1), _passages(inputs2))


def load(
    folder: str | Path,
    precision: str = "auto",
    token_budget: int | None = None,
    trust_remote_code: bool = False,
    dim: int | None = None,
) -> Encoder | CrossEncoder:
    """A model folder for `mteb.evaluate`; arguments and errors are those of `caravan.load`."""
    encoding = read_encoding(Path(folder))[0]
    wrapped = Encoder if encoding.kind == "retriever" else CrossEncoder
    return wrapped(folder, None, None, precision, token_budget, trust_remote_code, dim)


def _texts(inputs: Batches) -> list[str]:
    """Queries, each with the instruction of its task if there is one."""
    return [text for batch in inputs for text in batch["text"]]


def _passages(inputs: Batches) -> list[api.Text]:
    """Titles and texts separately if a task has them, for the folder's template."""
    found: list[api.Text] = []
    for batch in inputs:
        if "title" in batch and "body" in batch:
            found += zip(batch["title"], batch["body"], strict=True)
        else:
            found += batch["text"]
    return found
