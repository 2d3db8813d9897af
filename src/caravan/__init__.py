"""Caravan fine-tunes language models for text retrieval in stages: RepLLaMA, RankLLaMA, LLaRA.

`caravan.load(folder)` gives a trained model (`caravan.api`).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caravan.api import Reranker, Retriever, load

__version__ = "0.1.0"
__all__ = ["Reranker", "Retriever", "load"]


def __getattr__(name: str) -> Any:
    """Import torch only when a model is needed."""
    if name in __all__:
        from caravan import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
