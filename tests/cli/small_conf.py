"""The real roots of `conf/` over groups of one option each, whose classes are in a small module."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

HOME = Path(__file__).parents[2]
CONF = HOME / "conf"

PARTS = '''
"""Stand-ins for the classes behind conf/."""
from typing import Any, Literal, Sequence

class Part:
    def __init__(self, size: int = 1, rate: float = 0.1, on: bool = False, name: str = "a",
                 kind: Literal["flat", "deep"] = "flat", betas: tuple[float, float] = (0.9, 0.99),
                 options: dict[str, int] | None = None, part: "Part | None" = None): ...

class Trainer:
    def __init__(self, max_steps: int = -1, max_epochs: int | None = None,
                 val_check_interval: int | float | None = None, max_time: str | None = None,
                 precision: str | None = None): ...

class Folder:
    def __init__(self, path: str, split: str = "test"): ...

class Index:
    def __init__(self, factory: str = "Flat", k: int = 1000): ...

class Evaluation:
    def __init__(self, index: Any, measures: Sequence[str]): ...

class Checkpoint:
    def __init__(self, monitor: str | None = None): ...
'''
APP = """
import json
import logging
import os
import signal
import sys
import types

# The rules of training import Lightning; none of them is about the small configs.
train = types.SimpleNamespace(RULES=[], completed=lambda cfg: (cfg, {}))
sys.modules["caravan.cli.train"] = train

from caravan.cli.main import entry
from caravan.errors import InputError, OccupiedError


class Refuses:
    def __init__(self):
        raise InputError("empty-corpus", "the corpus is empty: corpus.jsonl:1; give another folder")


@entry("train")
def main(cfg):
    from hydra.utils import instantiate

    if cfg.name == "refuses":
        raise InputError("empty-corpus", "the corpus is empty: corpus.jsonl:1; give another folder")
    if cfg.name == "resolves":
        str(cfg.loss.name)
    if cfg.name == "instantiates":
        instantiate(cfg.loss)
    if cfg.name == "refuses_inside":
        instantiate({"_target_": "app.Refuses"})
    if cfg.name == "worker_terminated":
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
    if cfg.name == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
    if cfg.name == "fails":
        raise ZeroDivisionError("a defect")
    if cfg.name == "stopped":
        raise KeyboardInterrupt
    if cfg.name == "stopped_by_lightning":
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)
    if cfg.name == "waits":
        print("waits", flush=True)
        input()
    logging.getLogger("caravan.some.module").info("hello from %s", cfg.name)
    if os.path.exists(os.path.join(cfg.run_dir, "out.json")) and "OTHER_DATA" in os.environ:
        raise OccupiedError("run-dir-in-use", f"{cfg.run_dir} holds another run")
    with open(os.path.join(cfg.run_dir, "out.json"), "w") as file:
        json.dump({"cwd": os.getcwd(), "run_dir": cfg.run_dir, "seed": cfg.seed}, file)
    with open(os.path.join(cfg.run_dir, "metrics.json"), "w") as file:
        json.dump({"monitored": "val/MRR@10", "best": 0.25, "resume": cfg.resume,
                   "loss": cfg.loss.get("name")}, file)


if __name__ == "__main__":
    main()
"""
"""A program whose jobs end in the way that `name` says."""
FILES = {
    "stage": "{_target_: parts.Part, _partial_: true}",
    "backbone": "{_target_: parts.Part, size: 3}",
    "peft": "{_target_: parts.Part}",
    "loss": "{_target_: parts.Part}",
    "sampler": "{_target_: parts.Part}",
    "data": "{_target_: parts.Part}",
    "index": "{_target_: parts.Index, k: 1000}",
    "fuse": "{_target_: parts.Part}",
    "strategy": "{_target_: parts.Part}",
    "optimizer": "{_target_: parts.Part, rate: 1.0e-4}",
    "logger": "{board: {_target_: parts.Part}}",
    "callbacks": """
        evaluation: {_target_: parts.Evaluation, index: "${index}", measures: [MRR@10]}
        best: {_target_: parts.Checkpoint, monitor: val/MRR@10}
    """,
}
TRAINER = "trainer: {_target_: parts.Trainer, _partial_: true, max_steps: 10}\n"


def small_conf(home: Path) -> Path:
    """Write `parts.py` and `conf/` into a folder (to be put on sys.path); returns the latter."""
    folder = home / "conf"
    folder.mkdir()
    (home / "parts.py").write_text(PARTS)
    shutil.copytree(CONF / "hydra", folder / "hydra")
    for root in ("train", "evaluate"):
        text = (CONF / f"{root}.yaml").read_text()
        text = re.sub(r"^trainer:\n(  .*\n)+", TRAINER, text, flags=re.MULTILINE)
        (folder / f"{root}.yaml").write_text(text)
        for default in yaml.safe_load(text)["defaults"]:
            for group, option in default.items() if isinstance(default, dict) else ():
                if group in FILES:
                    (folder / group).mkdir(exist_ok=True)
                    body = re.sub("^ {8}", "", FILES[group].strip("\n"), flags=re.MULTILINE)
                    (folder / group / f"{option}.yaml").write_text(body + "\n")
    (folder / "backbone" / "tiny_llama.yaml").write_text(FILES["backbone"])
    (folder / "data" / "beir.yaml").write_text("_target_: parts.Folder\npath: ???\n")
    (folder / "experiment").mkdir()
    (folder / "sweep").mkdir()
    return folder
