"""Compose a config from `conf/` and the command line, and check it before Hydra starts the job.

Hydra stops at the first mistake. Therefore overrides are composed one by one where they do not
compose together, the schema leaves keys untyped, and `caravan.cli.check` reports all mistakes of
what composes.

    argv = preflight(sys.argv[1:], CONF, "train")
    cfg = compose(CONF, "train", ["experiment=quickstart/retriever"])
"""

from __future__ import annotations

import functools
import os
import re
from contextlib import AbstractContextManager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from caravan.cli import schema, sources, sweeps
from caravan.cli.check import Config, Mistake
from caravan.cli.signatures import did_you_mean
from caravan.cli.sources import TYPED, key_of, origin, shown, top
from caravan.errors import InputError

CONF = Path(__file__).resolve().parents[3] / "conf"
"""The config folder of the repository."""
WHOLE = {"experiment", "sweep"}
"""Groups whose options may set anything; null unless chosen."""
FAILURES = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError),
    *(TypeError, AttributeError, AssertionError, RecursionError),
)
"""Exceptions raised while composing a config with a mistake in a file or override."""


def compose(conf: Path, name: str, overrides: list[str], more: Path | None = None) -> DictConfig:
    """Compose and check the config of a command line.

    Args:
        conf: the config folder; more: an additional one, as `--config-dir`.
        name: "train" or "evaluate".
        overrides: as on the command line, such as "experiment=quickstart/retriever".

    Raises:
        InputError: With one line per mistake.
    """
    with Composer(conf, name, more) as composer:
        cfg, lines = composer.collect(overrides)
    refuse(lines)
    assert cfg is not None
    return without_hydra(cfg)


def check(cfg: DictConfig, root: type) -> list[Mistake]:
    """All mistakes in a composed config: invalid keys and values, then rules across objects."""
    unread: dict[str, str] = {}
    if root is schema.Train:
        from caravan.cli import train  # imports Lightning

        cfg, unread = train.completed(cfg)
        rules = train.RULES
    else:
        from caravan.cli import evaluate

        rules = evaluate.RULES
    config = Config(cfg, root)
    for key, text in unread.items():
        config.add(key, text)
    for rule in rules:
        rule(config)
    return config.mistakes


def refuse(lines: list[str]) -> None:
    """Raise one error for all mistakes.

    Raises:
        InputError: With one line per mistake.
    """
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        head = f"{count} in the config; nothing was started:"
        raise InputError("config-mistakes", "\n".join([head, *(f"  {line}" for line in lines)]))


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The config without Hydra's node, as passed to the job."""
    keys: Any = [key for key in cfg if key != "hydra"]  # keys of a file may be numbers
    return OmegaConf.masked_copy(cfg, keys)


def preflight(argv: list[str], conf: Path, name: str) -> tuple[list[str], Path | None]:
    """Check the config of a run, or the configs of the jobs of a sweep.

    Args:
        argv: the command line without the program; conf, name: as for `compose`.

    Returns:
        The arguments for Hydra (strings that it would parse as numbers are quoted, a sweep has the
        values of its file), and the folder of a sweep. Raises an InputError as `refuse` does.
    """
    args = sources.flags(argv)
    more = Path(args.config_dir) if args.config_dir else None
    if more is not None and not more.is_dir():
        raise InputError("folder-not-found", f"--config-dir {more}: there is no such folder")
    folder = conf if args.config_path is None else Path(conf.parent, args.config_path)
    with Composer(folder, args.config_name or name, more, job=name) as composer:
        if args.cfg or args.info:  # Hydra shows an incomplete config, or why it does not compose
            composer.collect(args.overrides)
            return composer.as_read(argv), None
        sweep = sweeps.Sweep(composer, args.overrides)
        if args.multirun or (sweep.cfg and sweep.cfg.hydra.mode == RunMode.MULTIRUN):
            refuse(sweep.mistakes())
            return sweep.arguments(argv)
        same = sweep.single == args.overrides
        lines = sweep.lines if same else composer.collect(args.overrides)[1]
        if sweep.in_file:
            lines.append("sweep (command line): it names several jobs; add -m to run them")
        refuse(lines)
        return composer.as_read(argv), None


