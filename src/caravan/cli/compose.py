"""Compose a config from `conf/` and the command line, and collect what is wrong with it.

Hydra stops at the first mistake, in its own words. So each override is looked at by itself before
(does it parse, does the option exist), the config is composed without types, and where that still
fails the overrides are tried one by one. What can be composed is checked (`caravan.cli.schema`).

    with Composer(Path("conf"), "train", Train) as composer:
        config, lines = composer.collect(["experiment=quickstart", "trainer.max_step=5"])
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from caravan.cli import schema
from caravan.cli.checking.definitions import did_you_mean
from caravan.cli.checking.walk import Mistake, dotted
from caravan.cli.checking.walk import Path as KeyPath
from caravan.cli.config_files import LOADER, Repository, shown
from caravan.cli.overrides import WHOLE, Vet, key_of
from caravan.cli.rules import asking
from caravan.errors import InputError, first_line

FAILURES = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError),
    *(OSError, ValueError, TypeError, AttributeError, AssertionError, RecursionError),
)
"""What composing raises for a mistake in a file or in an override."""
PLUGINS = ("hydra/sweeper", "hydra/launcher")
"""Groups whose further options come with packages of their own."""


def compose(conf: Path, name: str, overrides: list[str], more: Path | None = None) -> DictConfig:
    """The checked config that `train.py` or `evaluate.py` would run with.

    Args:
        conf: the folder of the configs.
        name: "train" or "evaluate".
        overrides: as on the command line, such as "experiment=quickstart".
        more: a further folder, as `--config-dir`.

    Raises:
        InputError: with a line for each mistake.
    """
    with Composer(conf, name, schema.ROOTS[name], more) as composer:
        _, lines = composer.collect(overrides)
    if lines:
        raise InputError(report(lines))
    typed = [composer.quoted.get(text, text) for text in overrides]
    with Composer(conf, name, schema.ROOTS[name], more, typed=True) as composer:
        return without_hydra(composer.compose(typed))


def report(lines: list[str]) -> str:
    """All mistakes in one message."""
    count = f"{len(lines)} mistake{'s' * (len(lines) > 1)}"
    return "\n".join([f"{count} in the config; nothing was started:", *(f"  {x}" for x in lines)])


def without_hydra(cfg: DictConfig) -> DictConfig:
    """The config as the job sees it."""
    keys: Any = [key for key in cfg if key != "hydra"]  # a file may have numbers among its keys
    return OmegaConf.masked_copy(cfg, keys)


class Composer:
    """Composes one primary config, again and again; a context that leaves Hydra as it was."""

    def __init__(
        self,
        conf: Path,
        name: str,
        root: type,
        more: Path | None = None,
        job: str = "",
        typed: bool = False,
    ) -> None:
        """Set up.

        Args:
            conf: the folder of the configs.
            name: the primary config, without .yaml.
            root: the dataclass that says what its root may hold.
            more: a further folder, searched after `conf`.
            job: Hydra's name of the job; the primary config's if empty.
            typed: let Hydra check the root's types, as it does in the job.
        """
        self.name, self.root = name, root
        self.folders = [conf.absolute()] + ([more.absolute()] if more else [])
        search = create_config_search_path(str(self.folders[0]))
        for folder in self.folders[1:]:
            search.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
        self._before = HydraConfig.instance().cfg
        schema.register(typed=typed)
        self.hydra = Hydra.create_main_hydra2(job or name, search)
        loader: Any = self.hydra.config_loader
        loader.repository = Repository(search)
        self.loader = loader
        self.vet = Vet(loader, name, root)
        self.quoted: dict[str, str] = {}  # overrides by the text that was typed

    def __enter__(self) -> Composer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        schema.register()
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = self._before

    def compose(self, overrides: list[str]) -> DictConfig:
        """The config with Hydra's node in it, as one job would see it."""
        cfg = self.hydra.compose_config(
            self.name, list(overrides), RunMode.RUN, with_log_configuration=False, from_shell=False
        )
        with open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.output_dir = os.getcwd()
        HydraConfig.instance().set_config(cfg)
        return cfg

    def collect(self, overrides: list[str]) -> tuple[DictConfig | None, list[str]]:
        """Compose and check.

        Returns:
            The config with Hydra's node (None where a file of it cannot be read), and a line for
            every mistake.
        """
        lines, kept, lost = [], [], set()
        for text in overrides:
            mistake, instead = self.vet(text)
            if mistake:
                lines.append(mistake)
                lost.add(key_of(text).partition(".")[0])
            if instead:
                kept.append(instead)
        cfg, kept, failed = self._compose_what_works(kept)
        lines += [line for line, _ in failed]
        lost |= {key_of(text) for _, text in failed}
        if cfg is None or lost & set(WHOLE):
            return None, lines  # the rest would be told about a config that nobody asked for
        found = schema.mistakes(without_hydra(cfg), self.root)
        again = self._as_typed(kept, found)
        if again != kept:
            kept, cfg = again, self.compose(again)
            found = schema.mistakes(without_hydra(cfg), self.root)
        place = Places(self, kept)
        for one in found:
            if not one.path or one.path[0] not in lost:
                lines.append(f"{dotted(one.path)} ({place(one.path)}): {one.text}")
        return cfg, [*lines, *_of_hydra(cfg), *self._left_aside(cfg, kept, place)]

    def _as_typed(self, overrides: list[str], found: list[Mistake]) -> list[str]:
        """Put what Hydra reads as a number into quotes where a text is wanted.

        The name 2024_11_29 would be 20241129, and 1e3 1000.0.
        """
        texts = {dotted(one.path) for one in found if one.kind == "unquoted"}
        result = []
        for text in overrides:
            key, _, given = text.partition("=")
            is_text = key.lstrip("+") in texts and isinstance(
                self.vet.parse(text).value(), int | float
            )
            quoted = self.vet.quoted(key, given) if is_text else None
            if quoted is not None:
                self.quoted[text] = quoted
            result.append(quoted or text)
        return result

    def _left_aside(self, cfg: DictConfig, overrides: list[str], place: Places) -> Iterator[str]:
        """Choices without effect, since a file that is read later sets the group to null."""
        for text in filter(self.vet.is_group, overrides):
            if text.startswith("~"):  # just what it asks for
                continue
            group = key_of(text)
            if group in cfg and cfg[group] is None:
                where = place((group,))
                if f"/{group}/" not in where and where != "command line":
                    yield f"{text} (command line): {where} sets {group} to null; leave it out"

    def _compose_what_works(
        self, overrides: list[str]
    ) -> tuple[DictConfig | None, list[str], list[tuple[str, str]]]:
        """Compose with all overrides that let it.

        Returns:
            The config, those overrides, and (what is wrong, override) for each of the others.
        """
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
        for text in sorted(overrides, key=lambda one: not self.vet.is_group(one)):
            try:
                cfg = self.compose([*kept, text])
                kept.append(text)
            except FAILURES as error:
                why = self._no_mapping(cfg, text) or self._explain(error, _file(text))
                failed.append((f"{text} (command line): {why}", text))
        return cfg, kept, failed

    def _no_mapping(self, cfg: DictConfig, text: str) -> str | None:
        """Why an override cannot set a key inside of what is no mapping, if that is so."""
        above = key_of(text).partition(".")[0]
        if text.startswith("~") or "." not in key_of(text) or above not in cfg:
            return None
        if isinstance(cfg[above], DictConfig):
            return None
        given = "null" if cfg[above] is None else cfg[above]
        return f"{above} is {given} and has no settings; choose another {above}=<option>"

    def _explain(self, error: Exception, file: str) -> str:
        """One line for an exception of composing, where `file` was the last to be read."""
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            mark = error.problem_mark
            return f"{shown(Path(mark.name))}:{mark.line + 1}: not YAML: {error.problem}"
        if isinstance(error, MissingConfigException) and error.options:
            wanted = Path(error.missing_cfg_file or "")
            near = did_you_mean(wanted.name, error.options)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(error.options)}"
            if wanted.parent.as_posix() in PLUGINS and not near:
                plugin = f"hydra-{wanted.name.partition('_')[0]}-{wanted.parent.name}"
                hint += f"; others are plugins: pip install {plugin}"
            return f"{self._mention(file, wanted)}there is no {wanted}; {hint}"
        if isinstance(error, RecursionError):
            named = f"the defaults of {file} include {file} again, itself or through another file"
            return f"{named}; leave that entry out"
        text = " ".join(str(error).partition("Config search path:")[0].split())
        if text.startswith("Could not append to config"):
            return "it is set already; leave the + out"
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
        return f"{text} {first_line(cause)}" if cause else text or repr(error)

    def _mention(self, file: str, wanted: Path) -> str:
        """The file and line that ask for an option of a group, "" where none is found."""
        choice = re.compile(rf"\b{re.escape(wanted.parent.name)}\b.*:\s*{re.escape(wanted.name)}\b")
        for path in (
            folder / f"{one}.yaml" for folder in self.folders for one in (file, self.name)
        ):
            lines = path.read_text("utf-8").splitlines() if path.is_file() else []
            for number, line in enumerate(lines, start=1):
                if choice.search(line):
                    return f"{shown(path)}:{number}: "
        return ""


