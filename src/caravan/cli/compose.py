"""Compose a config from `conf/` and the command line, and check it before Hydra starts the job.

Hydra stops at the first mistake. Therefore each override is checked separately (`overrides`), the
config is composed without types (or override by override if that fails), and then `check` runs.

    argv = preflight(sys.argv[1:], Path("conf"), "train")
    cfg = compose(Path("conf"), "train", ["experiment=quickstart/retriever"])
"""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from caravan.cli import schema
from caravan.cli.check import Checker, KeyPath, Mistake, dotted
from caravan.cli.origins import Origins, shown, too_many_values
from caravan.cli.overrides import WHOLE, Overrides, key_of
from caravan.cli.rules import rules_of
from caravan.cli.signatures import did_you_mean
from caravan.cli.sweeps import Sweep
from caravan.errors import InputError, first_line

FAILURES = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    RecursionError,
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
    """All mistakes in a composed config: invalid keys and values, then rules across objects.

    Args: cfg without Hydra's node, interpolations may be unresolved; root, the dataclass of it.
    """
    if root is schema.Train:
        from caravan.cli.train import completed  # imports torch

        cfg = completed(cfg)
    config = Checker(cfg, root)
    found = config.mistakes()
    wrong = {mistake.path for mistake in found}
    for rule in rules_of(root):
        try:
            found += [mistake for mistake in rule(config) if mistake.path not in wrong]
        except OmegaConfBaseException:
            if not wrong:  # otherwise the rule failed on a value that is already reported
                raise
    return found


