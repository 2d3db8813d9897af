"""Caravan: fine-tune language models for multi-stage text retrieval (RepLLaMA, RankLLaMA, LLaRA)."""

__version__ = "0.1.0"
