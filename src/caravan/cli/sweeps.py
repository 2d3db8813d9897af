"""Sweeps: check the jobs before the first one starts.

As many jobs are checked as bring each value of each key into one of them; each job is checked again
when it starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import ChoiceSweep, Override, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from caravan.cli import sources
from caravan.cli.signatures import locate
from caravan.distributed import world_size

if TYPE_CHECKING:
    from caravan.cli.compose import Composer

SWEEP_DIR = "hydra.sweep.dir="
MOST_JOBS = 24
"""Jobs that are checked before a sweep starts."""
MOST_VALUES = 10_000
"""Values of one key in a sweep."""


def folder_of(argv: list[str]) -> Path | None:
    """Where the jobs of a sweep have their folders; None if the arguments start no sweep.

    Args:
        argv: as `caravan.cli.compose.preflight` returns them.
    """
    given = [text.removeprefix(SWEEP_DIR) for text in argv if text.startswith(SWEEP_DIR)]
    return Path(given[-1].strip("'")) if given else None


class Sweep:
    """What a command line varies.

    Args:
        composer: of the config.
        overrides: of the command line.
    """

    def __init__(self, composer: Composer, overrides: list[str]) -> None:
        self.composer = composer
        given = self._parsed(overrides)
        self.varied = {text: one for text, one in given.items() if one.is_sweep_override()}
        self.fixed = {text: one for text, one in given.items() if text not in self.varied}
        self.single = [text for text in overrides if text not in self.varied]
        cfg, self.lines = composer.collect(self.single)
        self.multirun = cfg is not None and cfg.hydra.mode == RunMode.MULTIRUN
        params = {} if cfg is None else OmegaConf.select(cfg, "hydra.sweeper.params") or {}
        sweeper = None if cfg is None else OmegaConf.select(cfg, "hydra.sweeper._target_")
        self.takes_values = str(sweeper).endswith(".BasicSweeper")
        keys = {one.get_key_element() for one in given.values()}
        in_file = [f"{key}={value}" for key, value in params.items() if key not in keys]
        self.in_file = self._parsed(in_file)  # what a file varies, unless the command line sets it
        self.swept = {*map(str, params), *(one.get_key_element() for one in self.varied.values())}

    def without_multirun(self) -> list[str]:
        """The mistakes of a run; several values need -m."""
        lines = list(self.lines)
        for text, one in self.varied.items():
            key, given = one.get_key_element(), text.partition("=")[2]
            line = f"{text} (command line): several values; add -m to run them all"
            if one.value_type == ValueType.SIMPLE_CHOICE_SWEEP:
                line += f", or write {key}=[{given}] for a list, \"{key}='{given}'\" for a text"
            lines.append(line)
        if self.in_file and not self.varied:
            lines.append("sweep (command line): it names several jobs; add -m to run them")
        return lines

    def check(self) -> list[str]:
        """The mistakes of the jobs, until each value of each key was in one of them."""
        values, lines = {}, []
        for text, one in {**self.in_file, **self.varied}.items():
            try:
                if one.is_interval_sweep() and self.takes_values:
                    raise ValueError("the sweeper takes values; choose hydra/sweeper=optuna")
                found = _values(one)
                if len(found) > MOST_VALUES:
                    raise ValueError(f"these are more than {MOST_VALUES:,} jobs")
                if not found and one.is_discrete_sweep():
                    raise ValueError("no option matches")
                values[one.get_key_element()] = found
            except (ValueError, ArithmeticError, HydraException) as error:
                lines.append(f"{text} (command line): {error}")
        if lines:
            return lines
        first = {key: options[0] for key, options in values.items() if options}
        jobs = [first]
        for key, options in values.items():
            jobs += [{**first, key: option} for option in options[1:]]
        jobs = jobs[:MOST_JOBS]
        seen: dict[str, list[dict[str, str]]] = {}
        for job in jobs:
            given = [f"{key}={option}" for key, option in job.items()]
            cfg, mistakes = self.composer.collect([*self.single, *given])
            for line in [*mistakes, *([] if cfg is None else _of_launcher(cfg))]:
                seen.setdefault(line, []).append(job)
        for line, having in seen.items():
            names = ", ".join(f"{key}={option}" for key, option in having[0].items())
            lines.append(line if len(having) == len(jobs) else f"{line} [in the job {names}]")
        return lines

    def arguments(self, argv: list[str]) -> list[str]:
        """The arguments to start the sweep with, once its jobs are checked.

        The values in its file are among them, since Hydra would resolve references in these before
        there is a job. A folder is named by what differs between jobs.
        """
        varied, quoted = {**self.in_file, **self.varied}, self.composer.quoted
        now = {**quoted, **{text: self._as_typed(text, one) for text, one in varied.items()}}
        fixed = [one.key_or_group for one in self.fixed.values()]
        keys = dict.fromkeys(["run_dir", "name", *fixed])
        left_out = [key for key in keys if key not in self.swept and not key.startswith("hydra")]
        cfg = self.composer.compose([quoted.get(text, text) for text in self.single])
        return [
            *(now.get(text, text) for text in [*argv, *self.in_file]),
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(left_out)}]",
            f"{SWEEP_DIR}'{cfg.hydra.sweep.dir}'",
        ]

    def _as_typed(self, text: str, override: Override) -> str:
        """A sweep over texts, with quotes where Hydra would read numbers."""
        if not override.is_choice_sweep():
            return text
        key, given = override.get_key_element(), _values(override)
        quoted = [self.composer.quoted.get(f"{key}={one}", f"{key}={one}") for one in given]
        now = [one.partition("=")[2] for one in quoted]
        return text if now == given else f"{key}={','.join(now)}"

    def _parsed(self, overrides: list[str]) -> dict[str, Override]:
        parsed = {}
        for text in overrides:
            try:
                parsed[text] = sources.parse(text, self.composer.parser)
            except HydraException:
                continue  # reported with the other mistakes
        return parsed


def _values(override: Override) -> list[str]:
    """The values of one key, as typed where possible: Hydra would read 1_0 as the number 10.

    None, if a sweeper has to choose them (an interval).
    """
    text = override.get_value_string().strip()
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        return []
    given, inside = override.value(), re.fullmatch(r"choice\((.*)\)|(.*)", text)
    if isinstance(given, ChoiceSweep) and not given.shuffle and inside:
        typed = [part.strip() for part in (inside[1] or inside[2] or "").split(",")]
        plain = not any(isinstance(one, list | dict) for one in given.list)
        if plain and len(typed) == len(given.list):
            return typed
    return list(islice(override.sweep_string_iterator(), MOST_VALUES + 1))


def _of_launcher(cfg: DictConfig) -> Iterator[str]:
    """A launcher may need a package; a sweep in one process has one device."""
    target = str(OmegaConf.select(cfg, "hydra.launcher._target_"))
    try:
        locate(target)
    except LookupError as error:
        yield f"hydra/launcher: {error}; install its plugin of Hydra, or leave it out"
    if not target.endswith(".BasicLauncher"):
        return
    instead = "start the jobs one by one, or choose hydra/launcher=slurm"
    if world_size() > 1:
        yield f"-m: a sweep is one process, and {world_size()} were started together; {instead}"
    for name in ("devices", "num_nodes"):
        number = OmegaConf.select(cfg, f"trainer.{name}")
        one_device = isinstance(number, ListConfig) and len(number) == 1
        if number not in (None, 1, "1") and not one_device:
            yield f"trainer.{name}: the jobs of a sweep run in one process; {instead}"
