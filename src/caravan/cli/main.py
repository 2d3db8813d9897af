"""The entry point of `train.py` and `evaluate.py`: check the config, then run the job.

Before Hydra starts, the config (for a sweep, the config of every job) is composed and all mistakes
are reported together. A user error exits with code 2 without a traceback, Ctrl-C with 130; other
exceptions print a traceback.

    @entry("train")
    def main(cfg): ...
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import logging
import os
import platform
import resource
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError

from caravan.cli import schema, sources
from caravan.distributed import is_main_process
from caravan.errors import (
    FAILED,
    INTERRUPTED,
    TERMINATED,
    USER,
    OccupiedError,
    disk_error,
    first_line,
    is_termination,
    printable,
    sentence,
)
from caravan.files import claimed
from caravan.report import jobs

log = logging.getLogger("caravan")
ANSWERED = {"--help", "-h", "--hydra-help", "--version", "-sc", "--shell-completion"}
"""Flags that Hydra handles without running a job."""
LIBRARIES = tuple(f"Error in call to target '{name}." for name in ("pytorch_lightning", "torch"))
"""Start of Hydra's message for an exception in a library's constructor, caused by a setting."""
Task = Callable[[DictConfig], Any]


def entry(name: str) -> Callable[[Task], Callable[[], None]]:
    """Decorator that turns a function of a config into the main function of a script.

    Args:
        name: the primary config in `conf/` beside the script, and its key in
            `caravan.cli.schema.ROOTS`.
    """

    def decorate(task: Task) -> Callable[[], None]:
        script = Path(inspect.getfile(task))
        conf = script.resolve().parent / "conf"
        root = schema.ROOTS[name]
        schema.register()
        program = hydra.main(version_base="1.3", config_path=str(conf), config_name=name)

        @functools.wraps(task)
        def run() -> None:
            prepare_process()
            typed = f"python {script.name} {shlex.join(sys.argv[1:])}"
            os.environ[schema.COMMAND] = typed.rstrip()
            if not sys.argv[1:]:
                sys.argv.append("--help")
            sweep, failed = None, False
            try:
                if not ANSWERED & set(sys.argv[1:]):
                    from caravan.cli import compose  # it imports torch

                    sys.argv[1:], sweep = compose.preflight(sys.argv[1:], conf, name)
                try:
                    program(_job(task, root))()
                except _Failed:  # raised after all jobs have run
                    failed = True
                if sweep is not None:
                    _end_of_sweep(sweep, failed)
            except KeyboardInterrupt as stop:
                _interrupted(root, stop)
            except SystemExit as stop:
                if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning has caught it
                    _interrupted(root, stop.__context__)
                raise
            except Exception as error:
                message = _sentence(error)
                if message is None:
                    raise
                _leave(message, USER)

        return run

    return decorate


def _job(task: Task, root: type) -> Task:
    """Wrap a task as one job: set run_dir, check the config, report user errors in one sentence."""

    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        settings = HydraConfig.get()
        sweep = settings.mode == RunMode.MULTIRUN
        if not is_main_process():
            logging.getLogger().setLevel(logging.WARNING)
        if sweep:
            cfg.run_dir = os.path.join(settings.sweep.dir, settings.sweep.subdir).rstrip("/")
        else:
            cfg.run_dir = settings.run.dir
        try:
            # Other ranks write no files.
            with claimed(Path(cfg.run_dir)) if is_main_process() else contextlib.nullcontext():
                if sweep:
                    return _recorded(checked, cfg, list(settings.overrides.task))
                return checked(cfg)
        except Exception as error:
            message = _sentence(error)
            if message is None and not sweep:
                raise
            log.error(message or "the job failed", exc_info=message is None)
            if sweep:
                raise _Failed from error
            raise SystemExit(USER) from None

    def checked(cfg: DictConfig) -> Any:
        from caravan.cli import compose

        compose.refuse([f"{one.key}: {one.text}" for one in compose.check(cfg, root)])
        try:
            return task(cfg)
        except RuntimeError as error:
            if is_termination(error):
                raise _Terminated from error
            raise

    return job


def _recorded(task: Task, cfg: DictConfig, overrides: list[str]) -> Any:
    """Run one job of a sweep and record its state in its folder.

    A restarted sweep skips finished jobs and resumes interrupted jobs.
    """
    run_dir = Path(cfg.run_dir)
    if "resume" in cfg:
        cfg.resume = True
    finished = jobs.is_finished(run_dir)
    if is_main_process() and not finished:
        jobs.write(run_dir, overrides, jobs.RUNNING)
    try:
        result = task(cfg)
    except Exception as error:
        # The record of a finished job stays if this job is of another run.
        if is_main_process() and not (finished and isinstance(error, OccupiedError)):
            reason = _sentence(error) or f"{type(error).__name__}: {first_line(error)}"
            jobs.write(run_dir, overrides, jobs.FAILED, " ".join(reason.split()))
        raise
    if is_main_process():
        jobs.write(run_dir, overrides, jobs.FINISHED)
    return result


class _Failed(Exception):  # noqa: N818
    """A job of a sweep has failed, which is logged; the other jobs run."""


def _end_of_sweep(folder: Path, failed: bool) -> None:
    """Write the table and the page of a sweep; exit with code 1 if a job failed.

    Args:
        failed: whether a job failed in this process; a job whose run_dir is in use has no record.
    """
    from caravan.report.contents import read, show_table
    from caravan.report.page import show as show_page

    if not is_main_process():
        return
    contents = read([folder])
    show_table(contents)
    show_page(contents)
    if failed or (contents.sweep and contents.sweep.failed):
        raise SystemExit(FAILED)


def _sentence(error: BaseException) -> str | None:
    """The message of a user error, including errors of Hydra; None for any other exception."""
    if isinstance(error, InterpolationResolutionError):
        return f"{error.full_key or 'a setting'} has no value: {first_line(error)}"
    if isinstance(error, HydraException) and not isinstance(error, InstantiationException):
        return sources.message(error)
    while isinstance(error, InstantiationException):
        text, _, key = str(error).partition("full_key: ")
        if error.__cause__ is None:  # Hydra rejects the target, such as subprocess.run
            return f"{key.strip()}._target_: {' '.join(text.split())}"
        if text.startswith(LIBRARIES) and sentence(error.__cause__) is None:
            return f"{key.strip()}: {first_line(error.__cause__)}"
        error = error.__cause__
    return sentence(error)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


def prepare_process() -> None:
    """Set signals, limits and caches of this process, before torch is loaded."""
    # OpenMP reads this when torch is loaded. By default a waiting thread spins on its core for
    # milliseconds; with more processes than cores, this blocks the threads that it waits for.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Let Hydra raise exceptions unchanged; the entry point handles them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # With a full disk, logging would print a traceback for each line.
    logging.raiseExceptions = False
    threading.excepthook = _thread_failed
    # Lightning would exit with code 0 on SIGTERM; it does not replace an existing handler.
    signal.signal(signal.SIGTERM, _terminate)
    # oneDNN and PyTorch cache 1,024 compiled CPU kernels each by default. A kernel is compiled for
    # one shape and takes half a megabyte, and texts have many shapes.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "256")
    # The usual limit is 1,024, and each memory-mapped shard of embeddings is an open file.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS reports infinity, which it rejects
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # By default glibc returns freed blocks to the system, and every step faults their pages in
    # again: a training step of a small model took 1.2 times as long on two cores (median of six
    # alternating pairs). The cost is that the process keeps memory after freeing it.
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold = -3, -1  # of malloc.h
        libc.mallopt(mmap_threshold, 1 << 25)  # the maximum in glibc
        libc.mallopt(trim_threshold, 1 << 30)


def _thread_failed(args: Any) -> None:
    """Print the traceback of a thread, unless the cause is a full disk.

    TensorBoard's writer raises the exception again in the main thread, which reports it.
    """
    if args.exc_value is None or disk_error(args.exc_value) is None:
        threading.__excepthook__(args)


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _interrupted(root: Any, error: KeyboardInterrupt) -> None:
    command = "the same command"
    if any(key.name == "resume" for key in fields(root)):
        command += " with resume=true"
    code = TERMINATED if isinstance(error, _Terminated) else INTERRUPTED
    _leave(f"interrupted; {command} continues", code)


def _leave(message: str, code: int) -> None:
    if is_main_process():
        sys.stderr.write(f"{printable(message)}\n")
    raise SystemExit(code) from None
