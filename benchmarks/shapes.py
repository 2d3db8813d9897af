"""Shared by the benchmarks: Llama shapes with random weights on a device, and texts as token ids.

Nothing is read or downloaded. Token ids are random too: the time of a pass depends on the lengths
of the texts, which are those of real collections.
"""

from __future__ import annotations

import gc
import inspect
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from caravan.data.batch import Chunk, Fields, Packed, TokenIds, TrainBatch, Unpacked
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import varlen
from caravan.models.adapters import LoRA
from caravan.models.biencoder import BiEncoder
from caravan.models.hardware import GPU_CHUNK, frozen_linears, settle_precisions
from caravan.models.loading import set_attention
from caravan.models.preparing import prepared

NAMES = (
    *("vocab_size", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "intermediate_size"),
)
SHAPES = {
    "7b": dict(zip(NAMES, (32_000, 4096, 32, 32, 32, 11_008), strict=True)),  # Llama-2-7B
    "1b": dict(zip(NAMES, (128_256, 2048, 16, 32, 8, 8192), strict=True)),  # Llama-3.2-1B
    "tiny": dict(zip(NAMES, (1000, 64, 2, 2, 1, 128), strict=True)),
}
SCIFACT = Path(__file__).with_name("scifact_lengths.npy")
"""Tokens (BERT's WordPiece) of each of SciFact's 5,183 passages with its title, uint16."""


@dataclass(frozen=True)
class Size:
    """The amount of work in a benchmark's rows."""

    tokens: int = 131_072  # encoded at one time
    passages: int = 5_183  # SciFact's
    queries: int = 128  # a RepLLaMA batch, over all GPUs
    group: int = 16  # passages of a query
    vectors: int = 1_000_000  # searched
    searches: int = 6_980  # queries of MS MARCO's dev split
    matrix: int = 8192  # rows and columns of the products that measure a rate
    copied: int = 2**32  # bytes


TINY = Size(256, 8, 8, 2, 2000, 20, 64, 2**16)


