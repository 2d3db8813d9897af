"""Docstrings of sources that are read and never run."""

from pathlib import Path

import pytest
from tests.installed import install

from caravan.quickstart.docstrings import docstrings, installed_sources, read, required_by
from caravan.quickstart.pydocs import REQUIREMENTS

SOURCE = b'''
"""Of the module."""
raise SystemExit("run")
class Outer:
    """Of the class."""
    class Inner:
        def method(self):
            """Of a method.

            Below.
              Indented.
            """
    if True:
        async def later(self): "Of a coroutine."
def twice(): "The first counts."
def twice(): "Not the second."
def outer():
    def local(): "Not seen from outside."
def silent(): pass
'''


def test_docstrings_carry_their_qualified_names() -> None:
    assert docstrings(SOURCE, "some.module") == [
        ("some.module:", "Of the module."),
        ("some.module:Outer", "Of the class."),
        ("some.module:Outer.Inner.method", "Of a method.\n\nBelow.\n  Indented."),
        ("some.module:Outer.later", "Of a coroutine."),
        ("some.module:twice", "The first counts."),
    ]


def test_files_are_read_in_order_and_not_run(tmp_path: Path) -> None:
    sources = {
        "b": b'"""B."""\nimport no_such_module\nopen("made", "w")',
        "broken": b"def f(:",
        "nulls": b"x = 1\0",
        "latin": b'# -*- coding: latin-1 -*-\n"""\xfc."""',
        "foreign": b'"""\xfc."""',
        "odd": b'"""Half \\ud800 a pair, and \\d."""',
        "a": b'"""A."""',
    }
    for name, content in sources.items():
        (tmp_path / f"{name}.py").write_bytes(content)
    files = [(name, tmp_path / f"{name}.py") for name in [*sources, "gone"]]
    assert list(read(files)) == [
        [("b:", "B.")],
        *([], []),
        [("latin:", "\u00fc.")],
        [],
        [("odd:", "Half ? a pair, and \\d.")],
        [("a:", "A.")],
        [],
    ]
    assert not Path("made").exists()


def test_tests_and_vendored_copies_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["made_up/__init__.py", "made_up/sub/part.py", "single.py"]
    left = ["made_up/tests/a.py", "made_up/test_b.py", "made_up/_vendor/c.py", "made_up/d-e.py",
            "made_up/conftest.py", "../bin/tool.py", "made_up/data.txt"]  # fmt: skip
    install(tmp_path / "site", "made-up", dict.fromkeys(kept + left, b""))
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = installed_sources(["Made_Up", "not-installed"])
    assert list(found.files) == ["made_up", "made_up.sub.part", "single"]
    assert found.versions == {"made-up": "1.0"}
    assert found.missing == ["not-installed"]


def test_the_standard_library_comes_without_its_tests_and_site_packages() -> None:
    found = installed_sources(["stdlib"])
    assert {"json", "json.decoder", "asyncio.tasks"} <= set(found.files)
    folders = {part for name in found.files for part in name.split(".")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "numpy"}
    assert list(found.versions) == ["python"]


def test_requirements_bring_their_own_and_nothing_that_is_merely_there() -> None:
    names = required_by(REQUIREMENTS)
    assert {"torch", "numpy", "pyyaml", "huggingface-hub"} <= names
    assert not names & {"pytest", "ruff", "mypy", "sentence-transformers", "caravan-retrieval"}
