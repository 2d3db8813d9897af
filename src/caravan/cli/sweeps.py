"""Sweeps: check the jobs before the first one starts.

As many jobs are checked as bring each value of each key into one of them; each job is checked again
when it starts.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from caravan.cli import sources
from caravan.cli.signatures import locate
from caravan.distributed import world_size

if TYPE_CHECKING:
    from caravan.cli.compose import Composer

MOST_JOBS = 24
"""Jobs that are checked before a sweep starts."""
MOST_VALUES = 10_000
"""Values of one key in a sweep."""
ONE_PROCESS = (".BasicLauncher", ".JoblibLauncher", ".RayLauncher")
"""Launchers that run each job in one process."""


class Sweep:
    """What the overrides of a command line vary, and the file that `sweep=` chooses.

    Attributes:
        cfg: the config without what is varied; None if it cannot be composed.
        in_file: what the file varies, as overrides, except for keys that the command line sets.
    """

    def __init__(self, composer: Composer, overrides: list[str]) -> None:
        self.composer = composer
        given = {text: one for text in overrides if (one := self._parsed(text))}
        self.varied = {text: one for text, one in given.items() if one.is_sweep_override()}
        self.single = [text for text in overrides if text not in self.varied]
        self.cfg, self.lines = composer.collect(self.single)
        keys = {one.get_key_element() for one in given.values()}
        params = {} if self.cfg is None else OmegaConf.select(self.cfg, "hydra.sweeper.params")
        self.in_file = [
            f"{key}={value}" for key, value in (params or {}).items() if key not in keys
        ]
        self.varied |= {text: one for text in self.in_file if (one := self._parsed(text))}

    def _parsed(self, text: str) -> Override | None:
        try:
            return sources.parse(text, self.composer.parser)
        except HydraException:
            return None  # reported with the other mistakes

    def mistakes(self) -> list[str]:
        """The mistakes of the jobs, until each value of each key was in one of them."""
        if self.cfg is None:
            return self.lines
        values, lines = {}, []
        for text, one in self.varied.items():
            try:
                values[one.get_key_element()] = found = _values(one)
                if one.is_discrete_sweep() and not 0 < len(found) <= MOST_VALUES:
                    raise ValueError(f"it has no value, or more than {MOST_VALUES:,}")
            except (ValueError, ArithmeticError, HydraException) as error:
                lines.append(f"{text} (command line): {error}")
        if lines:
            return lines
        first = {key: options[0] for key, options in values.items() if options}
        others = [{**first, key: one} for key, found in values.items() for one in found[1:]]
        jobs = [first, *others][:MOST_JOBS]
        seen: dict[str, list[str]] = {}  # the jobs that have a mistake
        for job in jobs:
            given = [f"{key}={value}" for key, value in job.items()]
            cfg, found = self.composer.collect([*self.single, *given])
            for line in [*found, *([] if cfg is None else _of_launcher(cfg))]:
                seen.setdefault(line, []).append(", ".join(given))
        return [
            line if len(names) == len(jobs) else f"{line} [in the job {names[0]}]"
            for line, names in seen.items()
        ]

    def arguments(self, argv: list[str]) -> tuple[list[str], Path]:
        """The arguments to start the sweep with, once its jobs are checked, and its folder.

        The values in its file are among them, since Hydra would resolve references in these before
        there is a job. A folder of a job is named by what differs between jobs.
        """
        assert self.cfg is not None
        now = dict(zip(self.single, self.composer.as_read(self.single), strict=True))
        swept = set()
        for text, one in self.varied.items():
            key = one.get_key_element()
            swept.add(key)
            given = self.composer.as_read([f"{key}={value}" for value in _values(one)])
            values = ",".join(value.partition("=")[2] for value in given)
            now[text] = f"{key}={values}" if given else text
        keys = dict.fromkeys(["run_dir", "name", *map(sources.key_of, self.single)])
        left_out = [key for key in keys if key not in swept and not key.startswith("hydra")]
        folder = self.cfg.hydra.sweep.dir
        flags = [text for text in argv if text not in now]
        typed = [text for text in argv if text in now]  # together, also before a last -m
        return [
            *flags,
            *(now.get(text, text) for text in [*typed, *self.in_file]),
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(left_out)}]",
            f"hydra.sweep.dir='{folder}'",
        ], Path(folder)


def _values(override: Override) -> list[str]:
    """The values of one key, as typed where possible: Hydra would read 1_0 as the number 10.

    None, if a sweeper has to choose them (an interval).
    """
    text = override.get_value_string().strip()
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        return []
    typed = re.sub(r"^choice\((.*)\)$", r"\1", text)
    if override.is_choice_sweep() and typed and not set("[](){}'\"\\") & set(typed):
        return [part.strip() for part in typed.split(",")]
    return list(islice(override.sweep_string_iterator(), MOST_VALUES + 1))


def _of_launcher(cfg: DictConfig) -> list[str]:
    """A launcher may need a package; a job that is one process has one device."""
    target, lines = str(OmegaConf.select(cfg, "hydra.launcher._target_")), []
    try:
        locate(target)
    except LookupError as error:
        lines.append(f"hydra/launcher: {error}; install its plugin of Hydra, or leave it out")
    if not target.endswith(ONE_PROCESS):
        return lines
    instead = "start the jobs one by one, or choose hydra/launcher=slurm"
    if world_size() > 1:
        text = f"a sweep is one process, and {world_size()} were started together"
        lines.append(f"-m: {text}; {instead}")
    for key in ("trainer.devices", "trainer.num_nodes"):
        number = OmegaConf.select(cfg, key)
        one_device = isinstance(number, ListConfig) and len(number) == 1
        if number not in (None, 1, "1") and not one_device:
            lines.append(f"{key}: a job of this sweep runs in one process; {instead}")
    return lines
