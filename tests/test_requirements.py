"""The pinned versions of requirements*.txt lie in the ranges of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def by_name(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one for one in found}


def pinned(name: str) -> dict[str, Requirement]:
    """What a file of requirements adds to those that it includes."""
    lines = (line.partition(" #")[0] for line in (ROOT / name).read_text().splitlines())
    return by_name([line for line in lines if line and not line.startswith(("#", "-r"))])


def in_range(pin: Requirement, declared: Requirement) -> bool:
    """Whether the version lies in the range; a range is expected to be the same."""
    version = re.fullmatch(r"==([^,]+)", str(pin.specifier))
    return declared.specifier.contains(version[1]) if version else pin == declared


@pytest.mark.parametrize(
    ("name", "declared"),
    [("requirements.txt", PROJECT["dependencies"]), ("requirements-gpu.txt", EXTRAS["gpu"])],
)
def test_the_packages_of_a_file_are_those_of_the_project(name: str, declared: list[str]) -> None:
    pins, ranges = pinned(name), by_name(declared)
    assert pins.keys() == ranges.keys()
    assert [one for one in pins if not in_range(pins[one], ranges[one])] == []


def test_tests_run_with_versions_of_the_extras_that_the_project_declares() -> None:
    ranges = by_name([line for lines in EXTRAS.values() for line in lines])
    pins = pinned("requirements-dev.txt") | pinned("requirements-extras.txt")
    tested = pins.keys() & ranges.keys()
    assert {"gguf", "ir-datasets", "mteb", "ray", "sentence-transformers"} <= tested
    assert [one for one in tested if not in_range(pins[one], ranges[one])] == []


def test_the_installation_page_lists_every_extra() -> None:
    table = (ROOT / "docs/installation.md").read_text().partition("## Extras")[2]
    cells = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(EXTRAS)