def refuse(cfg: DictConfig, root: type) -> None:
    """Raise an InputError with all mistakes in the config of a job."""
    found = check(cfg, root)
    if found:
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
    """Check the config of a run, or the configs of all jobs of a sweep.

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
        sweep = Sweep(composer, args.overrides)
        several = args.multirun or sweep.multirun
        if lines := sweep.check() if several else sweep.without_multirun():
            raise mistaken(lines)
        return sweep.arguments(argv) if several else [composer.quoted.get(x, x) for x in argv]


class _FurtherFolder(SearchPathPlugin):
    """Adds the folder of `--config-dir`, since `initialize_config_dir` accepts one folder only."""

    folder: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            before = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{self.folder}", before)


class Composer(AbstractContextManager["Composer"]):
    """Composes a primary config, any number of times; restores Hydra's state on exit.

    Args:
        conf, name, more: as for `compose`; `more` is searched after `conf`.
        job: Hydra's job name and the key of the root; None uses `name`.
    """

    def __init__(
        self,
        conf: Path,
        name: str,
        more: Path | None = None,
        job: str | None = None,
    ) -> None:
        self.name, self.root = name, schema.ROOTS[job or name]
        self.folders = [folder.absolute() for folder in (conf, more) if folder is not None]
        files = (file for folder in self.folders for file in folder.rglob("*.yaml"))
        if lines := [line for file in files if (line := too_many_values(file))]:
            raise mistaken(lines)
        self._before = HydraConfig.instance().cfg
        schema.register()
        Plugins.instance().register(_FurtherFolder)
        _FurtherFolder.folder = more.absolute() if more else None
        self._hydra = hydra.initialize_config_dir(
            str(self.folders[0]), job_name=job or name, version_base="1.3"
        )
        _FurtherFolder.folder = None
        self.loader = GlobalHydra.instance().config_loader()
        self.overrides = Overrides(self.loader, name, self.root)
        self.quoted: dict[str, str] = {}  # typed override to quoted override

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

        The config is None if it cannot be composed or an `experiment` or `sweep` is invalid.
        """
        lines, kept, lost = [], [], set()
        for text in overrides:
            mistake, instead = self.overrides.check(text)
            if mistake:
                lines.append(f"{text} (command line): {mistake}")
                lost.add(key_of(text).partition(".")[0])
            if instead:
                kept.append(instead)
        cfg, kept, failed = self._compose_what_works(kept)
        lines += [line for line, _ in failed]
        lost |= {key_of(text) for _, text in failed}
        if cfg is None or lost & set(WHOLE):
            return None, lines  # further mistakes would be those of another config
        found = check(without_hydra(cfg), self.root)
        again = self._as_typed(kept, found)
        if again != kept:
            kept, cfg = again, self.compose(again)
            found = check(without_hydra(cfg), self.root)
        keys = [key_of(text) for text in kept if not self.overrides.is_group(text)]
        origin = Origins(keys, self.files(kept))
        for one in found:
            if not one.path or one.path[0] not in lost:
                lines.append(f"{dotted(one.path)} ({origin(one.path)}): {one.text}")
        return cfg, [*lines, *_of_hydra(cfg), *self._without_effect(cfg, kept, origin)]

    def files(self, overrides: list[str]) -> Iterator[tuple[Path, KeyPath]]:
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
            if key.lstrip("+") in texts and (quoted := self.overrides.quoted(key, given)):
                self.quoted[text] = quoted
        return [self.quoted.get(text, text) for text in overrides]

    def _without_effect(
        self, cfg: DictConfig, overrides: list[str], origin: Origins
    ) -> Iterator[str]:
        """Report group choices that a later file sets to null."""
        for text in overrides:
            group = key_of(text)
            if text[0] != "~" and self.overrides.is_group(text) and cfg.get(group, text) is None:
                where = origin((group,))
                if f"/{group}/" not in where and where != "command line":
                    yield f"{text} (command line): {where} sets {group} to null; remove it"

    def _compose_what_works(
        self, overrides: list[str]
    ) -> tuple[DictConfig | None, list[str], list[tuple[str, str]]]:
        """Compose the valid overrides; returns the config, these, and (mistake, override) pairs."""
        try:
            return self.compose(overrides), overrides, []
        except FAILURES:
            pass
        kept: list[str] = []
        failed: list[tuple[str, str]] = []
        try:
            cfg = self.compose(kept)
        except FAILURES as error:
            return None, kept, [(self._explain(error, self.name), "")]
        for text in sorted(overrides, key=lambda one: not self.overrides.is_group(one)):
            try:
                cfg = self.compose([*kept, text])
                kept.append(text)
            except FAILURES as error:
                above = key_of(text).partition(".")[0]
                inside = text[0] != "~" and above != key_of(text)
                if inside and not isinstance(cfg.get(above, cfg), DictConfig):
                    given = "null" if cfg[above] is None else cfg[above]
                    why = f"{above} is {given} and has no settings; choose {above}=<option>"
                else:
                    why = self._explain(error, f"{key_of(text)}/{text.partition('=')[2]}")
                failed.append((f"{text} (command line): {why}", text))
        return cfg, kept, failed

    def _explain(self, error: Exception, file: str) -> str:
        """Describe an exception while composing in one line; `file` was read last."""
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            mark = error.problem_mark
            return f"{shown(Path(mark.name))}:{mark.line + 1}: not YAML: {error.problem}"
        if isinstance(error, UnicodeDecodeError):
            return f"{file}.yaml: not UTF-8: {error.reason}"
        if isinstance(error, MissingConfigException) and error.options:
            wanted = Path(error.missing_cfg_file or "")
            near = did_you_mean(wanted.name, error.options)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(error.options)}"
            if wanted.parent.as_posix() in ("hydra/sweeper", "hydra/launcher") and not near:
                plugin = f"hydra-{wanted.name.partition('_')[0]}-{wanted.parent.name}"
                hint += f"; others are plugins: pip install {plugin}"
            return f"{self._mention(file, wanted)}there is no {wanted}; {hint}"
        if isinstance(error, RecursionError):
            return f"{file} is nested too deeply, or its defaults include {file} again"
        text = " ".join(str(error).partition("Config search path:")[0].split())
        if text.startswith("Could not append to config"):
            return "it is already set; remove the +"
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
        return f"{text} {first_line(cause)}" if cause else text or repr(error)

    def _mention(self, file: str, wanted: Path) -> str:
        """The file and line that select an option of a group, or ""."""
        choice = re.compile(rf"\b{re.escape(wanted.parent.name)}\b.*:\s*{re.escape(wanted.name)}\b")
        for folder in self.folders:
            for path in (folder / f"{file}.yaml", folder / f"{self.name}.yaml"):
                lines = path.read_text("utf-8").splitlines() if path.is_file() else []
                for number, line in enumerate(lines, start=1):
                    if choice.search(line):
                        return f"{shown(path)}:{number}: "
        return ""


def _of_hydra(cfg: DictConfig) -> Iterator[str]:
    """Report Hydra settings that would split a run over two folders."""
    try:
        run_dir, log_dir = cfg.get("run_dir"), cfg.hydra.run.dir
    except OmegaConfBaseException:
        return  # reported already
    if isinstance(run_dir, str) and log_dir != run_dir:
        yield f"hydra.run.dir: this moves only the log; set run_dir={log_dir} instead"
    if cfg.hydra.job.chdir is True:
        text = "paths are relative to the working directory of the command; remove it"
        yield f"hydra.job.chdir: {text}"
