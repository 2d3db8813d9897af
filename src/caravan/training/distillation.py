"""Distillation of embeddings: a student learns to embed texts as its teacher does.

    python evaluate.py retriever=<teacher> data=beir data.path=... data.split=train name=teacher
    python train.py distillation.teacher=runs/teacher data=beir data.path=... name=student

The evaluation embeds the passages and the training queries once, into its store
(`caravan.retrieval.store`); an interrupted one resumes. Training reads the embeddings of each batch
by row, and does not load the teacher.

The loss of a text is the squared or cosine distance between the student's embedding, or a learned
linear projection of it, and the teacher's: Reimers and Gurevych 2020 (arXiv 2004.09813) and
sentence-transformers' `MSELoss`; Jasper and Stella (arXiv 2412.19048). As in EmbedDistill (arXiv
2301.12005), both queries and passages are compared, and the loss is added to that of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from caravan import manifests
from caravan.data.batch import Fields
from caravan.data.collection import Collection
from caravan.data.mixture import Part
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import Head
from caravan.retrieval.store import SUFFIX, Embeddings, Shards


@dataclass
class Distillation:
    """The loss of a teacher's embeddings, which is added to that of the scores.

    The sum is `scores_weight` * loss + `weight` * (distance of queries + distance of passages) / 2,
    with the mean distance over the queries or passages of the batch. The distance is that of whole
    embeddings, also with `loss.dims`.

    Args:
        teacher: folder of an evaluation of the teacher over the training queries, or its store;
            for several collections, a folder that contains their evaluations.
        loss: "mse" is the squared Euclidean distance, which is sentence-transformers' `MSELoss`
            times the number of dimensions; "cosine" is one minus the cosine similarity.
        weight: of this loss.
        scores_weight: of the loss of the scores; 0 trains on the teacher's embeddings alone.
        projection: compare a linear projection of the student's embedding, trained with the model.
            It is saved in checkpoints, but not in the model folder. Without it, the sizes must be
            equal.

    Attributes:
        width: dimensions of the teacher's embeddings.

    Raises:
        InputError: "missing-embeddings" if the folder has none, "several-teachers" if it has those
            of several models.
    """

    teacher: str
    loss: Literal["cosine", "mse"] = "cosine"
    weight: float = 1.0
    scores_weight: float = 1.0
    projection: bool = False

    def __post_init__(self) -> None:
        self._inputs = dict(_finished(Path(self.teacher)))  # by product
        models = {(of["model"], of.get("dim")): product for product, of in self._inputs.items()}
        product = self._only(list(models.values()), "embeddings", "train")
        self.width = self._opened(product, 1).dim

    def embeddings(
        self, collection: Collection, split: str
    ) -> Callable[[np.ndarray, np.ndarray], Fields]:
        """A function of query rows [Q] and passage rows [Q, G] that reads the teacher's embeddings.

        It returns fields of a `TrainBatch`: `teacher_queries` and `teacher_passages`.

        Raises:
            InputError: "missing-embeddings" if the folder lacks the collection's passages, the
                judged queries of the split, or a shard.
        """
        rows = collection.qrels(split).queries  # increasing; row i of `queries` embeds rows[i]
        of_queries, of_passages = self._products(collection, split)
        queries = self._opened(of_queries, len(rows))
        passages = self._opened(of_passages, len(collection.corpus))

        def read(query_rows: np.ndarray, groups: np.ndarray) -> Fields:
            return {
                "teacher_queries": queries.get(np.searchsorted(rows, query_rows)),
                "teacher_passages": passages.get(groups.reshape(-1)),
            }

        return read

    def inputs(self, parts: Sequence[Part]) -> dict[str, list[str]]:
        """What training reads, for its manifest: the products of each collection."""
        trained = [part for part in parts if part.entry.weight]
        found = {part.name: self._products(part.collection, part.train_split) for part in trained}
        return {name: [one.name for one in products] for name, products in found.items()}

    def _products(self, collection: Collection, split: str) -> list[Path]:
        """The folders with the embeddings of the queries of a split, and of the passages."""
        digest = collection.digest
        found: list[Path] = []
        for kind, texts in ((f"queries.{split}", f"{split} queries"), ("passages", "passages")):
            own = [
                product
                for product, inputs in self._inputs.items()
                if product.name.rpartition(".")[0] == kind and inputs["collection"] == digest
            ]
            what = f"embeddings of the {texts} of {collection.name} ({digest[:12]})"
            found.append(self._only(own, what, split))
        return found

    def _only(self, products: Sequence[Path], what: str, split: str) -> Path:
        """The only one of these products, or an InputError."""
        if not products:
            raise InputError(
                "missing-embeddings",
                f"distillation.teacher={self.teacher} has no {what}; run evaluate.py"
                f" retriever=<model folder> data.split={split} name=<name> over the collection"
                " without the setting segment, and set distillation.teacher to the folder of that"
                " evaluation",
            )
        if len(products) > 1:
            raise InputError(
                "several-teachers",
                f"distillation.teacher={self.teacher} has several {what}"
                f" ({', '.join(one.name for one in products)}); set it to the folder of one"
                " evaluation, or delete the other embeddings",
            )
        return products[0]

    def _opened(self, product: Path, rows: int) -> Embeddings:
        """The embeddings of a product that has at least `rows` rows."""

        def refuse(numbers: list[int]) -> list[np.ndarray]:
            raise InputError(
                "missing-embeddings",
                f"{product} has no intact shard {numbers[0]}; repeat the evaluation that wrote it",
            )

        inputs = self._inputs[product]
        shards = Shards(product, inputs, -(-rows // inputs["block"]), refuse)
        if missing := shards.missing():
            refuse(missing)
        return Embeddings(shards, rows, inputs["block"])

    def network(self, backbone: nn.Module, encoding: Encoding, size: int) -> BiEncoder:
        """The network to train; `size`: the dimensions of its embeddings."""
        if not self.projection:
            return BiEncoder(backbone, encoding)
        return ProjectedEncoder(backbone, encoding, size, self.width)

    def refuse_width(self, size: int) -> None:
        """Raise an InputError if embeddings of `size` dimensions cannot be compared."""
        if not self.projection and size != self.width:
            raise InputError(
                "other-width",
                f"distillation.teacher={self.teacher} has embeddings of {self.width} dimensions,"
                f" and the student's have {size}; set distillation.projection=true",
            )

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split outputs in training into embeddings [n, d] and what is compared [n, width]."""
        if not self.projection:
            return rows, rows
        return rows[:, : -self.width], rows[:, -self.width :]

    def __call__(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The mean distance of each side, queries and passages, averaged over both.

        Args:
            students, teachers: [n, width] of each side, in any floating-point dtype.
        """
        sides = []
        for student, teacher in zip(students, teachers, strict=True):
            student, teacher = student.float(), teacher.float()
            if self.loss == "cosine":
                distances = 1 - functional.cosine_similarity(student, teacher, dim=1)
            else:
                distances = (student - teacher).square().sum(dim=1)
            sides.append(distances.mean())
        return torch.stack(sides).mean()


class ProjectedEncoder(BiEncoder):
    """A bi-encoder whose output in training is [embedding, projection of the embedding].

    The projection is a part of the network's output, so that gradient caching, DDP and FSDP treat
    its weights as they treat any other.

    Args:
        size, width: dimensions of an embedding and of its projection.
        backbone, encoding: see `BiEncoder`.
    """

    def __init__(self, backbone: nn.Module, encoding: Encoding, size: int, width: int) -> None:
        super().__init__(backbone, encoding)
        self.projection = Head(size, width, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, full: bool = False) -> Tensor:
        """[n, size + width] float32 in training, else embeddings [n, size]."""
        embeddings = super().forward(input_ids, attention_mask, full)
        if not self.training:
            return embeddings
        return torch.cat((embeddings, self.projection(embeddings)), dim=1)


def _finished(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The finished embeddings in all stores below a folder, with their inputs."""
    for manifest in sorted(folder.rglob(f"*{SUFFIX}")):
        product = manifest.with_name(manifest.name.removesuffix(SUFFIX))
        if product.name.startswith(("passages.", "queries.")) and not product.is_symlink():
            record = manifests.read(product)
            if record is not None and product.is_dir():
                yield product, record["inputs"]
