"""A Llama of a few million random weights, with a tokenizer trained on the collection.

    python train.py backbone=tiny_llama backbone.hidden_size=256 backbone.layers=2

Nothing is downloaded, so it runs anywhere; the architecture is transformers' LlamaModel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import nn

from caravan.errors import InputError
from caravan.models.backbone import BaseBackbone
from caravan.models.loading import set_attention


@dataclass(eq=False)
class TinyLlama(BaseBackbone):
    """A small Llama from random weights with a byte-level BPE trained on the collection.

    Args:
        vocab_size: entries of the BPE, including its three special tokens.
        hidden_size, layers, heads, intermediate_size: the shape of the Llama.
        max_length: `max_position_embeddings`, in tokens.
        copying: at 1, each layer's value and output projections are initialized so that their
            product is the identity, at 0 as Llama's. A state then starts as the mean of the tokens
            before it, and the model need not learn to copy a repeated word (after mimetic
            initialization, arXiv 2305.09828).
        trust_remote_code: has no effect; a Llama has no remote code.
        The others: see `BaseBackbone`.

    Raises:
        InputError: If heads do not divide the width.
    """

    trains_tokenizer = True
    name: str = field(default="tiny_llama", init=False)
    vocab_size: PositiveInt = 8192
    hidden_size: PositiveInt = 256
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    intermediate_size: PositiveInt = 688
    max_length: PositiveInt = 2048
    copying: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):  # rotary positions turn pairs of numbers
            raise InputError(
                "indivisible-width",
                f"backbone.hidden_size={self.hidden_size} must be a multiple of twice"
                f" heads={self.heads}",
            )

    def tokenizer(self, collection: Any, cache_dir: Path) -> Any:
        """A BPE, trained on the corpus and queries of a collection."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=train_bpe(_texts(collection), self.vocab_size),
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
        )

    def config(self, tokenizer: Any) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=False,
            tie_word_embeddings=True,
        )

    def model(self, tokenizer: Any) -> nn.Module:
        return self.language_model(tokenizer).base_model

    def language_model(self, tokenizer: Any) -> Any:
        """The model with its output layer, which is tied to its embedding."""
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(self.config(tokenizer))
        if self.copying:
            _copying(model.model, self.copying)
        return self.prepared(set_attention(model, self.attention))

    def use_adapters(self, peft: Any) -> None:
        super().use_adapters(peft)
        if self.quantization is not None:
            raise InputError(
                "not-quantizable",
                f"peft=qlora needs saved weights, and backbone={self.name} has random ones; choose"
                " another backbone, or peft=lora",
            )


def _copying(model: Any, share: float) -> None:
    """Initialize each layer so that its heads together copy `share` of what they attend to."""
    size = model.config.hidden_size
    with torch.no_grad():
        for layer in model.layers:
            basis = nn.init.orthogonal_(torch.empty(size, size)) * share**0.5
            layer.self_attn.v_proj.weight.copy_(basis)
            layer.self_attn.o_proj.weight.copy_(basis.T)


def _texts(collection: Any) -> Iterator[str]:
    for table in (collection.corpus, collection.queries):
        for start in range(0, len(table), 4096):
            for title, text in table.get(slice(start, start + 4096)):
                yield f"{title} {text}" if title else text


def train_bpe(texts: Iterator[str], vocab_size: int) -> Any:
    """A byte-level BPE with <pad>, <s> and </s>; it puts <s> before a text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return bpe
