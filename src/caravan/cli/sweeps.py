"""Sweeps: check all jobs before the first one starts.

As many jobs are checked as bring each value of each key into one of them; each job is checked again
when it starts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from caravan.cli.overrides import listed
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
        self.composer, self.overrides = composer, overrides
        parsed = self._parsed(overrides)
        self.varied = [one for one in parsed if one.is_sweep_override()]
        self.fixed = [one for one in parsed if not one.is_sweep_override()]
        varied = {one.input_line for one in self.varied}
        self.single = [text for text in overrides if text not in varied]
        cfg, self.lines = composer.collect(self.single)
        self.in_file: list[str] = []  # what `hydra.sweeper.params` of a file varies
        self.multirun, self.sweeper = False, ""
        if cfg is not None:
            params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
            self.in_file = [f"{key}={value}" for key, value in params.items()]
            self.multirun = cfg.hydra.mode == RunMode.MULTIRUN
            self.sweeper = str(OmegaConf.select(cfg, "hydra.sweeper._target_"))

    def without_multirun(self) -> list[str]:
        """The mistakes of a run; several values need -m."""
        lines = list(self.lines)
        for one in self.varied:
            key, given = one.get_key_element(), str(one.input_line).partition("=")[2]
            line = f"{one.input_line} (command line): several values; add -m to run them all"
            if one.value_type == ValueType.SIMPLE_CHOICE_SWEEP:
                line += f", or write {key}=[{given}] for a list, \"{key}='{given}'\" for a text"
            lines.append(line)
        if self.in_file and not self.varied:
            lines.append("sweep (command line): it names several jobs; add -m to run them")
        return lines

    def check(self) -> list[str]:
        """The mistakes of the jobs, until each value of each key was in one of them."""
        varied = self._parsed(self.in_file) + self.varied
        lines = [line for one in varied for line in self._impossible(one)]
        if lines:
            return lines
        values = {one.get_key_element(): self._values(one) for one in varied}
        for one in self.fixed:  # the command line overrides the file of a sweep
            if one.get_key_element() in values:
                values[one.get_key_element()] = self._values(one)
        first = {key: options[0] for key, options in values.items() if options}
        jobs = [first]
        for key, options in values.items():
            jobs += [{**first, key: option} for option in options[1:]]
        jobs = jobs[:MOST_JOBS]
        seen: dict[str, list[dict[str, str]]] = {}
        for job in jobs:
            given = [f"{key}={option}" for key, option in job.items()]
            cfg, found = self.composer.collect([*self.single, *given])
            for line in [*found, *([] if cfg is None else _of_launcher(cfg))]:
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
        given = {one.get_key_element() for one in (*self.fixed, *self.varied)}
        params = [text for text in self.in_file if text.partition("=")[0] not in given]
        keys = [one.key_or_group for one in self.fixed]
        swept = {text.partition("=")[0] for text in self.in_file}
        swept |= {one.get_key_element() for one in self.varied}
        left_out = ["run_dir", "name", *(key for key in keys if not key.startswith("hydra"))]
        left_out = [key for key in dict.fromkeys(left_out) if key not in swept]
        quoted = self.composer.quoted
        cfg = self.composer.compose(
            [quoted.get(str(one.input_line), str(one.input_line)) for one in self.fixed]
        )
        return [
            *(self._for_hydra(text) if text in self.overrides else text for text in argv),
            *map(self._for_hydra, params),
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(left_out)}]",
            f"{SWEEP_DIR}'{cfg.hydra.sweep.dir}'",
        ]

    def _parsed(self, overrides: list[str]) -> list[Override]:
        parsed = []
        for text in overrides:
            try:
                parsed.append(self.composer.overrides.parse(text))
            except HydraException:
                continue  # reported with the other mistakes
        return parsed

    def _for_hydra(self, text: str) -> str:
        """An override as Hydra gets it: texts in quotes, options in place of a pattern."""
        quoted = self.composer.quoted
        override = self.composer.overrides.parse(text)
        if not override.is_choice_sweep():
            return quoted.get(text, text)
        key, given = override.get_key_element(), self._values(override)
        now = [quoted.get(f"{key}={one}", f"{key}={one}").partition("=")[2] for one in given]
        same = now == given and not self.composer.overrides.globbed(override)
        return text if same else f"{key}={','.join(now)}"

    def _impossible(self, override: Override) -> Iterator[str]:
        """Values that no job can have."""
        text, value = f"{override.input_line} (command line)", override.value()
        if override.is_interval_sweep() and self.sweeper.endswith(".BasicSweeper"):
            yield (
                f"{text}: Hydra's own sweeper takes values, not intervals; write"
                f" {override.get_key_element()}=<value>,<value>, or choose a sweeper that searches:"
                " hydra/sweeper=optuna, as in sweep=search"
            )
        elif override.value_type == ValueType.GLOB_CHOICE_SWEEP:
            if not self.composer.overrides.globbed(override):
                options = self.composer.overrides.options(override.key_or_group)
                yield f"{text}: no option matches; {listed(options)}"
        elif isinstance(value, RangeSweep):
            start, stop, step = float(value.start or 0), float(value.stop or 0), float(value.step)
            if not step or not math.isfinite(start + stop + step):
                yield f"{text}: a range has a finite start and stop, and a step other than 0"
            elif abs((stop - start) / step) > MOST_VALUES:
                yield f"{text}: these are more than {MOST_VALUES:,} jobs"

    def _values(self, override: Override) -> list[str]:
        """The values of one key, as typed where possible: Hydra would read 1_0 as the number 10.

        None, if a sweeper has to choose them (an interval).
        """
        text = override.get_value_string().strip()
        if not override.is_sweep_override():
            return [
                text
                if isinstance(override.value(), int | float)
                else override.get_value_element_as_str()
            ]
        if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
            return self.composer.overrides.globbed(override)
        if not override.is_discrete_sweep():
            return []
        given, inside = override.value(), re.fullmatch(r"choice\((.*)\)|(.*)", text)
        if isinstance(given, ChoiceSweep) and not given.shuffle and inside:
            typed = [part.strip() for part in (inside[1] or inside[2] or "").split(",")]
            plain = not any(isinstance(one, list | dict) for one in given.list)
            if plain and len(typed) == len(given.list):
                return typed
        return list(override.sweep_string_iterator())


def _of_launcher(cfg: DictConfig) -> Iterator[str]:
    """A launcher may need a package; a sweep in one process has one device."""
    target = str(OmegaConf.select(cfg, "hydra.launcher._target_"))
    package = target.removeprefix("hydra_plugins.").partition(".")[0]
    try:
        there = find_spec(target.rpartition(".")[0]) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        yield f"hydra/launcher: {package} is not installed; pip install {package.replace('_', '-')}"
    if not target.endswith(".BasicLauncher"):
        return
    instead = "start the jobs one by one, or choose hydra/launcher=slurm"
    if world_size() > 1:
        yield f"-m: a sweep is one process, and {world_size()} were started together; {instead}"
    for name in ("devices", "num_nodes"):
        number = OmegaConf.select(cfg, f"trainer.{name}")
        if number not in (None, 1, "1") and not (
            isinstance(number, ListConfig) and len(number) == 1
        ):
            yield (
                f"trainer.{name}: the jobs of a sweep run in one process, and each further rank"
                f" would start the sweep again; {instead}"
            )
