"""Checks before Hydra starts: the config of a run, or those of a sweep's jobs.

    argv = preflight(sys.argv[1:], Path("conf"), "train", Train)

They import nothing heavy and report all mistakes together.
"""

from __future__ import annotations

import importlib.util
import math
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import ChoiceSweep, Override, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from caravan.cli.compose import FAILURES, Composer, report
from caravan.cli.overrides import listed
from caravan.distributed import world_size
from caravan.errors import InputError

SWEEP_DIR = "hydra.sweep.dir="
MOST_JOBS = 24
"""Jobs of a sweep that are checked before it starts; each is checked again when it starts."""
MOST_VALUES = 10_000
"""Values of one key in a sweep."""


def preflight(
    argv: list[str], conf: Path, name: str, root: type, program: str | None = None
) -> list[str]:
    """Check what the arguments ask for, without importing anything heavy.

    Args:
        argv: the command line, without the program.
        conf, name, root: the folder of configs, the primary one, its root dataclass.
        program: what messages about the arguments call it; None: its file.

    Returns:
        The arguments to run Hydra with: texts that Hydra would read as numbers are in quotes. Of a
        sweep, they name the jobs' folders by what differs.
        What a sweep file varies is among them: Hydra itself would resolve references in it, such
        as a folder of the job's seed, before there is a job.

    Raises:
        InputError: with a line for each mistake.
    """
    parser = get_args_parser()
    parser.prog = program or parser.prog
    args = parser.parse_args(argv)
    if any((args.help, args.hydra_help, args.shell_completion, args.experimental_rerun)):
        return argv
    with _composer(args, conf, name, root) as composer:
        if args.cfg or args.info:
            return _shows(composer, args, argv)
        lines, swept, params = _check_jobs(composer, args)
        if lines:
            raise InputError(report(lines))
        replaced = composer.quoted
        if swept is None:
            return [replaced.get(text, text) for text in argv]
        argv = [_replaced(composer, text) if text in args.overrides else text for text in argv]
        params = [_replaced(composer, text) for text in params]
        fixed = [one for one in _parsed(composer, args.overrides) if not _sweeps(one)]
        texts = [str(one.input_line) for one in fixed]
        whole = composer.compose([replaced.get(text, text) for text in texts])
        # One folder for the sweep, whatever its jobs are called, so that its end finds them all.
        folder = f"{SWEEP_DIR}'{whole.hydra.sweep.dir}'"
    keys = [one.key_or_group for one in fixed if not one.key_or_group.startswith("hydra")]
    left_out = [key for key in ("run_dir", "name", *keys) if key not in swept]
    return [
        *argv,
        *params,
        f"hydra.job.config.override_dirname.exclude_keys={_listed(left_out)}",
        folder,
    ]


def _shows(composer: Composer, args: Namespace, argv: list[str]) -> list[str]:
    """--cfg and --info show a config that is not complete, but not one that cannot be composed."""
    lines = composer.collect(args.overrides)[1]
    try:
        composer.compose(args.overrides)
    except FAILURES:
        if lines:
            raise InputError(report(lines)) from None
    return [composer.quoted.get(text, text) for text in argv]


def _replaced(composer: Composer, text: str) -> str:
    """An override of a sweep as Hydra gets it: texts in quotes, options in place of a pattern."""
    try:
        override = composer.vet.parse(text)
    except HydraException:
        return text  # a flag's value
    if not override.is_choice_sweep():
        return composer.quoted.get(text, text)
    key, given = override.get_key_element(), _values(composer, override)
    now = [composer.quoted.get(f"{key}={one}", f"{key}={one}").partition("=")[2] for one in given]
    return text if now == given and not composer.vet.globbed(override) else f"{key}={','.join(now)}"


def sweep_folder(argv: list[str]) -> Path | None:
    """Where the jobs of a sweep have their folders; None if the arguments start no sweep.

    Args:
        argv: as `preflight` returns them.
    """
    given = [text.removeprefix(SWEEP_DIR) for text in argv if text.startswith(SWEEP_DIR)]
    return Path(given[-1].strip("'")) if given else None