class Places:
    """Where a value of a composed config was set: on the command line, or a file and its line."""

    def __init__(self, composer: Composer, overrides: list[str]) -> None:
        self.composer, self.overrides = composer, overrides
        self.keys = [key_of(text) for text in overrides if not composer.vet.is_group(text)]
        self.trees: list[tuple[Path, KeyPath, yaml.Node | None]] | None = None

    def __call__(self, path: KeyPath) -> str:
        name = dotted(path)
        if any(name == key or name.startswith((f"{key}.", f"{key}[")) for key in self.keys):
            return "command line"
        if self.trees is None:
            self.trees = list(self._read())
        for wanted in (path, (*path, "_target_"), path[:-1]):
            for file, package, tree in self.trees:
                if wanted[: len(package)] == package:
                    line = _line(tree, wanted[len(package) :])
                    if line is not None:
                        return f"{shown(file)}:{line}"
        return (
            "command line" if any(key.startswith(name) for key in self.keys) else self.composer.name
        )

    def _read(self) -> Iterator[tuple[Path, KeyPath, yaml.Node | None]]:
        """The files that the config was composed from, the last word first."""
        composed = self.composer.loader.compute_defaults_list(
            self.composer.name, self.overrides, RunMode.RUN
        )
        for default in reversed(composed.defaults):
            package = (default.package or "").replace("_global_", "")
            for folder in self.composer.folders:
                file = folder / f"{default.config_path}.yaml"
                if file.is_file():
                    parts = tuple(package.split(".")) if package else ()
                    yield file, parts, yaml.compose(file.read_text("utf-8"), Loader=LOADER)
                    break


