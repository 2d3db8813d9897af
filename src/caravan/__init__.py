"""Caravan fine-tunes language models for text retrieval in stages: RepLLaMA, RankLLaMA, LLaRA."""

__version__ = "0.1.0"
