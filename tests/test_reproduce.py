"""The ledger in reproduce/: its commands compose, and docs/papers.md shows it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import OmegaConf
from reproduce import tables
from tests.cli.small_conf import CONF

from caravan.cli.compose import Composer, check, without_hydra

LEDGER = tables.ledger()


def _commands(root: str) -> Iterator[list[str]]:
    """The overrides of every command of the ledger that starts a program."""
    for paper in LEDGER.values():
        for entry in paper["results"] + paper["steps"]:
            _, program, *overrides = shlex.split(entry["command"])
            if program == f"{root}.py":
                yield overrides


@pytest.fixture(scope="module")
def composed() -> list[tuple[list[str], Any]]:
    """Every command of the ledger with its config."""
    found = []
    for root in ("train", "evaluate"):
        with Composer(CONF, root) as composer:
            for overrides in _commands(root):
                cfg = without_hydra(composer.compose(overrides))
                wrong = [one for one in check(cfg, composer.root) if one.kind == "wrong"]
                assert not wrong, overrides
                found.append((overrides, cfg))
    return found


@pytest.mark.slow
def test_every_file_that_a_command_reads_is_written_by_another_one(
    composed: list[tuple[list[str], Any]],
) -> None:
    written = {cfg.run_dir for _, cfg in composed}
    for overrides, cfg in composed:
        text = OmegaConf.to_yaml(cfg, resolve=False)
        for line in re.findall(r"^ *(?:folder|retriever|reranker|run|-): (runs/.*)$", text, re.M):
            assert any(line.startswith(f"{folder}/") for folder in written), (overrides, line)


@pytest.mark.slow
def test_no_two_commands_write_the_same_folder(composed: list[tuple[list[str], Any]]) -> None:
    seen: dict[str, list[str]] = {}
    for overrides, cfg in composed:
        assert seen.setdefault(cfg.run_dir, overrides) == overrides


def test_every_result_names_its_table_row_value_and_tolerance() -> None:
    for paper in LEDGER.values():
        for result in paper["results"]:
            assert result["table"]
            assert result["row"]
            assert all(0 < value < 100 for value in result["published"].values())
            assert 0 < result["tolerance"] <= 1
            assert result["measured"] is None or set(result["measured"]) == set(result["published"])


def test_the_papers_page_shows_the_ledger() -> None:
    page = tables.PAGE.read_text()
    assert tables.render(page) == page, "run `make ledger`"