def even(tokens: int, longest: int) -> np.ndarray:
    """Lengths from an eighth of the longest to the longest, evenly."""
    number = max(tokens * 16 // (9 * longest), 2)
    return np.random.default_rng(0).integers(longest // 8, longest + 1, number)


def scifact(passages: int, longest: int = 512) -> np.ndarray:
    """Lengths of SciFact's first passages, in the order of the collection."""
    lengths: np.ndarray = np.load(SCIFACT)[:passages].astype(np.int64)
    return lengths.clip(max=longest)


def msmarco(rng: np.random.Generator, texts: int, mean: int, longest: int) -> np.ndarray:
    """Log-normal lengths: MS MARCO's are around 10 tokens for queries and 75 for passages."""
    lengths: np.ndarray = rng.lognormal(np.log(mean), 0.35, texts).astype(np.int32)
    return lengths.clip(4, longest)


def tokens_of(lengths: np.ndarray, vocabulary: int) -> TokenIds:
    """Random token ids."""
    rng = np.random.default_rng(1)
    ids = rng.integers(3, vocabulary, int(lengths.sum()), dtype=np.int32)
    return TokenIds(ids, lengths.astype(np.int32))


def unsorted(texts: TokenIds, budget: int) -> Packed:
    """Texts in their order, padded to the longest of all, as a plain loop does."""
    width, ends = int(texts.lengths.max()), np.cumsum(texts.lengths)
    rows = [torch.from_numpy(ids).long() for ids in np.split(texts.ids, ends[:-1])]
    each, chunks = max(budget // width, 1), []
    for start in range(0, len(rows), each):
        some = rows[start : start + each]
        mask = pad_sequence([torch.ones_like(row) for row in some], batch_first=True)
        chunks.append(Chunk(pad_sequence(some, batch_first=True), mask, bool(mask.all())))
    return Packed(tuple(chunks), torch.arange(len(rows)), len(texts.ids))


def share(
    vocabulary: int, queries: int, group: int, pads: bool = True, seed: int = 0
) -> tuple[Unpacked[TrainBatch], list[int]]:
    """One GPU's share of a RepLLaMA batch, and the lengths of its texts."""
    rng = np.random.default_rng(seed)
    lengths = msmarco(rng, queries, 10, 32), msmarco(rng, queries * group, 75, 196)
    rows = np.arange(queries * group).reshape(queries, group)
    fields: Fields = {
        "texts": tuple(tokens_of(each, vocabulary) for each in lengths),
        "passage_rows": rows,
        "passage_keys": rows,
        "excluded_keys": rows[:, :1],
    }
    batch = Unpacked(TrainBatch, fields, GPU_CHUNK, 0, pads)
    return batch, np.concatenate(lengths).tolist()


def operations(name: str, lengths: Any) -> float:
    """Floating-point operations of a forward pass over real tokens, attention included."""
    shape = SHAPES[name]
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    shared = shape["num_key_value_heads"] / heads
    weights = (2 + 2 * shared) * width**2 + 3 * width * shape["intermediate_size"]
    tokens, pairs = sum(lengths), sum(n * n for n in lengths) / 2
    return float(shape["num_hidden_layers"] * (2 * weights * tokens + 4 * width * pairs))


def llama(name: str) -> Any:
    """A Llama with random weights, on the current device and in the default precision."""
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**SHAPES[name], use_cache=False, max_position_embeddings=4096))  # type: ignore[arg-type]


@cache
def outline(name: str) -> Any:
    """A Llama with RepLLaMA's adapters and without weights, for estimates of memory."""
    with torch.device("meta"):
        return LoRA().apply(llama(name))


class Models:
    """The model on the device, which rows share as long as they need the same one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.release()

    def release(self) -> None:
        """Free the memory of the model."""
        self.kind: tuple[str, str] | None = None
        self.model: Any = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def base(self, name: str) -> Any:
        """A transformer with bf16 weights."""
        if self.kind == (name, "lora"):  # QLoRA quantizes the weights that are there
            plain = self.model.transformer.unload()
            self.model, self.kind = plain.requires_grad_(False).bfloat16(), (name, "base")
        if self.kind != (name, "base"):
            self.release()
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                with self.device:
                    self.model = llama(name).requires_grad_(False)
            finally:
                torch.set_default_dtype(default)
            self.kind = name, "base"
        return self.model

    def encoder(self, name: str, attention: str) -> BiEncoder:
        """A retriever for inference."""
        return BiEncoder(set_attention(self.base(name), attention), Encoding()).eval()

    def trainee(
        self,
        name: str,
        attention: str = "sdpa",
        four_bits: bool = False,
        bf16_norms: bool = False,
    ) -> BiEncoder:
        """A retriever with RepLLaMA's adapters, in the precisions of a training run.

        Args:
            four_bits: quantize linear layers to NF4 (QLoRA).
            bf16_norms: norms and embeddings in bf16 too, instead of float32.
        """
        kind = name, "qlora" if four_bits else "lora"
        if self.kind != kind:
            base = prepared(self.base(name), True, bidirectional=False)
            self.kind = None  # until the model is whole
            if four_bits:
                quantize(base, self.device)
            adapted: Any = LoRA().apply(base)
            adapted.active_peft_config.base_model_name_or_path = name  # not saved with its base
            self.model, self.kind = BiEncoder(adapted, Encoding()).to(self.device), kind
        network: BiEncoder = self.model
        settle_precisions(network, True, bf16_norms)
        set_attention(network.transformer.get_base_model(), attention)
        return network.train()


def quantize(model: nn.Module, device: torch.device) -> None:
    """Replace the linear layers by those of bitsandbytes in NF4, in place, as transformers does.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ImportError("bitsandbytes is not installed")
    from bitsandbytes.nn import Linear4bit, Params4bit

    model.requires_grad_(False)
    linears = {id(layer) for layer in frozen_linears(model)}
    found = [(name, layer) for name, layer in model.named_modules() if id(layer) in linears]
    for name, layer in found:
        settings: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
        with torch.device("meta"):
            packed = Linear4bit(
                layer.in_features, layer.out_features, False, torch.bfloat16, **settings
            )
        packed.weight = Params4bit(layer.weight.data, requires_grad=False, **settings).to(device)
        if hasattr(packed, "support_avx512bf16_for_cpu"):
            packed.support_avx512bf16_for_cpu = False  # see `caravan.models.loading`
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # read by PEFT


def use_older_kernel() -> str | None:
    """Let `attention=unpadded` use the kernel of PyTorch 2.11, which Caravan does not accept.

    That kernel has no grouped heads, so keys and values are repeated.

    Returns:
        A note for the table; None where nothing had to change.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    try:
        varlen.kernel()
    except InputError:
        if "window_size" not in inspect.signature(varlen_attn).parameters:
            return None

        def repeated(query: Any, key: Any, value: Any, *bounds: Any, **settings: Any) -> Any:
            if settings.pop("enable_gqa"):
                times = query.shape[1] // key.shape[1]
                key, value = (states.repeat_interleave(times, 1) for states in (key, value))
            return varlen_attn(query, key, value, *bounds, **settings)

        varlen.kernel = lambda: repeated  # type: ignore[assignment]
        return f"`unpadded` uses the older kernel of torch {torch.__version__}."
    return None