def _composer(args: Namespace, conf: Path, name: str, root: type) -> Composer:
    more = Path(args.config_dir) if args.config_dir else None
    if more is not None and not more.is_dir():
        raise InputError(f"--config-dir {more}: there is no such folder")
    folder = conf if args.config_path is None else Path(conf.parent, args.config_path)
    return Composer(folder, args.config_name or name, root, more, job=name)


def _listed(keys: list[str]) -> str:
    return f"[{','.join(dict.fromkeys(keys))}]"


def _parsed(composer: Composer, overrides: list[str]) -> list[Override]:
    """The overrides that can be parsed."""
    parsed = []
    for text in overrides:
        try:
            parsed.append(composer.vet.parse(text))
        except HydraException:
            continue  # reported when the jobs are checked
    return parsed


def _sweeps(override: Override) -> bool:
    return bool(override.is_sweep_override())


def _check_jobs(
    composer: Composer, args: Namespace
) -> tuple[list[str], list[str] | None, list[str]]:
    """Check the run, or enough jobs of a sweep for each value to be looked at.

    Returns:
        The mistakes, the keys that a sweep varies (None: it is no sweep), and what its file gives
        for those that the command line leaves to it.
    """
    swept = [one for one in _parsed(composer, args.overrides) if _sweeps(one)]
    single = [text for text in args.overrides if text not in {one.input_line for one in swept}]
    cfg, lines = composer.collect(single) if not swept else (None, [])
    params, multirun, sweeper = _sweep_file(composer, single, cfg)
    multirun = multirun or args.multirun
    if not multirun:
        for one in swept:
            given = str(one.input_line).partition("=")[2]
            line = f"{one.input_line} (command line): several values; add -m to run them all"
            if one.value_type == ValueType.SIMPLE_CHOICE_SWEEP:
                key = one.get_key_element()
                line += f", or write {key}=[{given}] for a list, \"{key}='{given}'\" for a text"
            lines.append(line)
        if params and not swept:
            lines.append("sweep (command line): it names several jobs; add -m to run them")
        if swept:
            lines = [*composer.collect(single)[1], *lines]
        return lines, None, []
    varied = _parsed(composer, params) + swept
    lines = [line for one in varied for line in _cannot_be_run(composer, one, sweeper)]
    if lines:
        return lines, None, []
    values = {one.get_key_element(): _values(composer, one) for one in varied}
    named = {one.get_key_element() for one in swept}
    for one in _parsed(composer, single):  # Hydra puts the command line before the sweep's file
        named.add(one.get_key_element())
        if one.get_key_element() in values:
            values[one.get_key_element()] = _values(composer, one)
    of_file = [text for text in params if text.partition("=")[0] not in named]
    return _check_each(composer, single, values), list(values), of_file


def _launcher_is_there(cfg: DictConfig) -> Iterator[str]:
    """What starts a sweep's jobs may come with a package of its own."""
    target = str(OmegaConf.select(cfg, "hydra.launcher._target_"))
    try:
        there = importlib.util.find_spec(target.rpartition(".")[0] or target) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        name = target.removeprefix("hydra_plugins.").partition(".")[0]
        package = name.replace("_", "-")
        yield f"hydra/launcher: {name} is not installed; pip install {package}"


def _several_devices(cfg: DictConfig) -> Iterator[str]:
    """A sweep in one process has one device: other ranks would be started by the same command."""
    basic = str(OmegaConf.select(cfg, "hydra.launcher._target_")).endswith(".BasicLauncher")
    if basic and world_size() > 1:
        yield (
            f"-m: {world_size()} processes were started together, and a sweep is one process; start"
            " its jobs one by one, or choose hydra/launcher=slurm"
        )
    ranks = [OmegaConf.select(cfg, f"trainer.{name}") for name in ("devices", "num_nodes")]
    one = [number in (None, 1, "1") or len(_items(number)) == 1 for number in ranks]
    if basic and not all(one):
        yield (
            "trainer.devices, trainer.num_nodes: a sweep's jobs run in one process, and Lightning"
            " starts the other ranks by the same command, each of which would sweep again; give"
            " them one device, start the jobs one by one, or choose"
            " hydra/launcher=slurm"
        )


