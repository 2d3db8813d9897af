"""Compose a config from `conf/` and the command line, and check it before Hydra starts the job.

Hydra stops at the first mistake. Therefore overrides are composed one by one where they do not
compose together, keys have no types, and `caravan.cli.check` runs on what composes.

    argv = preflight(sys.argv[1:], Path("conf"), "train")
    cfg = compose(Path("conf"), "train", ["experiment=quickstart/retriever"])
"""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import AbstractContextManager
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
from caravan.cli.check import Checker, Mistake
from caravan.cli.signatures import did_you_mean
from caravan.cli.sources import KeyPath, dotted, key_of, shown
from caravan.errors import InputError

WHOLE = {"experiment", "sweep"}
"""Groups whose options may set anything; null unless chosen."""
ALIASES = {
    **dict.fromkeys(("model", "encoder", "base_model", "network"), ("backbone", "retriever")),
    **dict.fromkeys(("dataset", "datamodule", "corpus", "collection"), ("data",)),
    **dict.fromkeys(("optim", "optimiser"), ("optimizer",)),
    **dict.fromkeys(("criterion", "objective"), ("loss",)),
    **dict.fromkeys(("adapter", "lora"), ("peft",)),
    **dict.fromkeys(("exp", "recipe"), ("experiment",)),
}
"""Names of other projects for groups and settings."""
FAILURES = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError),
    *(TypeError, AttributeError, AssertionError, RecursionError),
)
"""Exceptions raised while composing a config with a mistake in a file or override."""


def compose(conf: Path, name: str, overrides: list[str], more: Path | None = None) -> DictConfig:
    """Compose and check the config of a command line.

    Args:
        conf: the config folder; more: an additional one, as `--config-dir`.
        name: "train", "evaluate" or "search".
        overrides: as on the command line, such as "experiment=quickstart/retriever".

    Raises:
        InputError: With one line per mistake.
    """
    with Composer(conf, name, more) as composer:
        cfg, lines = composer.collect(overrides)
    if lines or cfg is None:
        raise mistaken(lines)
    return without_hydra(cfg)


def check(cfg: DictConfig, root: type) -> list[Mistake]:
    """All mistakes in a composed config: invalid keys and values, then rules across objects."""
    if root is schema.Train:
        from caravan.cli import train  # imports Lightning

        cfg, rules = train.completed(cfg), train.RULES
    else:
        from caravan.cli import evaluate

        rules = evaluate.RULES
    config = Checker(cfg, root)
    found = config.mistakes()
    wrong = {mistake.path for mistake in found}
    for rule in rules:
        try:
            found += [mistake for mistake in rule(config) if mistake.path not in wrong]
        except OmegaConfBaseException:
            if not wrong:  # otherwise the rule failed on a value that is already reported
                raise
    return found


def refuse(cfg: DictConfig, root: type) -> None:
    """Raise an InputError with all mistakes in the config of a job."""
    if found := check(cfg, root):
        raise mistaken([f"{dotted(one.path)}: {one.text}" for one in found])


def mistaken(lines: list[str]) -> InputError:
    """One error for all mistakes."""
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    head = f"{count} in the config; nothing was started:"
    return InputError("config-mistakes", "\n".join([head, *(f"  {line}" for line in lines)]))


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The config without Hydra's node, as passed to the job."""
    keys: Any = [key for key in cfg if key != "hydra"]  # keys of a file may be numbers
    return OmegaConf.masked_copy(cfg, keys)


