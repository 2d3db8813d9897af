"""A trained folder as an MTEB model, for the leaderboard's own evaluation.

    import mteb
    from caravan.mteb import load

    tasks = mteb.get_tasks(["SciFact"])
    print(mteb.evaluate(load("runs/mine/retriever/model"), tasks))

A retriever becomes an MTEB encoder, a reranker a cross-encoder. Prompts, EOS, lengths and pooling
are the folder's. If its templates have {instruction}, a task has the instruction of the collection
of that name (SciFact: scifact), else the task's own prompt in MTEB, else the model's default.
Needs the extra `mteb`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caravan import api
from caravan.data.tokenization import instruction_for
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
"""MTEB's DataLoader of lists: `text`; of queries `query` and `instruction` if each has its own; of
passages `title` and `body` if there are titles."""
log = logging.getLogger(__name__)


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
        self._noted: set[str] = set()
        self.mteb_model_meta = self._meta()

    def instruction(self, task: Any) -> str | None:
        """The instruction of a task; None for the model's default.

        Args:
            task: MTEB's TaskMetadata.
        """
        encoding = self.model.encoding
        if task is None or not encoding.uses_instruction:
            return None
        own, prompt = encoding.instruction_of(task.name), task.prompt
        if own is not None:
            return str(own)
        prompt = prompt.get("query") if isinstance(prompt, dict) else prompt
        if prompt:
            if task.name not in self._noted:
                self._noted.add(task.name)
                log.info(f"{task.name}: the instruction is MTEB's prompt of the task: {prompt!r}")
            return str(prompt)
        return instruction_for(encoding, task.name)["instruction"]

    def queries(self, inputs: Batches) -> list[api.Text]:
        """Queries; with their own instructions, if they have some and the templates a place."""
        found: list[api.Text] = []
        for batch in inputs:
            if self.model.encoding.uses_instruction and {"query", "instruction"} <= batch.keys():
                own = [instruction or "" for instruction in batch["instruction"]]
                found += zip(own, batch["query"], strict=True)
            else:
                found += batch["text"]
        return found

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
        self,
        inputs: Batches,
        *,
        task_metadata: Any = None,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeddings [N, dim] float32.

        Args:
            task_metadata: the task, which determines the instruction.
            prompt_type: queries or documents; without one (classification, say) texts are
                passages.
            kwargs: of MTEB, about batches; they change no embedding.
        """
        instruction = self.instruction(task_metadata)
        if prompt_type == PromptType.query:
            return self.model.encode_queries(self.queries(inputs), instruction)
        return self.model.encode_passages(_passages(inputs), instruction)

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

    def predict(
        self, inputs1: Batches, inputs2: Batches, *, task_metadata: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """Scores [N] float32 of queries with passages, pair by pair; the higher the better.

        Args:
            task_metadata: the task, which determines the instruction.
            kwargs: of MTEB, about batches; they change no score.
        """
        instruction = self.instruction(task_metadata)
        return self.model.score(self.queries(inputs1), _passages(inputs2), instruction)


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


def _passages(inputs: Batches) -> list[api.Text]:
    """Titles and texts separately if a task has them, for the folder's template."""
    found: list[api.Text] = []
    for batch in inputs:
        if "title" in batch and "body" in batch:
            found += zip(batch["title"], batch["body"], strict=True)
        else:
            found += batch["text"]
    return found