class Composer(AbstractContextManager["Composer"]):
    """Composes a primary config, any number of times; restores Hydra's state on exit.

    Args:
        conf, name, more: as for `compose`; `more` is searched after `conf`.
        job: Hydra's job name and the key of the root; None uses `name`.
    """

    def __init__(
        self, conf: Path, name: str, more: Path | None = None, job: str | None = None
    ) -> None:
        self.name, self.root = name, schema.ROOTS[job or name]
        self.known = {*WHOLE, *(field.name for field in fields(self.root))}
        self.folders = [folder.absolute() for folder in (conf, more) if folder is not None]
        self._before = HydraConfig.instance().cfg
        schema.register()
        Plugins.instance().register(sources.FurtherFolder)
        sources.FurtherFolder.folder = more.absolute() if more else None
        self._hydra = hydra.initialize_config_dir(
            str(self.folders[0]), job_name=job or name, version_base="1.3"
        )
        sources.FurtherFolder.folder = None
        self.loader = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)
        self._options = functools.cache(lambda of: self.loader.get_group_options(of, None, name))
        self._quoted: dict[str, str] = {}  # overrides whose text Hydra would read as a number

    def __exit__(self, *error: object) -> None:
        self._hydra.__exit__(None, None, None)
        HydraConfig.instance().cfg = self._before

    def compose(self, overrides: list[str]) -> DictConfig:
        """Compose the config of one job, with Hydra's node."""
        cfg = hydra.compose(self.name, overrides, return_hydra_config=True)
        with open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.output_dir = os.getcwd()
        HydraConfig.instance().set_config(cfg)
        return cfg

    def as_read(self, overrides: list[str]) -> list[str]:
        """Overrides with the quotes that `collect` found necessary to keep a text as typed."""
        return [self._quoted.get(text, text) for text in overrides]

    def collect(self, overrides: list[str]) -> tuple[DictConfig | None, list[str]]:
        """Compose and check; returns the config with Hydra's node and one line per mistake.

        The config is None if an `experiment` or `sweep` is invalid.

        Raises:
            InputError: If conf/ itself cannot be composed.
        """
        problems = {text: self._problem(text) for text in overrides}
        cfg, kept, failed = self._compose_what_works([one for one in problems if not problems[one]])
        problems |= failed
        lines = [f"{text} (command line): {why}" for text, why in problems.items() if why]
        lost = {top(text) for text, why in problems.items() if why} - {top(text) for text in kept}
        if lost & WHOLE:
            return None, lines  # further mistakes would be those of another config
        found = check(without_hydra(cfg), self.root)
        # Hydra parses texts as numbers where it can: 2024_11_29 is 20241129, 1e3 is 1000.0.
        numbers = {one.key for one in found if one.kind == "unquoted"}
        texts = [one for one in kept if key_of(one) in numbers and one not in self._quoted]
        if texts:
            self._quoted |= {text: sources.quoted(text) for text in texts}
            return self.collect(overrides)
        groups = [text for text in kept if text[0] != "~" and self._is_group(text)]
        null = [text for text in groups if cfg.get(key_of(text), text) is None]
        origins = self._origins(kept) if found or null else {}  # it reads all files again
        lines += [
            f"{one.key} ({origin(one.key, origins)}): {one.text}"
            for one in found
            if top(one.key) not in lost
        ]
        if cfg.hydra.job.chdir is True:
            text = "paths are relative to the working directory of the command; remove it"
            lines.append(f"hydra.job.chdir: {text}")
        for text in null:  # a choice without effect
            group, where = key_of(text), origin(key_of(text), origins)
            if f"/{group}/" not in where and where != TYPED:
                lines.append(f"{text} (command line): {where} sets {group} to null; remove it")
        return cfg, lines

    def _problem(self, text: str) -> str | None:
        """What is wrong with an override alone."""
        try:
            package = sources.parse(text, self.parser).package
        except HydraException as error:
            return sources.unreadable(text, error)
        known = key_of(text) in self.known and self._is_group(text)
        if known and text[0] == "+" and package is None:
            return f"write {text.lstrip('+')}, without +"
        return None

    def _is_group(self, text: str) -> bool:
        """Whether an override chooses an option of a group."""
        key = key_of(text)
        if "." in key and not any((folder / key).is_dir() for folder in self.folders):
            return False  # Hydra would read the primary config to find that out
        return key in WHOLE or bool(self._options(key))

    def _compose_what_works(
        self, overrides: list[str]
    ) -> tuple[DictConfig, list[str], dict[str, str | None]]:
        """Compose the valid overrides; returns the config, these, and why others are not."""
        with suppress(*FAILURES):
            return self.compose(list(map(self._added, overrides))), overrides, {}
        try:
            cfg = self.compose([])
        except FAILURES as error:
            refuse([self._reason(error)])
        kept: list[str] = []
        failed: dict[str, str | None] = {}
        for text in sorted(overrides, key=lambda one: not self._is_group(one)):
            try:
                cfg = self.compose(list(map(self._added, [*kept, text])))
                kept.append(text)
            except FAILURES as error:
                failed[text] = self._reason(error)
        return cfg, kept, failed

    def _added(self, text: str) -> str:
        """A setting with ++, so that an unknown key composes, and the check says what was meant."""
        if text[0] == "~" or top(text) == "hydra" or self._is_group(text):
            return text
        return f"++{self._quoted.get(text, text).lstrip('+')}"

    def _origins(self, overrides: list[str]) -> dict[str, str]:
        """Where each key of a config is set: the command line, or the last file, with its line."""
        files = []
        for default in self.loader.compute_defaults_list(
            self.name, overrides, RunMode.RUN
        ).defaults:
            package = (default.package or "").replace("_global_", "")
            named = [folder / f"{default.config_path}.yaml" for folder in self.folders]
            files += [(file, package) for file in named if file.is_file()][:1]
        groups = [text for text in overrides if self._is_group(text)]
        return sources.origins(files, groups, [one for one in overrides if one not in groups])

    def _reason(self, error: Exception) -> str:
        """Why overrides do not compose, in one line."""
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            wanted = error.missing_cfg_file
            group, _, name = wanted.rpartition("/")
            options = self._options(group)
            near = did_you_mean(name, options)
            hint = f"did you mean {group}={near}?" if near else f"there are {', '.join(options)}"
            return f"{self._selected_by(group, name)}there is no {wanted}; {hint}"
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            mark = error.problem_mark
            return f"{shown(Path(mark.name))}:{mark.line + 1}: not YAML: {error.problem}"
        if isinstance(error, RecursionError):
            return "it is nested too deeply, or its defaults include itself"
        if "--multirun" in str(error):
            return "several values; add -m to run them all, or put a list into brackets"
        return sources.message(error)

    def _selected_by(self, group: str, name: str) -> str:
        """`file:line: ` of the defaults that select an option of a group, or nothing."""
        choice = re.compile(rf"\b{re.escape(group)}\b.*:\s*{re.escape(name)}\b")
        for file in (file for folder in self.folders for file in folder.rglob("*.yaml")):
            for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), 1):
                if choice.search(line):
                    return f"{shown(file)}:{number}: "
        return ""
