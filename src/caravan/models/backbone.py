"""Backbones: a transformer without a head, built from random weights or loaded from a name.

A backbone is a small description (two methods: `tokenizer`, `model`) that `conf/backbone/*.yaml`
names by `_target_`; weights load only when `model` is called. Weights are float32 here; the
precision of the arithmetic is the trainer's or the encoder's affair.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caravan.errors import InputError
from caravan.models import attention as cpu_attention


class TinyLlama:
    """A small Llama from random weights with a byte-level BPE trained on the collection.

    Nothing is downloaded, so it runs anywhere; the architecture is transformers' LlamaModel.

    Args:
        vocab_size: entries of the BPE, its three special tokens included.
        hidden_size, layers, heads, intermediate_size: the shape of the Llama.
        max_length: the longest text that its positions are meant for, in tokens.
        attention: transformers' attention implementation; "auto" is `caravan.models.attention`.
        checkpointing: recompute activations in the backward pass, for less memory.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        hidden_size: int = 256,
        layers: int = 2,
        heads: int = 4,
        intermediate_size: int = 688,
        max_length: int = 2048,
        attention: str = "auto",
        checkpointing: bool = False,
    ) -> None:
        if hidden_size % heads:
            raise InputError(
                f"backbone.hidden_size={hidden_size} must be a multiple of heads={heads}"
            )
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
        self.attention = attention
        self.checkpointing = checkpointing

    trains_tokenizer = True

    def tokenizer(self, collection: Any, cache_dir: Path) -> Any:
        """The BPE of a collection (its corpus and queries); trained once, kept in `cache_dir`."""
        from transformers import PreTrainedTokenizerFast

        path = cache_dir / "tokenizers" / f"bpe-{self.vocab_size}-{collection.digest[:16]}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            bpe = train_bpe(_texts(collection), self.vocab_size)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                bpe.save(f"{scratch}/bpe.json")
                os.replace(f"{scratch}/bpe.json", path)
        return PreTrainedTokenizerFast(
            tokenizer_file=str(path), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )

    def model(self, tokenizer: Any) -> nn.Module:
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=False,
            **self.shape,
        )
        return _prepared(set_attention(LlamaModel(config), self.attention), self.checkpointing)


class Pretrained:
    """Any decoder or encoder of transformers, by hub id or folder.

    Args:
        name: hub id or folder.
        revision: a branch, tag or commit of the hub.
        attention: transformers' attention implementation; "auto" is `caravan.models.attention`.
        trust_remote_code: run the repository's own code. Off unless you mean it.
        checkpointing: recompute activations in the backward pass, for less memory.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        attention: str = "auto",
        trust_remote_code: bool = False,
        checkpointing: bool = False,
    ) -> None:
        self.name = name
        self.attention = attention
        self.hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.checkpointing = checkpointing

    trains_tokenizer = False

    def tokenizer(self, collection: Any, cache_dir: Path) -> Any:
        """The model's own tokenizer; the collection plays no part."""
        return load_tokenizer(self.name, **self.hub)

    def model(self, tokenizer: Any) -> nn.Module:
        model = load_weights(self.name, torch.float32, self.attention, **self.hub)
        return _prepared(model, self.checkpointing)


class LoRA:
    """Low-rank adapters (arXiv 2106.09685) on a frozen backbone; defaults are RepLLaMA's.

    Args:
        rank, alpha, dropout: as in PEFT.
        targets: names of the linear layers, or "all-linear".
    """

    def __init__(
        self,
        rank: int = 32,
        alpha: int = 64,
        dropout: float = 0.1,
        targets: list[str] | str = "all-linear",
    ) -> None:
        self.settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        self.targets = targets

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze the model and put adapters on it; only these are trained and saved."""
        from peft import LoraConfig, TaskType, get_peft_model

        config = LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            target_modules=self.targets,
            revision=getattr(model, "revision", None),  # the adapter finds the same base again
            **self.settings,
        )
        return get_peft_model(model, config)


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


def load_tokenizer(name: str, **hub: Any) -> Any:
    """A tokenizer of the hub or of a folder.

    Raises:
        InputError: it is not to be had.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}: no tokenizer could be loaded ({_first_line(error)})") from None


def load_weights(
    name: str, dtype: torch.dtype, attention: str = "auto", heads: bool = True, **hub: Any
) -> nn.Module:
    """A transformer without a head from the hub or a folder; every weight must be there.

    Args:
        heads: released models bring heads (lm_head, classifier, ...), which are left out; weights
            of layers that the config does not count are refused nevertheless.

    Raises:
        InputError: it is not to be had, or weights are missing, of another shape or not used.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is replaced by the check below
    try:
        model, report = AutoModel.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **hub
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{name}: no model could be loaded ({_first_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
    # The pooler is a head of BERT's pre-training; embeddings are pooled from the states.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    wrong = sorted(str(key[0]) for key in report.get("mismatched_keys", ()))
    unused = sorted(report["unexpected_keys"])
    if heads:
        kinds = {_unnumbered(key) for key, _ in model.named_parameters()}
        unused = [key for key in unused if _unnumbered(key, model.base_model_prefix) in kinds]
    if missing or wrong or unused:
        told = ", ".join(
            [f"{key} missing" for key in missing]
            + [f"{key} mis-shaped" for key in wrong]
            + [f"{key} not used" for key in unused]
        )
        raise InputError(
            f"{name}: {len(missing) + len(wrong) + len(unused)} weights do not match the"
            " architecture"
            f" ({told[:300]}); the folder is incomplete or of another model"
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    model.revision = hub.get("revision")
    return set_attention(model, attention)


def set_attention(model: Any, attention: str) -> nn.Module:
    """Choose the attention; "auto" leaves an architecture that needs its own with that.

    Raises:
        InputError: the architecture lacks the implementation that was asked for by name.
    """
    if attention == "auto" and not cpu_attention.suits(model):
        return model
    try:
        model.set_attn_implementation(cpu_attention.NAME if attention == "auto" else attention)
    except (ValueError, ImportError, KeyError) as error:
        if attention != "auto":
            raise InputError(
                f"backbone.attention={attention} is not to be had for {type(model).__name__}"
                f" ({_first_line(error)})"
            ) from None
    return model


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters."""
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad), total


def _prepared(model: Any, checkpointing: bool) -> nn.Module:
    model.config.use_cache = False
    if checkpointing:
        if (
            "gradient_checkpointing_kwargs"
            not in inspect.signature(model.gradient_checkpointing_enable).parameters
        ):
            raise InputError(f"{type(model).__name__} cannot recompute activations")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _unnumbered(key: str, prefix: str = "") -> str:
    """The name of a weight in whichever layer: `layers.3.norm.weight` is `layers.#.norm.weight`."""
    return re.sub(r"\d+", "#", key.removeprefix(f"{prefix}.") if prefix else key)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
