"""Token ids to embeddings: the last layer's states, pooled and scaled to unit length.

RepLLaMA (arXiv 2310.08319, section 2.1) takes the state of the last token, the EOS. Which token is
the last is read from the attention mask, never from the pad id, which for Llama may equal EOS.
An embedding does not depend on what else is in the batch nor on the padding side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from caravan.batches import Packed
from caravan.contract import Contract
from caravan.models import attention as _registered  # noqa: F401


class BiEncoder(nn.Module):
    """A transformer with pooling.

    Args:
        backbone: a transformers model without a head; its output has `last_hidden_state`.
        contract: gives pooling and normalisation.
    """

    def __init__(self, backbone: nn.Module, contract: Contract) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = contract.pooling
        self.normalize = contract.normalize
        self.causal = is_causal(backbone)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, full: bool = False) -> Tensor:
        """Embed texts.

        Args:
            input_ids, attention_mask: [n, L], padded on either side.
            full: no text is padded (the caller knows; looking would wait for the device).

        Returns:
            [n, d] float32.
        """
        if not full:
            # Real tokens to the left, so that positions count from the text's first token in every
            # architecture, whether its positions are absolute or relative.
            left = attention_mask.argsort(dim=1, descending=True, stable=True)
            input_ids = input_ids.gather(1, left)
            attention_mask = attention_mask.gather(1, left)
        # In a causal model no real token sees the padding on its right: no mask, a faster kernel.
        mask = None if full or self.causal else attention_mask
        states = self.backbone(input_ids=input_ids, attention_mask=mask).last_hidden_state
        pooled = pool(states, attention_mask, self.pooling)
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled

    def embed(self, texts: Packed) -> Tensor:
        """Embeddings [N, d] float32 of packed texts, in the order of the texts."""
        rows = [self(chunk.input_ids, chunk.attention_mask, chunk.full) for chunk in texts.chunks]
        return texts.restore(torch.cat(rows))


def pool(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Pool states [n, L, d] of right-padded texts to [n, d] in float32."""
    if pooling == "cls":
        return states[:, 0].float()
    lengths = attention_mask.sum(dim=1).long()
    if pooling == "last":
        rows = torch.arange(len(states), device=states.device)
        return states[rows, lengths - 1].float()
    weights = attention_mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(dim=1) / lengths.clamp(min=1).unsqueeze(-1)


def is_causal(backbone: nn.Module) -> bool:
    """Whether every attention layer of the model looks to the left only.

    Layers that do not say so count as looking both ways, which is always right, only slower.
    """
    layers = [m for m in backbone.modules() if type(m).__name__.endswith("Attention")]
    return bool(layers) and all(getattr(m, "is_causal", False) is True for m in layers)