def _items(number: Any) -> list[Any]:
    return list(number) if isinstance(number, ListConfig) else []


def _sweep_file(
    composer: Composer, overrides: list[str], cfg: DictConfig | None
) -> tuple[list[str], bool, str]:
    """What `hydra.sweeper.params` of a sweep file varies, whether it asks for a sweep, and the
    sweeper."""
    try:
        cfg = composer.compose(overrides) if cfg is None else cfg
    except FAILURES:
        return [], False, ""  # reported when the jobs are checked
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    asked = cfg.hydra.mode == RunMode.MULTIRUN
    sweeper = str(OmegaConf.select(cfg, "hydra.sweeper._target_"))
    return [f"{key}={value}" for key, value in params.items()], asked, sweeper


def _cannot_be_run(composer: Composer, override: Override, sweeper: str) -> Iterator[str]:
    """Values that no job can be made of."""
    text = f"{override.input_line} (command line)"
    if override.is_interval_sweep() and sweeper.endswith(".BasicSweeper"):
        yield (
            f"{text}: Hydra's own sweeper tries single values, not intervals; write"
            f" {override.get_key_element()}=<value>,<value>, or choose a sweeper that searches:"
            " hydra/sweeper=optuna, as in sweep=search"
        )
    elif override.value_type == ValueType.GLOB_CHOICE_SWEEP and not composer.vet.globbed(override):
        yield f"{text}: no option matches; {listed(composer.vet.options(override.key_or_group))}"
    elif override.is_range_sweep():
        given: Any = override.value()
        if not given.step or not math.isfinite(given.start + given.stop + given.step):
            yield f"{text}: a range has a finite start and stop, and a step other than 0"
        elif abs((given.stop - given.start) / given.step) > MOST_VALUES:
            yield f"{text}: these are more than {MOST_VALUES:,} jobs"


def _values(composer: Composer, override: Override) -> list[str]:
    """The values that one key takes; none if a sweeper has to choose them (an interval).

    They stay as typed where possible: a text is not the number that Hydra parses.
    """
    text = override.get_value_string() if "=" in str(override.input_line) else ""
    if not _sweeps(override):
        return [
            text
            if isinstance(override.value(), int | float)
            else override.get_value_element_as_str()
        ]
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return composer.vet.globbed(override)
    if not override.is_discrete_sweep():
        return []
    given, inside = override.value(), re.fullmatch(r"choice\((.*)\)|(.*)", text.strip())
    if isinstance(given, ChoiceSweep) and not given.shuffle and inside:
        typed = [part.strip() for part in (inside[1] or inside[2] or "").split(",")]
        plain = not any(isinstance(one, list | dict) for one in given.list)
        if plain and len(typed) == len(given.list):
            return typed
    return list(override.sweep_string_iterator())


def _check_each(composer: Composer, fixed: list[str], values: dict[str, list[str]]) -> list[str]:
    """Check jobs until each value of each key was in one: their sum, not their product."""
    first = {key: options[0] for key, options in values.items() if options}
    jobs = [first] + [
        {**first, key: option} for key, options in values.items() for option in options[1:]
    ]
    seen: dict[str, list[int]] = {}
    jobs = jobs[:MOST_JOBS]
    for number, job in enumerate(jobs):
        overrides = [*fixed, *(f"{key}={option}" for key, option in job.items())]
        cfg, lines = composer.collect(overrides)
        if cfg is not None:
            lines = [*lines, *_launcher_is_there(cfg), *_several_devices(cfg)]
        for line in lines:
            seen.setdefault(line, []).append(number)
    told = []
    for line, numbers in seen.items():
        job = jobs[numbers[0]]
        where = ", ".join(f"{key}={option}" for key, option in job.items())
        told.append(line if len(numbers) == len(jobs) else f"{line} [in the job {where}]")
    return told
