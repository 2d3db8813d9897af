"""Texts to embeddings: the last layer's states, pooled and scaled to unit length.

RepLLaMA (arXiv 2310.08319, section 2.1). An embedding depends neither on the other texts of the
batch nor on the padding side.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from caravan.data.batch import Chunk, Packed
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import cpu as _registered  # noqa: F401
from caravan.models.bidirectional import check_direction, is_causal, unwrapped
from caravan.models.pooling import pooled_states, pooling_of
from caravan.models.positions import refuse_too_long


class BiEncoder(nn.Module):
    """A transformer with pooling.

    Args:
        backbone: a transformers model without a head; its output has `last_hidden_state`.
        encoding: for pooling, normalization and the size of an embedding.

    Raises:
        InputError: If the backbone's attention direction differs from the encoding's, it has fewer
            positions than a text may have tokens, or fewer dimensions than an embedding.
    """

    def __init__(self, backbone: nn.Module, encoding: Encoding) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling_of(encoding)
        self.normalize = encoding.normalize
        self.cut_to(encoding.dim)
        self.causal = is_causal(backbone)
        check_direction(encoding, backbone)
        refuse_too_long(backbone, encoding)

    @property
    def transformer(self) -> nn.Module:
        """The part that a model folder saves: the transformer, with its adapter if any."""
        return self.backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor, full: bool = False) -> Tensor:
        """Embeddings [n, d] float32 of texts.

        Args: see `caravan.models.pooling.pooled_states`.
        """
        pooled = pooled_states(
            self.backbone, input_ids, attention_mask, self.pooling, self.causal, full
        )
        pooled = pooled[:, : self.dim]
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled

    def cut_to(self, dim: int, section: str = "encoding.") -> None:
        """Set the dimensions of an embedding; 0 is all of them. Arguments: `refuse_large`."""
        refuse_large(unwrapped(self.backbone).config, dim, section)
        self.dim = dim or None

    def of(self, chunk: Chunk) -> Tensor:
        """Embeddings [n, d] float32 of a chunk."""
        return self(chunk.input_ids, chunk.attention_mask, chunk.full)

    def embed(self, texts: Packed) -> Tensor:
        """Embeddings [N, d] float32 of packed texts, in the order of the texts."""
        return texts.rows_of(self.of)


def refuse_large(config: Any, dim: int, section: str = "encoding.") -> None:
    """Compare the size of an embedding with that of a model's state.

    Args:
        config: transformers' config of the model.
        dim: dimensions of an embedding; 0 is all.
        section: prefix of `dim` in the settings, for the message.

    Raises:
        InputError: If the model has fewer dimensions.
    """
    size = config.get_text_config().hidden_size if dim else 0
    if dim > size:
        raise InputError(
            "dim-too-large",
            f"{section}dim is {dim}, and a whole embedding has {size} dimensions; set it to {size}"
            " or less",
        )


def cut(embeddings: Tensor, dim: int, normalize: bool) -> Tensor:
    """The first `dim` dimensions of embeddings [n, d], scaled to unit length again if `normalize`.

    Whole embeddings are returned as they are.
    """
    if dim == embeddings.shape[1]:
        return embeddings
    first = embeddings[:, :dim]
    return nn.functional.normalize(first, dim=-1) if normalize else first
