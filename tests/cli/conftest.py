"""A small tree of configs, and the lines with which a command line over it is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.cli.small_conf import small_conf

from caravan.cli.compose import preflight
from caravan.errors import InputError

Lines = Callable[..., list[str]]


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    sys.path.insert(0, str(home))
    sys.modules.pop("parts", None)
    yield small_conf(home)
    sys.path.remove(str(home))


@pytest.fixture
def lines(conf: Path, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """The mistakes in a command line, a line each."""
    monkeypatch.chdir(conf.parent)

    def mistakes(*overrides: str, root: str = "train", conf: Path = conf) -> list[str]:
        try:
            preflight(list(overrides), conf, root)
        except InputError as error:
            return [line.strip() for line in str(error).splitlines()[1:]]
        return []

    return mistakes
