"""A Llama of 1B and of 7B shape on a GPU: tokens/s, share of the card's matrix rate, peak memory.

    python benchmarks/gpu.py [--shapes 1b 7b] [--longest 196 2048] [--data <BEIR folder>]

Weights are random, so nothing is downloaded. Texts have lengths from an eighth of the longest to
the longest, evenly. Three systems: a plain loop over transformers, which pads unsorted
batches; Caravan's chunks of similar length, padded; and without padding.
Encoding, training with LoRA of rank 32, and with QLoRA. With --data the corpus of a BEIR folder, at
most 512 tokens a passage, is encoded too. `--device cpu --shapes tiny` tries the script on a CPU.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import arguments, collection, rendered, table, texts_of, written
from torch import Tensor, nn

from caravan.data.batch import Packed, pack
from caravan.encoding import Encoding
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.hardware import settle_precisions
from caravan.models.tiny_llama import train_bpe
from caravan.training.optim import AdamW

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11_008,
    },
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "tiny": {  # to try the script where there is no GPU
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
    },
}
SYSTEMS = ("plain loop", "padded", "unpadded")
CHUNK = 32_768  # padded tokens at a time, of each system


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """The fastest of some runs after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        started = synchronized(device)
        work()
        found.append(synchronized(device) - started)
    return min(found)


def matrix_rate(device: torch.device, size: int) -> float:
    """Floating-point operations a second that a large product in bf16 reaches."""
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: one @ other, device, 10)