def preflight(argv: list[str], conf: Path, name: str) -> list[str]:
    """Check the config of a run, or the configs of the jobs of a sweep.

    Args:
        argv: the command line without the program; conf, name: as for `compose`.

    Returns:
        The arguments for Hydra: strings that Hydra would parse as numbers are quoted, and a sweep
        has the values of its file and one folder with a subfolder per job.

    Raises: InputError with one line per mistake.
    """
    parser = ArgumentParser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    for flags in ("-h --help", "--hydra-help", "--version", "-sc --shell-completion"):
        parser.add_argument(*flags.split(), dest="answer", action="store_true")
    for flags in ("-m --multirun", "-r --run", "--resolve"):
        parser.add_argument(*flags.split(), action="store_true")
    for flags in ("-cp --config-path", "-cn --config-name", "-cd --config-dir", "-c --cfg"):
        parser.add_argument(*flags.split())
    for flags in ("-p --package", "--experimental-rerun"):
        parser.add_argument(*flags.split())
    parser.add_argument("-i", "--info", nargs="?", const="all")
    args, unknown = parser.parse_known_args(argv)
    if unknown or args.answer or args.experimental_rerun:
        return argv  # handled by Hydra
    more = Path(args.config_dir) if args.config_dir else None
    if more is not None and not more.is_dir():
        raise InputError("folder-not-found", f"--config-dir {more}: there is no such folder")
    folder = conf if args.config_path is None else Path(conf.parent, args.config_path)
    with Composer(folder, args.config_name or name, more, job=name) as composer:
        if args.cfg or args.info:  # show an incomplete config if it can be composed
            lines = composer.collect(args.overrides)[1]
            try:
                composer.compose(args.overrides)
            except FAILURES:
                if lines:
                    raise mistaken(lines) from None
            return [composer.quoted.get(text, text) for text in argv]
        sweep = sweeps.Sweep(composer, args.overrides)
        several = args.multirun or sweep.multirun
        if lines := sweep.check() if several else sweep.without_multirun():
            raise mistaken(lines)
        return sweep.arguments(argv) if several else [composer.quoted.get(x, x) for x in argv]


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
        files = (file for folder in self.folders for file in folder.rglob("*.yaml"))
        if large := [shown(file) for file in files if sources.has_too_many_values(file)]:
            raise mistaken([f"{file}: too many values, with aliases expanded" for file in large])
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
        self._groups: dict[str, list[str]] = {}
        self.quoted: dict[str, str] = {}
        """Overrides as typed, and with quotes."""

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

    def collect(self, overrides: list[str]) -> tuple[DictConfig | None, list[str]]:
        """Compose and check; returns the config with Hydra's node and one line per mistake.

        The config is None if an `experiment` or `sweep` is invalid.

        Raises:
            InputError: If conf/ itself cannot be composed.
        """
        mistakes = {text: self._problem(text) for text in overrides}
        # An unknown key is added, so that the check of all keys suggests what was meant.
        valid = [
            text if text.startswith("~") or self._is_known(text) else f"++{text.lstrip('+')}"
            for text, mistake in mistakes.items()
            if mistake is None
        ]
        cfg, kept, failed = self._compose_what_works(valid)
        lines = [
            f"{text} (command line): {why}" for text, why in {**mistakes, **failed}.items() if why
        ]
        lost = {re.split(r"[./]", key_of(text))[0] for text in overrides} if lines else set()
        lost -= {re.split(r"[./]", key_of(text))[0] for text in kept}
        if lost & WHOLE:
            return None, lines  # further mistakes would be those of another config
        found = check(without_hydra(cfg), self.root)
        again = self._as_typed(kept, found)
        if again != kept:
            kept, cfg = again, self.compose(again)
            found = check(without_hydra(cfg), self.root)
        keys = [key_of(text) for text in kept if not self._is_group(text)]
        origin = sources.Origins(keys, list(self._files(kept)))
        for one in found:
            if not one.path or one.path[0] not in lost:
                lines.append(f"{dotted(one.path)} ({origin(one.path)}): {one.text}")
        return cfg, [
            *lines,
            *sources.split_over_folders(cfg),
            *self._without_effect(cfg, kept, origin),
        ]

    def _problem(self, text: str) -> str | None:
        """What is wrong with an override alone."""
        try:
            override = sources.parse(text, self.parser)
        except HydraException as error:
            return sources.unreadable(text, str(error))
        key = override.key_or_group
        if key in ALIASES and key not in self.known:
            group = next(name for name in ALIASES[key] if name in self.known)
            value, options = str(override.value()), self._options(group)
            starts = [name for name in options if name.startswith(value)]
            near = starts[0] if starts else did_you_mean(value, options or [value])
            return f"{self.name} has no setting {key!r}; did you mean {group}={near or '<option>'}?"
        if not self._is_group(text) or override.is_delete() or key.startswith("hydra/"):
            return None
        if isinstance(override.value(), dict):
            return f"{key} is a group; choose {key}=<option>, and set {key}.<setting>=<value>"
        if key not in self.known and override.package is None:
            return f"{self.name} has no group {key!r}"
        if text.startswith("+") and override.package is None:
            return f"write {text.lstrip('+')}, without +"
        return None

    def _options(self, group: str) -> list[str]:
        if group not in self._groups:
            self._groups[group] = self.loader.get_group_options(group, None, self.name)
        return self._groups[group]

    def _is_group(self, text: str) -> bool:
        """Whether an override chooses an option of a group."""
        return key_of(text) in WHOLE or bool(self._options(key_of(text)))

    def _is_known(self, text: str) -> bool:
        """Whether the key of an override is one of this program, of Hydra, or a group."""
        key = re.split(r"[./]", key_of(text))[0]
        return key in self.known or key == "hydra" or self._is_group(text)

    def _files(self, overrides: list[str]) -> Iterator[tuple[Path, KeyPath]]:
        """The files of a composed config with their packages, the last file first."""
        composed = self.loader.compute_defaults_list(self.name, overrides, RunMode.RUN)
        for default in reversed(composed.defaults):
            package = (default.package or "").replace("_global_", "")
            for folder in self.folders:
                if (file := folder / f"{default.config_path}.yaml").is_file():
                    yield file, tuple(package.split(".")) if package else ()
                    break

    def _as_typed(self, overrides: list[str], found: list[Mistake]) -> list[str]:
        """Quote strings that Hydra would parse as numbers: 2024_11_29 is 20241129, 1e3 1000.0."""
        texts = {dotted(one.path) for one in found if one.kind == "unquoted"}
        for text in overrides:
            key, _, given = text.partition("=")
            if key.lstrip("+") in texts and (instead := sources.quoted(key, given)):
                self.quoted[text] = instead
        return [self.quoted.get(text, text) for text in overrides]

    def _compose_what_works(
        self, overrides: list[str]
    ) -> tuple[DictConfig, list[str], dict[str, str]]:
        """Compose the valid overrides; returns the config, these, and why others are not."""
        try:
            return self.compose(overrides), overrides, {}
        except FAILURES:
            pass
        try:
            cfg = self.compose([])
        except FAILURES as error:
            raise mistaken([self._explain(error, self.name)]) from error
        kept: list[str] = []
        failed: dict[str, str] = {}
        for text in sorted(overrides, key=lambda one: not self._is_group(one)):
            try:
                cfg = self.compose([*kept, text])
                kept.append(text)
            except FAILURES as error:
                file = f"{key_of(text)}/{text.partition('=')[2]}"
                failed[text] = self._explain(error, file)
        return cfg, kept, failed

    def _explain(self, error: Exception, file: str) -> str:
        """Describe an exception while composing in one line; `file` was read last."""
        if isinstance(error, MissingConfigException):
            wanted = Path(error.missing_cfg_file or "")
            group = wanted.parent.as_posix()
            options = self._options(group)
            near = did_you_mean(wanted.name, options)
            hint = f"did you mean {group}={near}?" if near else f"there are {', '.join(options)}"
            files = [
                folder / f"{name}.yaml" for folder in self.folders for name in (file, self.name)
            ]
            return f"{sources.selected_by(files, wanted)}there is no {wanted}; {hint}"
        group = re.split(r"[./]", file)[0]
        if str(error).startswith("Could not override") and group in self.known:
            return f"{group} has no such setting, or is null; choose {group}=<option>"
        return sources.explain(error, file)

    def _without_effect(
        self, cfg: DictConfig, overrides: list[str], origin: sources.Origins
    ) -> Iterator[str]:
        """Report choices from groups that a later file sets to null."""
        for text in overrides:
            group = key_of(text)
            if text[0] != "~" and self._is_group(text) and cfg.get(group, text) is None:
                where = origin((group,))
                if f"/{group}/" not in where and where != "command line":
                    yield f"{text} (command line): {where} sets {group} to null; remove it"
