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

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Product:
    """Finished embeddings of a store: its folder, and the inputs that they were made from."""

    folder: Path
    inputs: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """ "passages", or "queries.<split>"."""
        return self.folder.name.rpartition(".")[0]


@dataclass(frozen=True)
class TeacherEmbeddings:
    """A teacher's embeddings of the passages of a collection and the queries of a split.

    Attributes:
        query_rows: rows of the queries, increasing; row i of `queries` embeds query_rows[i].
    """

    query_rows: np.ndarray
    queries: Embeddings
    passages: Embeddings

    def __call__(self, query_rows: np.ndarray, groups: np.ndarray) -> Fields:
        """Fields of a `TrainBatch`: the embeddings of queries [Q] and passages [Q, G]."""
        places = np.searchsorted(self.query_rows, query_rows)
        return {
            "teacher_queries": self.queries.get(places),
            "teacher_passages": self.passages.get(groups.reshape(-1)),
        }


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

    def __init__(
        self,
        teacher: str,
        loss: Literal["cosine", "mse"] = "cosine",
        weight: float = 1.0,
        scores_weight: float = 1.0,
        projection: bool = False,
    ) -> None:
        self.teacher, self.loss = teacher, loss
        self.weight, self.scores_weight, self.projection = weight, scores_weight, projection
        self._products = list(_finished(Path(teacher)))
        if not self._products:
            raise self._missing("no embeddings")
        models = {(one.inputs["model"], one.inputs.get("dim")) for one in self._products}
        if len(models) > 1:
            raise self._ambiguous(f"embeddings of {len(models)} models")
        self.width = _opened(self._products[0], 1).dim

    def embeddings(self, collection: Collection, split: str) -> TeacherEmbeddings:
        """The teacher's embeddings of a collection and of the judged queries of a split.

        Raises:
            InputError: "other-collection" if the folder has none of this collection,
                "missing-embeddings" if it lacks passages, the split or a shard.
        """
        rows = collection.qrels(split).queries
        queries, passages = self._of(collection, split)
        opened = _opened(queries, len(rows)), _opened(passages, len(collection.corpus))
        return TeacherEmbeddings(rows, *opened)

    def inputs(self, parts: Sequence[Part]) -> dict[str, list[str]]:
        """What training reads, for its manifest: the products of each collection."""
        trained = [part for part in parts if part.entry.weight]
        found = {part.name: self._of(part.collection, part.train_split) for part in trained}
        return {name: [one.folder.name for one in products] for name, products in found.items()}

    def _of(self, collection: Collection, split: str) -> list[Product]:
        """The products of a collection: the queries of a split, and the passages."""
        digest = collection.digest
        own = [one for one in self._products if one.inputs["collection"] == digest]
        if not own:
            raise InputError(
                "other-collection",
                f"distillation.teacher={self.teacher} has no embeddings of the collection"
                f" {collection.name} ({digest[:12]}), only of others; run evaluate.py"
                " with the teacher and the data settings of this training",
            )
        found = []
        for kind in (f"queries.{split}", "passages"):
            products = [one for one in own if one.kind == kind]
            if not products:
                what = "passages" if kind == "passages" else f"{split} queries"
                raise self._missing(f"no embeddings of the {what} of {collection.name}", split)
            if len(products) > 1:
                names = ", ".join(one.folder.name for one in products)
                raise self._ambiguous(f"several embeddings of {collection.name} ({names})")
            found += products
        return found

    def _missing(self, problem: str, split: str = "train") -> InputError:
        return InputError(
            "missing-embeddings",
            f"distillation.teacher={self.teacher} has {problem}; run evaluate.py"
            f" retriever=<model folder> data.split={split} name=<name> over the collection without"
            " the setting segment, and set distillation.teacher to the folder of that evaluation",
        )

    def _ambiguous(self, problem: str) -> InputError:
        return InputError(
            "several-teachers",
            f"distillation.teacher={self.teacher} has {problem}; set it to the folder of one"
            " evaluation, or delete the other embeddings",
        )

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
        pairs = zip(students, teachers, strict=True)
        sides = [self.distances(one.float(), other.float()).mean() for one, other in pairs]
        return torch.stack(sides).mean()

    def distances(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of each text, [n]."""
        if self.loss == "cosine":
            return 1 - functional.cosine_similarity(student, teacher, dim=1)
        return (student - teacher).square().sum(dim=1)


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


def _finished(folder: Path) -> list[Product]:
    """The finished embeddings in all stores below a folder."""
    found = []
    for manifest in sorted(folder.rglob(f"*{SUFFIX}")):
        product = manifest.with_name(manifest.name.removesuffix(SUFFIX))
        if not product.name.startswith(("passages.", "queries.")) or product.is_symlink():
            continue
        record = manifests.read(product)
        if record is not None and product.is_dir():
            found.append(Product(product, record["inputs"]))
    return found


def _opened(product: Product, rows: int) -> Embeddings:
    """The embeddings of a product that has at least `rows` rows."""

    def refuse(numbers: list[int]) -> list[np.ndarray]:
        raise InputError(
            "missing-embeddings",
            f"{product.folder} has no intact shard {numbers[0]}; repeat the evaluation that wrote"
            " it",
        )

    block = product.inputs["block"]
    shards = Shards(product.folder, dict(product.inputs), -(-rows // block), refuse)
    if missing := shards.missing():
        refuse(missing)
    return Embeddings(shards, rows, block)
