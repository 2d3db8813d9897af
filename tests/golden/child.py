"""The program of the golden tests: Caravan's commands one after another, in a single process.

python tests/golden/child.py <plan.json> <found.json>

A plan has `commands`, each a script's path or `-m module` with its arguments and perhaps the number
of updates after which it is stopped, and `embed`: a model folder, its export and the texts to embed
with both. What no file of a run holds is written to the second path.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any


class StoppedError(Exception):
    """A training was stopped between two of its updates."""


def perform(command: list[str], stop_after: int | None) -> None:
    """What `python <command>` does, here."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    updates = 0

    def count(*_: Any) -> None:
        nonlocal updates
        updates += 1
        if updates == stop_after:
            raise StoppedError

    hook = register_optimizer_step_post_hook(count)
    sys.argv[:] = command[1:] if command[0] == "-m" else command
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    except StoppedError:
        return
    except SystemExit as end:
        if end.code not in (0, None):
            raise
    finally:
        hook.remove()
    if stop_after is not None:
        raise AssertionError(f"not stopped after {stop_after} updates, there were {updates}")


def embed(model: str, export: str, texts: list[str]) -> dict[str, Any]:
    """Embeddings of texts, as queries and as passages, by Caravan and by sentence-transformers."""
    import caravan

    loaded = caravan.load(model, precision="float32")
    found = {
        "caravan": {
            "queries": loaded.encode_queries(texts).tolist(),
            "passages": loaded.encode_passages(texts).tolist(),
        }
    }
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return found
    exported = SentenceTransformer(export, device="cpu")
    found["sentence_transformers"] = {
        "queries": exported.encode_query(texts).tolist(),
        "passages": exported.encode_document(texts).tolist(),
    }
    return found


def processor() -> str:
    """Who made it: libraries choose their kernels by that too."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    made_by = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return made_by[0] if made_by else platform.processor()


def environment() -> dict[str, str]:
    """What the last digits of a run depend on."""
    import platform
    from importlib.metadata import version

    import torch

    libraries = ("torch", "transformers", "tokenizers", "peft", "safetensors", "faiss-cpu", "bm25s")
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in libraries},
    }


def main() -> None:
    import torch

    torch.set_num_threads(1)  # sums of several threads have other last digits
    plan = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    to = Path(sys.argv[2]).resolve()
    for one in plan["commands"]:
        perform(one["command"], one.get("stop_after"))
    found = {"environment": environment(), "embeddings": embed(**plan["embed"])}
    to.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