def _of_hydra(cfg: DictConfig) -> Iterator[str]:
    """Hydra settings that would split a run over two folders."""
    run_dir, log_dir = asking.value(cfg, "run_dir"), asking.value(cfg, "hydra.run.dir")
    if isinstance(run_dir, str) and log_dir is not None and log_dir != run_dir:
        yield f"hydra.run.dir: it moves the log alone; write run_dir={log_dir} instead"
    if asking.value(cfg, "hydra.job.chdir") is True:
        yield (
            "hydra.job.chdir: paths are relative to the folder in which the command was started,"
            " so the working directory does not change; leave it out"
        )


def _file(text: str) -> str:
    """The file in conf/ that an override chooses, if it is one of a group."""
    return f"{key_of(text)}/{text.partition('=')[2]}"


def _line(tree: yaml.Node | None, path: KeyPath) -> int | None:
    """The line, from 1, at which a YAML tree sets a path; None where it does not."""
    if not path:
        return None
    if (
        isinstance(tree, yaml.SequenceNode)
        and isinstance(path[0], int)
        and path[0] < len(tree.value)
    ):
        item = tree.value[path[0]]
        return _line(item, path[1:]) or item.start_mark.line + 1
    if isinstance(tree, yaml.MappingNode):
        for key, value in tree.value:
            if key.value == str(path[0]):
                return key.start_mark.line + 1 if len(path) == 1 else _line(value, path[1:])
    return None