def lengths_of(number: int, longest: int) -> list[int]:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(longest // 8, longest + 1, (number,), generator=rng).tolist()


def operations(shape: dict[str, int], lengths: list[int]) -> float:
    """Of one pass forward over real tokens: products with weights, and causal attention."""
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    shared = shape["num_key_value_heads"] / heads
    weights = (2 + 2 * shared) * width**2 + 3 * width * shape["intermediate_size"]
    tokens, pairs = sum(lengths), sum(n * n for n in lengths) / 2
    return shape["num_hidden_layers"] * (2 * weights * tokens + 4 * width * pairs)


def saved(shape: dict[str, int], to: Path, device: torch.device) -> Path:
    """A folder of random weights in bf16."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**shape, use_cache=False, max_position_embeddings=4096)  # type: ignore[arg-type]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaModel(config)
    torch.set_default_dtype(default)
    model.save_pretrained(to)
    return to


def built(folder: Path, system: str, kind: str, recompute: Any, device: torch.device) -> BiEncoder:
    attention = "unpadded" if system == "unpadded" else "sdpa"
    backbone = Pretrained(str(folder), attention=attention, checkpointing=recompute)
    if kind == "encode":
        backbone.dtype = torch.bfloat16
        return BiEncoder(backbone.model(None), Encoding()).to(device).eval()
    peft = LoRA(rank=32, dropout=0.0, quant_type="nf4" if kind == "qlora" else None)
    backbone.quantization = peft.quantization()
    # Ours as a run has them, embeddings and norms in float32; the loop as one would load it.
    backbone.dtype = torch.bfloat16 if system == "plain loop" or kind == "lora" else torch.float32
    network = BiEncoder(peft.apply(backbone.model(None)), Encoding())
    if system != "plain loop":
        settle_precisions(network, bf16=True)
    return network.to(device).train()


def batches(ids: list[list[int]], system: str) -> Iterator[Packed]:
    """The texts as they are computed: the plain loop pads them in the order in which they come."""
    if system != "plain loop":
        yield pack(ids, CHUNK)
        return
    each = max(CHUNK // max(map(len, ids)), 1)
    for start in range(0, len(ids), each):
        yield as_they_come(ids[start : start + each])


def as_they_come(ids: list[list[int]]) -> Packed:
    from caravan.data.batch import Chunk

    width = max(map(len, ids))
    rows = torch.zeros(len(ids), width, dtype=torch.int64)
    mask = torch.zeros_like(rows)
    for row, real, text in zip(rows, mask, ids, strict=True):
        row[: len(text)], real[: len(text)] = torch.tensor(text), 1
    chunk = Chunk(rows, mask, bool(mask.all()))
    return Packed((chunk,), torch.arange(len(ids)), sum(map(len, ids)), rows.numel())


def embed(network: BiEncoder, packed: Packed, system: str) -> Tensor:
    if system != "plain loop":
        return network.embed(packed)
    chunk = packed.chunks[0]
    mask = chunk.attention_mask
    states = network.backbone(input_ids=chunk.input_ids, attention_mask=mask).last_hidden_state
    last = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    return nn.functional.normalize(last.float(), dim=-1)


def measure(
    folder: Path,
    shape: dict[str, int],
    kind: str,
    system: str,
    longest: int,
    options: Any,
    rate: float,
    device: torch.device,
) -> dict[str, Any]:
    """A row of the table."""
    number = max(options.tokens[kind] * 16 // (9 * longest), 2) // 2 * 2
    lengths = lengths_of(number, longest)
    rng = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, shape["vocab_size"], (n,), generator=rng).tolist() for n in lengths]
    row: dict[str, Any] = {"shape": options.shape, "work": kind, "longest": longest}
    row["system"] = system
    try:
        return {**row, **_measured(folder, shape, kind, system, ids, options, rate, device)}
    except Exception as error:  # noqa: BLE001 - the other rows are worth having
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        sys.stderr.write(f"{row}: {reason}\n")
        return {**row, "tokens/s": reason, "of the rate": "", "peak GiB": ""}


def _measured(
    folder: Path,
    shape: dict[str, int],
    kind: str,
    system: str,
    ids: list[list[int]],
    options: Any,
    rate: float,
    device: torch.device,
) -> dict[str, Any]:
    lengths = list(map(len, ids))
    given = [packed.to(device) for packed in batches(ids, system)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    recompute = {"lora": options.recompute, "qlora": True}.get(kind, False)
    network = built(folder, system, kind, recompute, device)
    if kind == "encode":

        def work() -> None:
            with torch.inference_mode():
                for packed in given:
                    embed(network, packed, system)

    else:
        optimizer = AdamW(lr=1e-4).build(network, 100)["optimizer"]

        def work() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                rows = torch.cat([embed(network, packed, system) for packed in given])
            scores = rows[0::2] @ rows[1::2].T / 0.05
            targets = torch.arange(len(scores), device=device)
            nn.functional.cross_entropy(scores, targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    took = seconds(work, device)
    passes = 1 if kind == "encode" else 2  # frozen weights get no gradient
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return {
        "tokens/s": f"{sum(lengths) / took:,.0f}",
        "of the rate": f"{passes * operations(shape, lengths) / took / rate:.0%}",
        "peak GiB": f"{peak:.1f}",
    }


def corpus(options: Any, folder: Path, device: torch.device) -> list[str]:
    """Seconds to encode a corpus whose words a BPE of 32,000 entries cuts into tokens."""
    found = collection(options.data)
    texts = texts_of(found.corpus, range(len(found.corpus)))
    vocabulary = min(32_000, SHAPES[options.shape]["vocab_size"])
    bpe = train_bpe(iter(texts), vocabulary)
    ids = [encoding.ids[:512] for encoding in bpe.encode_batch(texts)]
    rows = []
    for system in SYSTEMS:
        network = built(folder, system, "encode", False, device)
        given = [packed.to(device) for packed in batches(ids, system)]

        def work(
            network: BiEncoder = network, given: list[Packed] = given, system: str = system
        ) -> None:
            with torch.inference_mode():
                for packed in given:
                    embed(network, packed, system)

        took = seconds(work, device, 1)
        rows.append({"system": system, "seconds": took, "tokens": sum(map(len, ids))})
        del network
        released(device)
    return ["", f"Encoding {found.name}, {len(ids):,} passages, {options.shape}:", "", *table(rows)]


def released(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1b", "7b"], choices=list(SHAPES))
    parser.add_argument("--longest", nargs="+", type=int, default=[196, 2048], help="tokens")
    parser.add_argument("--work", nargs="+", default=["encode", "lora", "qlora"])
    parser.add_argument("--tokens", type=int, default=0, help="real tokens a step; 0: by the work")
    parser.add_argument("--recompute", default="selective", help="LoRA: false, true or selective")
    parser.add_argument("--data", type=Path, help="a BEIR folder whose corpus is encoded too")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--name", default="gpu", help="of the file that --save writes")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu --shapes tiny tries the script without one")
    device = torch.device(options.device)
    options.recompute = {"true": True, "false": False}.get(options.recompute, options.recompute)
    sizes = {"encode": 131_072, "lora": 8_192, "qlora": 16_384}
    options.tokens = {kind: options.tokens or sizes[kind] for kind in sizes}
    rate = matrix_rate(device, 8192 if device.type == "cuda" else 512)
    rows: list[dict[str, Any]] = []
    encoded: list[str] = []
    for name in options.shapes:
        options.shape = name
        shape = SHAPES[options.shape]
        with tempfile.TemporaryDirectory() as scratch:
            folder = saved(shape, Path(scratch), device)
            released(device)
            for kind in options.work:
                for longest in options.longest:
                    for system in SYSTEMS:
                        given = (folder, shape, kind, system, longest, options, rate, device)
                        rows.append(measure(*given))
                        sys.stderr.write(f"{rows[-1]}\n")
                        released(device)
                        save(rows, encoded, rate, device, options)
            if options.data:
                encoded += corpus(options, folder, device)
                save(rows, encoded, rate, device, options)
    sys.stdout.write(save(rows, encoded, rate, device, options))


def save(
    rows: list[dict[str, Any]], encoded: list[str], rate: float, device: torch.device, options: Any
) -> str:
    """The page so far, written with --save: what ends the script early leaves the rows before."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    notes = [
        f"Measured matrix rate of {card}: {rate / 1e12:.3g}e12 operations a second in bf16."
        " `of the rate` counts real tokens: one pass for encoding, two for training adapters,"
        " whatever is computed again.",
        *encoded,
    ]
    page = rendered("Llama shapes from random weights, mixed lengths", rows, notes)
    if options.save:
        written(options.name, page)
    return page


if __name__ == "__main__":
    main()
