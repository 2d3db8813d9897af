"""Heads of conf/experiment and conf/sweep: commands that lead to one another, expected times."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from tests.small_conf import CONF
from tests.test_conf import commands, launch_command
from transformers import LlamaConfig, Qwen3Config

from caravan.cli import schema
from caravan.cli.compose import Composer, without_hydra
from caravan.encoding import Encoding
from caravan.training.gradcache import GradCache
from caravan.training.memory import GIB
from caravan.training.stage import Stage, memory_needed

pytestmark = pytest.mark.slow

FILES = sorted(path for group in ("experiment", "sweep") for path in (CONF / group).rglob("*.yaml"))
TRAINED_OR_MEASURED = [
    path
    for path in FILES
    if path.parent.name in ("papers", "llara", "eval")
    and path != CONF / "experiment/eval/beir.yaml"
]


class Told(NamedTuple):
    """A command of a head, and the config that it stands for."""

    file: str
    root: str
    given: list[str]
    cfg: Any


@pytest.fixture(scope="module")
def told() -> list[Told]:
    """The commands of all heads, but for those that sweep over what they give themselves."""
    return list(_told())


def _told() -> Iterator[Told]:
    for root in ("train", "evaluate"):
        with Composer(CONF, root, schema.ROOTS[root]) as composer:
            for path in FILES:
                for i, (program, given) in enumerate(commands(path.read_text())):
                    if program == root and ("-m" not in given or i == 0):
                        arguments = [text for text in given if text != "-m"]
                        cfg = without_hydra(composer.compose(arguments))
                        yield Told(str(path.relative_to(CONF)), root, arguments, cfg)


def test_commands_on_ms_marco_read_its_own_files(told: list[Told]) -> None:
    readers = {"/data/msmarco": "MsMarcoPassage", "/data/msmarco-document": "MsMarcoDocument"}
    seen = 0
    for one in told:
        if (path := one.cfg.data.get("path")) in readers:
            assert one.cfg.data._target_.rpartition(".")[2] == readers[path], one.given
            seen += 1
    assert seen >= 60


def test_what_a_command_reads_another_one_writes(told: list[Told]) -> None:
    written = {file for one in told for file in _written(one)}
    missing = [
        (one.file, file)
        for one in told
        for file in _read(one)
        if not file.startswith(("runs/mine/", "runs/sweeps/")) and file not in written
    ]
    assert not missing
    assert sum(1 for one in told for _ in _read(one)) >= 80


def _read(one: Told) -> Iterator[str]:
    """The model folders and runs of other commands that a command names."""
    keys = (
        "init_from",
        "sampler.runs",
        "sampler.teacher",
        "validation.run",
        "retriever",
        "reranker",
    )
    for key in keys:
        value = OmegaConf.select(one.cfg, key) if one.root == "train" or "." not in key else None
        for text in [value] if isinstance(value, str) else value or []:
            if text.startswith("runs/"):
                yield (
                    _of_each(one, key)
                    if one.cfg.get("collections") and key == "retriever"
                    else text
                )


def _of_each(one: Told, key: str) -> str:
    """As it is written for each of several collections."""
    return str(OmegaConf.to_container(one.cfg)[key])  # type: ignore[call-overload, index]


def _written(one: Told) -> Iterator[str]:
    home = one.cfg.run_dir
    if one.root == "train":
        yield f"{home}/model"
        return
    asked, several = one.cfg.retriever, one.cfg.collections is not None
    split = "${data.split}" if several else one.cfg.data.split
    home = f"{home}/${{data.name}}" if several else home
    stages = ["reranked"] if one.cfg.reranker else []
    for name in [asked] if isinstance(asked, str) else [*asked, "fused"]:
        stages.append(
            name if name in ("bm25", "fused") else "run" if ".trec" in name else "retriever"
        )
    for stage in stages:
        yield f"{home}/runs/{stage}.{split}.trec"


def test_no_experiment_is_another_one_by_a_second_name(told: list[Told]) -> None:
    seen: dict[str, str] = {}
    for one in told:
        if one.file.startswith("experiment/") and f"experiment={one.file[11:-5]}" in one.given[:1]:
            own = OmegaConf.to_container(one.cfg)
            assert isinstance(own, dict)
            del own["name"]
            if _launches(one):
                assert seen.setdefault(repr(own), one.file) == one.file
    assert len(seen) >= 50


WEIGHTS = {  # billions, of the layers: what a token is multiplied by
    "meta-llama/Llama-2-7b-hf": 6.476,
    "meta-llama/Llama-2-13b-hf": 12.688,
    "meta-llama/Llama-3.1-8B": 6.979,
    "Qwen/Qwen3-4B-Base": 3.633,
}
REPLLAMA = 502_939 * (32 + 16 * 196) * WEIGHTS["meta-llama/Llama-2-7b-hf"] * 3 / 80
"""Tokens times weights times passes in an hour of one A800."""


TIME = re.compile(
    r"Expected time \(counted, docs/papers\.md\): "
    r"(\d+) hours o[nf] one A800, (less than 1|\d+) on 16"
)


def test_the_expected_times_are_those_that_the_docs_count(told: list[Told]) -> None:
    launched = {one.file: one for one in told if _launches(one)}
    for path in TRAINED_OR_MEASURED:
        found = TIME.search(" ".join(path.read_text().replace("\n#", "").split()))
        assert found is not None, path
        one = launched[str(path.relative_to(CONF))]
        work = _of_training(one.cfg) if one.root == "train" else _of_evaluation(one.cfg)
        hours = work / REPLLAMA
        assert int(found[1]) == (float(f"{hours:.2g}") if hours >= 10 else round(hours)), path
        assert found[2] == (str(round(hours / 16)) if hours >= 8 else "less than 1"), path
    assert len(TRAINED_OR_MEASURED) >= 30


def _launches(one: Told) -> bool:
    """Whether it is the command that a file opens with."""
    return launch_command((CONF / one.file).read_text()) == (one.root, one.given)


def _of_training(cfg: Any) -> float:
    weights = WEIGHTS[cfg.backbone.name]
    query, passage = cfg.encoding.query_length, cfg.encoding.passage_length
    if cfg.stage._target_.endswith("Adaptation"):
        chunks = cfg.batching.queries_per_batch * cfg.trainer.accumulate_grad_batches
        return float(cfg.trainer.max_steps * chunks * passage * weights * 4)
    group = 1 + cfg.sampler.number
    reranks = cfg.encoding.kind == "reranker"
    tokens = group * (query + passage) if reranks else query + group * passage
    queries = 367_013 if cfg.data._target_.endswith("MsMarcoDocument") else 502_939
    return float(queries * tokens * weights * (3 + (cfg.gradcache.chunk is not None)))


def _of_evaluation(cfg: Any) -> float:
    large = cfg.reranker is not None and "13b" in cfg.reranker
    weights = WEIGHTS[f"meta-llama/Llama-2-{'13' if large else '7'}b-hf"]
    if cfg.collections is not None:
        queries, passages, length = 33_234, 24_561_473, 196
    elif cfg.data._target_.endswith("MsMarcoDocument"):
        queries, passages, length = 5_193, 3_213_835, 2048
    else:
        queries, passages, length = 6_980, 8_841_823, 196
    return weights * length * (passages if cfg.reranker is None else queries * cfg.rerank.depth)


LLAMA = {"num_attention_heads": 32, "num_hidden_layers": 32, "hidden_size": 4096}
LLAMA_13B = {"num_attention_heads": 40, "num_hidden_layers": 40, "hidden_size": 5120}
QWEN = {"num_attention_heads": 32, "num_hidden_layers": 36, "hidden_size": 2560, "head_dim": 128}
BASES = {
    "meta-llama/Llama-2-7b-hf": LlamaConfig(**LLAMA, intermediate_size=11008),
    "meta-llama/Llama-2-13b-hf": LlamaConfig(**LLAMA_13B, intermediate_size=13824),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        **LLAMA, intermediate_size=14336, num_key_value_heads=8, vocab_size=128_256
    ),
    "Qwen/Qwen3-4B-Base": Qwen3Config(
        **QWEN, intermediate_size=9728, num_key_value_heads=8, vocab_size=151_936,
        tie_word_embeddings=True,
    ),
}  # fmt: skip


class _Batches(list[Any]):
    """Any batch is this one."""

    def __init__(self, batch: Any) -> None:
        super().__init__([batch] * 1000)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(0)


class _Module:
    """A LightningModule's part in the estimate, with an architecture that needs no hub."""

    outline = Stage.outline

    def __init__(self, cfg: Any) -> None:
        settings = OmegaConf.to_container(cfg.encoding, resolve=True)
        self.encoding = Encoding(**settings)  # type: ignore[arg-type]
        self.peft = schema.build(cfg, "peft")["peft"]
        self.bf16, self.tokenizer = True, None
        self.uses_output_layer = cfg.stage._target_.endswith("Adaptation")
        chunk = cfg.gradcache.chunk
        self.gradcache = None if chunk is None else GradCache(chunk)
        self.backbone = SimpleNamespace(
            name=cfg.backbone.name,
            checkpointing=cfg.backbone.checkpointing,
            config=lambda _: BASES[cfg.backbone.name],
        )


def test_the_memory_that_a_head_tells_is_the_estimate(
    told: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caravan.training.stage.device_memory", lambda device: math.inf)
    trainer = SimpleNamespace(
        num_devices=1, num_nodes=1, strategy=SimpleNamespace(root_device=torch.device("cuda"))
    )
    found, wanted = {}, {}
    for path in FILES:
        text = " ".join(line.lstrip("# ") for line in path.read_text().splitlines())
        figure = re.search(r"(\d+\.\d) GiB", text)
        launched = launch_command(path.read_text())
        if figure is None or "own estimate" not in text or launched is None:
            continue
        cfg = next(one.cfg for one in told if (one.root, one.given) == launched)
        longest = cfg.encoding.passage_length  # of a chunk to adapt on
        texts = SimpleNamespace(padded=cfg.batching.queries_per_batch * longest, chunks=1)
        data = SimpleNamespace(
            setup=lambda: None,
            queries_per_batch=cfg.batching.queries_per_batch,
            training=_Batches(texts),
        )
        wanted[path.stem] = float(figure[1])
        module = _Module(cfg)
        found[path.stem] = memory_needed(module, module.outline(), data, trainer).total / GIB
    assert len(wanted) >= 20
    assert found == pytest.approx(wanted, abs=0.1)
