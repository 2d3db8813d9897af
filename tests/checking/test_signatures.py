"""Arguments are read from source, through re-exports, bases, dataclasses and decorators."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from caravan.cli.checking.signatures import signature

PACKAGE = {
    "pack_a/__init__.py": """
        raise RuntimeError("this package must not be imported")
        from .core import Model, build as make
        from pack_a.more import *
        from . import core as inner
    """,
    "pack_a/core.py": """
        from dataclasses import dataclass, field
        from functools import wraps
        from typing import ClassVar, overload
        import nowhere_at_all

        def kept(function):
            @wraps(function)
            def inner(*args, **kwargs):
                return function(*args, **kwargs)
            return inner

        class Base:
            @kept
            def __init__(self, width: int, *, depth: int = 2, name: str = None):
                pass

            @classmethod
            def load(cls, folder: str):
                pass

            @staticmethod
            def rule(limit: float):
                pass

        class Model(Base):
            pass

        class Lost(nowhere_at_all.Base):
            pass

        class Empty:
            pass

        class Fixed:
            def __new__(cls, size): ...

        @dataclass
        class Settings:
            first: int
            total: ClassVar[int] = 3
            second: str = "a"
            hidden: int = field(default=1, init=False)
            items: list = field(default_factory=list)

        @dataclass
        class MoreSettings(Settings):
            third: float = 0.5

        def build(size: int, **options): ...

        if True:
            Alias = Model
    """,
    "pack_a/more.py": """
        def behind_a_star(one, two=2): ...
    """,
}


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("packages")
    for name, text in PACKAGE.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        lines = text.strip("\n").splitlines()
        file.write_text("\n".join(line[8:] for line in lines) + "\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.mark.parametrize(
    ("target", "arguments", "required"),
    [
        ("pack_a.core.Model", ["width", "depth", "name"], ["width"]),
        ("pack_a.Model", ["width", "depth", "name"], ["width"]),
        ("pack_a.inner.Model", ["width", "depth", "name"], ["width"]),
        ("pack_a.core.Alias", ["width", "depth", "name"], ["width"]),
        ("pack_a.core.Model.load", ["folder"], ["folder"]),
        ("pack_a.core.Model.rule", ["limit"], ["limit"]),
        ("pack_a.core.Settings", ["first", "second", "items"], ["first"]),
        ("pack_a.core.MoreSettings", ["first", "second", "items", "third"], ["first"]),
        ("pack_a.behind_a_star", ["one", "two"], ["one"]),
        ("pack_a.core.Empty", [], []),
        ("pack_a.core.Fixed", ["size"], ["size"]),
    ],
)
def test_arguments_are_those_of_the_definition(
    target: str, arguments: list[str], required: list[str]
) -> None:
    found = signature(target)
    assert list(found.parameters) == arguments
    assert [p.name for p in found.parameters.values() if p.required] == required
    assert not found.open


@pytest.mark.parametrize("target", ["pack_a.make", "pack_a.core.Lost", "pack_a.core.Lost.load"])
def test_what_the_source_does_not_tell_is_open(target: str) -> None:
    assert signature(target).open


def test_what_has_no_source_is_inspected() -> None:
    assert list(signature("zlib.compress").parameters) == ["level", "wbits"]
    assert signature("builtins.dict").open


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("pack_a.core.Modle", "did you mean pack_a.core.Model?"),
        ("pack_a.cor.Model", "did you mean pack_a.core?"),
        ("pack_aa.Model", "did you mean pack_a.Model?"),
        ("pack_a.core.Model.lod", "there is no 'lod' in pack_a.core.Model; did you mean"),
        ("pack_a.core", "is a module"),
        ("pack_a core", "no dotted path"),
    ],
)
def test_a_target_that_does_not_exist_is_told_with_a_hint(target: str, hint: str) -> None:
    with pytest.raises(LookupError, match=hint.replace("?", r"\?")):
        signature(target)


def test_an_edited_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited.py").write_text("def f(a): ...\n")
    assert list(signature("edited.f").parameters) == ["a"]
    (tmp_path / "edited.py").write_text("def f(a, longer_name): ...\n")
    assert list(signature("edited.f").parameters) == ["a", "longer_name"]


def test_libraries_are_read_without_being_imported() -> None:
    code = """
import sys
from caravan.cli.checking.signatures import signature
assert "max_steps" in signature("pytorch_lightning.Trainer").parameters
assert "patience" in signature("pytorch_lightning.callbacks.EarlyStopping").parameters
assert signature("torch.optim.AdamW").parameters["lr"].default is not None
assert "r" in signature("peft.LoraConfig").parameters
assert signature("transformers.AutoModel.from_pretrained").open
try:
    signature("pytorch_lightning.Traner")
except LookupError as error:
    assert "pytorch_lightning.Trainer" in str(error)
heavy = {"torch", "transformers", "pytorch_lightning", "peft", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
