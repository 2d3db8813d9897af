"""Print what a report of a problem needs, and what keeps this machine from its full speed.

    python -m caravan.doctor

Each line is a fact; a line that starts with "!" is a problem, with its remedy.
"""

from __future__ import annotations

import argparse
import os
import platform
import pwd
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from caravan import distributed, manifests
from caravan.errors import InputError, answering, first_line
from caravan.files import refuse_foreign

LIBRARIES = (
    "torch", "pytorch-lightning", "transformers", "tokenizers", "peft", "bitsandbytes",
    "hydra-core", "datasets", "numpy",
)  # fmt: skip
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")
"""Packages that install the same module; the one installed last is imported."""
LEAST_FREE = 10 * 2**30
LEAST_SHARED = 2**30
"""Bytes of /dev/shm that NCCL and workers of DataLoaders never exceeded."""
LEAST_FILES = 1024
"""Open files of a process: every memory-mapped shard of embeddings is one."""
HUB_TIMEOUT_S = 3


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m caravan.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    return answering(_show)


def _show() -> None:
    for line in report():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def report() -> Iterator[str]:
    """The lines of the report."""
    for part in (software, processors, gpus, limits, cache, hub):
        yield from part()


def software() -> Iterator[str]:
    """The versions of the libraries, and the build of faiss.

    Two packages of faiss overwrite each other's files.
    """
    yield f"python {platform.python_version()}, {platform.platform()}"
    found = manifests.versions((*LIBRARIES, *FAISS))
    packages = [name for name in FAISS if found[name] != manifests.NOT_INSTALLED]
    shown = [name for name in found if name not in FAISS or name in packages]
    yield ", ".join(f"{name} {found[name]}" for name in shown)
    if not packages:
        yield "! faiss is not installed; run: pip install faiss-cpu"
    if len(packages) > 1:
        remove = f"pip uninstall {' '.join(packages)}"
        yield f"! several packages hold faiss; run: {remove}, then install one"
    if packages:
        yield _faiss()


def _faiss() -> str:
    """The instruction sets that faiss was built for, and the GPUs that it can use."""
    import torch

    try:
        import faiss
    except ImportError as error:
        return f"! faiss cannot be imported ({first_line(error)}); install it again"
    # With a wrong driver, faiss-gpu may end the process when it is asked.
    usable = torch.cuda.is_available() and hasattr(faiss, "get_num_gpus")
    count = f", {faiss.get_num_gpus()} GPUs" if usable else ""
    return f"faiss build: {faiss.get_compile_options().strip()}{count}"


def processors() -> Iterator[str]:
    """CPU cores that this process may use, and the precision in which they compute."""
    import torch

    from caravan.models import hardware

    cores = distributed.cores()
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        precision = hardware.resolve("auto")
        slow = "" if precision == "bf16" else " (no AVX512-BF16 or AMX: two to four times slower)"
        yield f"precision {precision} on {cores} cores{slow}"
    if threads < cores:
        yield (
            f"! {threads} of {cores} cores are used; unset OMP_NUM_THREADS if this process may"
            " have all"
        )


def gpus() -> Iterator[str]:
    """The GPUs, whether one process can use them all, and what PyTorch needs to see them."""
    import torch

    from caravan.models import hardware

    cuda, driver = torch.version.cuda, _driver()
    if not torch.cuda.is_available():
        yield "no GPU is used"
        if driver and cuda:
            yield (
                f"! driver {driver} is installed, but torch {torch.__version__} (CUDA {cuda}) finds"
                " no GPU: update the driver (CUDA 13: 580 or newer), or install a build for your"
                " driver (docs/installation.md)"
            )
        elif driver:
            yield (
                f"! driver {driver} is installed, but torch {torch.__version__} is built for CPUs;"
                " install requirements-gpu.txt"
            )
        return
    count = torch.cuda.device_count()
    yield f"CUDA {cuda}, driver {driver or 'unknown'}, precision {hardware.resolve('auto')}"
    for i in range(count):
        found = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0]
        yield (
            f"cuda:{i} {found.name}, {_size(found.total_memory)} ({_size(free)} free),"
            f" compute capability {found.major}.{found.minor}"
        )
    if not hardware.has_bf16():
        yield "! no bf16 on this GPU: models compute in float32, four to eight times slower"
    if count > 1:
        yield (
            f"{count - 1} GPUs are idle unless you start torchrun --nproc-per-node {count}"
            f" evaluate.py ..., or train with strategy=ddp trainer.devices={count}"
        )


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver, without its tools."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def limits() -> Iterator[str]:
    """Open files, and the shared memory of workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield f"open files: {_count(soft)} (soft limit), {_count(hard)} (hard limit)"
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:  # programs raise the soft limit to it
        yield (
            f"! the hard limit of open files is below {LEAST_FILES:,}; raise it"
            " (/etc/security/limits.conf, or docker run --ulimit nofile=65536)"
        )
    shared = Path("/dev/shm")
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        yield f"/dev/shm: {_size(total)}"
        if total < LEAST_SHARED:
            yield "! /dev/shm is small for NCCL on several GPUs; docker run --shm-size=8g raises it"


def cache() -> Iterator[str]:
    """The folder of collections, its owner and its disk."""
    folder = Path(os.environ.get("CARAVAN_CACHE", ".cache")).absolute()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(there).free
    owner = f"owner {_user(folder.stat().st_uid)}" if folder.exists() else "not made yet"
    yield f"cache: {folder}, {owner}, {_size(free)} free"
    if folder.exists():
        try:
            refuse_foreign(folder)
        except InputError as error:
            yield f"! {error}"
    if not os.access(there, os.W_OK):
        yield f"! {there} cannot be written; set CARAVAN_CACHE to another folder"
    if free < LEAST_FREE:
        yield (
            f"! less than {_size(LEAST_FREE)} are free; set CARAVAN_CACHE to a folder on a larger"
            " disk"
        )


def hub() -> Iterator[str]:
    """Whether models and datasets can be downloaded."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        yield "hub: HF_HUB_OFFLINE is set, so only cached models load"
        return
    try:
        HfApi().model_info("gpt2", timeout=HUB_TIMEOUT_S)
        yield f"hub: {constants.ENDPOINT} answers"
    except Exception as error:  # noqa: BLE001 - of httpx or of httpx2, by the hub's version
        yield (
            f"! hub: {constants.ENDPOINT} does not answer ({first_line(error)}); set HF_ENDPOINT to"
            " a mirror, or give folders as backbone.name"
        )


def _user(uid: int) -> str:
    """The name of a user, or the number of one that this machine does not know."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
