"""A Llama of a few million weights, from random ones, with a tokenizer trained on the collection.

    python train.py backbone=tiny_llama backbone.hidden_size=256 backbone.layers=2

Nothing is downloaded, so it runs anywhere; the architecture is transformers' LlamaModel. Weights
are float32; the precision of the arithmetic is the trainer's or the encoder's affair.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import nn

from caravan import manifests
from caravan.errors import InputError, reading
from caravan.files import cache_folder, replacing
from caravan.models.loading import set_attention
from caravan.models.preparing import Checkpointing, new_head, prepared

log = logging.getLogger(__name__)


class TinyLlama:
    """A small Llama from random weights with a byte-level BPE trained on the collection.

    Nothing is downloaded, so it runs anywhere; the architecture is transformers' LlamaModel.

    Args:
        vocab_size: entries of the BPE, its three special tokens included.
        hidden_size, layers, heads, intermediate_size: the shape of the Llama.
        max_length: the longest text that its positions are meant for, in tokens.
        copying: how much of what it attends to a layer hands on before the first step: value and
            output projections begin as each other's transposes, and at 1 their product is the
            identity. A state then begins as the mean of the tokens before it, and a word that is
            repeated need not be learned to be seen (after mimetic initialisation, arXiv
            2305.09828). 0 is Llama's own start.
        attention: transformers' attention implementation; "auto" is `caravan.models.cpu`.
        checkpointing: recompute activations in the backward pass (`caravan.models.preparing`).
        bidirectional: each token sees the whole text (`caravan.models.bidirectional`).
        compile: the layers, by torch.compile.
        trust_remote_code: of the folder that `init_from` puts in its place; a Llama brings no code.
    """

    def __init__(
        self,
        vocab_size: PositiveInt = 8192,
        hidden_size: PositiveInt = 256,
        layers: PositiveInt = 2,
        heads: PositiveInt = 4,
        intermediate_size: PositiveInt = 688,
        max_length: PositiveInt = 2048,
        copying: float = 1.0,
        attention: str = "auto",
        checkpointing: Checkpointing = False,
        bidirectional: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        if hidden_size % heads:
            raise InputError(
                f"backbone.hidden_size={hidden_size} must be a multiple of heads={heads}"
            )
        if copying < 0:
            raise InputError(f"backbone.copying is {copying}; it must be 0 or more")
        self.name = "tiny_llama"
        self.vocab_size = vocab_size
        self.shape: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": intermediate_size,
            "max_position_embeddings": max_length,
        }
        self.copying = copying
        self.attention = attention
        self.checkpointing = checkpointing
        self.bidirectional = bidirectional
        self.compile = compile
        self.trust_remote_code = trust_remote_code

    trains_tokenizer = True

    def tokenizer(self, collection: Any, cache_dir: Path) -> Any:
        """The BPE of a collection (its corpus and queries); trained once, kept in `cache_dir`."""
        from transformers import PreTrainedTokenizerFast

        name = f"bpe-{self.vocab_size}-{collection.digest[:16]}.json"
        path = cache_folder(cache_dir, "tokenizers") / name
        inputs = {
            "collection": collection.digest,
            "vocab_size": self.vocab_size,
            "versions": manifests.versions(("tokenizers",)),
        }
        known = (manifests.read(path) or {}).get("facts", {}).get("content")
        if not manifests.matches(path, inputs) or not manifests.is_as_written(path, known):
            if path.exists():
                log.info("%s is of other versions, or damaged; it is trained again", path)
            bpe = train_bpe(_texts(collection), self.vocab_size)
            with replacing(path) as scratch:
                bpe.save(str(scratch))
            manifests.write(path, inputs, {"content": manifests.content(path)})
        with reading(path, "no tokenizer; delete the file, and it is trained again"):
            return PreTrainedTokenizerFast(
                tokenizer_file=str(path), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
            )

    def model(self, tokenizer: Any) -> nn.Module:
        return self.language_model(tokenizer).base_model

    def config(self, tokenizer: Any) -> Any:
        """transformers' config of the model."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=False,
            tie_word_embeddings=True,
            **self.shape,
        )

    def language_model(self, tokenizer: Any) -> Any:
        """The model with its output layer, which is its embedding."""
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(self.config(tokenizer))
        if self.copying:
            _copying(model.model, self.copying)
        attending = set_attention(model, self.attention)
        return prepared(attending, self.checkpointing, self.bidirectional, self.compile)

    def scorer(self, tokenizer: Any) -> nn.Module:
        """The model with a new head."""
        return new_head(self.model(tokenizer), tokenizer)


def _copying(model: Any, share: float) -> None:
    """Let each layer's heads together hand on `share` of what they attend to."""
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
