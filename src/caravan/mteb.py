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

from caravan import api
from caravan.data.tokenization import instruction_for
from caravan.errors import InputError
from caravan.models.digests import adapter_base, folder_digest

try:
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.similarity_functions import dot_score, pairwise_dot_score
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
    """A model of `caravan.load` with MTEB's facts about it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.mteb_model_meta = _meta(model)

    def instruction(self, task: Any) -> str | None:
        """The instruction of a task (MTEB's TaskMetadata); None for the model's default."""
        encoding = self.model.encoding
        if task is None or not encoding.uses_instruction:
            return None
        own, prompt = encoding.instruction_of(task.name), task.prompt
        prompt = prompt.get("query") if isinstance(prompt, dict) else prompt
        if own is None and prompt:
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


class Encoder(_Wrapped):
    """A retriever as MTEB's EncoderProtocol; similarities are dot products, as in `evaluate.py`."""

    similarity = staticmethod(dot_score)
    similarity_pairwise = staticmethod(pairwise_dot_score)

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


class CrossEncoder(_Wrapped):
    """A reranker as MTEB's CrossEncoderProtocol."""

    def predict(
        self, inputs1: Batches, inputs2: Batches, *, task_metadata: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """Scores [N] float32 of queries with passages, pair by pair; arguments as in `encode`."""
        instruction = self.instruction(task_metadata)
        return self.model.score(self.queries(inputs1), _passages(inputs2), instruction)


def load(
    folder: str | Path,
    precision: str = "auto",
    token_budget: int | None = None,
    trust_remote_code: bool = False,
    dim: int | None = None,
) -> Encoder | CrossEncoder:
    """A model folder for `mteb.evaluate`; arguments and errors are those of `caravan.load`.

    MTEB files results under the digest of the folder, and with another `dim` under another name.
    """
    model = api.load(folder, precision, token_budget, trust_remote_code, dim)
    return Encoder(model) if isinstance(model, api.Retriever) else CrossEncoder(model)


def _passages(inputs: Batches) -> list[api.Text]:
    """Titles and texts separately if a task has them, for the folder's template."""
    found: list[api.Text] = []
    for batch in inputs:
        if "title" in batch and "body" in batch:
            found += zip(batch["title"], batch["body"], strict=True)
        else:
            found += batch["text"]
    return found


def _meta(model: Any) -> ModelMeta:
    encoding, facts = model.encoding, model.facts
    retrieves = encoding.kind == "retriever"
    lengths = (encoding.query_length, encoding.passage_length)
    templates = {encoding.query_template, encoding.passage_template}
    similarity = (ScoringFunction.DOT_PRODUCT, ScoringFunction.COSINE)[encoding.normalize]
    name = re.sub(r"[^\w.-]+", "-", str(facts.get("name") or model.folder.name))
    if "dim" in model.overrides:
        name += f"-{model.overrides['dim']}d"
    base = facts.get("base_model")
    if facts["weights"] == "adapter":
        base = adapter_base(model.folder)[0]
    known = {
        "name": f"caravan/{name}",
        "revision": folder_digest(model.folder),
        "n_parameters": sum(weight.numel() for weight in model.model.parameters()),
        "max_tokens": max(lengths) if retrieves else sum(lengths),
        "embed_dim": model.dim if retrieves else None,
        "framework": ["PyTorch", "Transformers"],
        "similarity_fn_name": similarity if retrieves else None,
        "use_instructions": not templates <= {"{text}", "{title} {text}"},
        "adapted_from": None if base is None else str(base),
        "model_type": ["dense" if retrieves else "cross-encoder"],
    }
    return ModelMeta.create_empty(known)
