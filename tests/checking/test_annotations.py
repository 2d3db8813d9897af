"""Values fit annotations as a person would say so."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

from caravan.cli.checking.annotations import kinds, mismatch, remedy, takes_mapping

ALIASES = """
from typing import Literal, Optional, TypedDict, Union

Precision = Union[Literal[16, 32], Literal["bf16", "16-mixed"]]
Wide = Optional[Precision]

class Thing: ...

class Options(TypedDict):
    a: int
"""


@pytest.fixture(autouse=True, scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("aliases")
    (folder / "aliases_of_types.py").write_text(ALIASES)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def alternatives(text: str) -> Any:
    return kinds(ast.parse(text, mode="eval").body, "aliases_of_types")


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        ("int", 3),
        ("float", 3),
        ("float", 0.5),
        ("bool", True),
        ("str", "a"),
        ("Path", "runs/a"),
        ("int | None", None),
        ("Optional[int]", None),
        ("'int | None'", None),
        ("Union[int, str]", "a"),
        ("Literal['a', 'b']", "a"),
        ("Wide", "bf16"),
        ("Wide", 16),
        ("Wide", None),
        ("list[int]", [1, 2]),
        ("Sequence[str]", ["a"]),
        ("tuple[float, float]", [0.9, 1]),
        ("tuple[int, ...]", [1, 2, 3]),
        ("tuple[str, int]", ["a", 1]),
        ("dict[str, int]", {"a": 1}),
        ("Options", {"a": 1}),
        ("Thing", "whatever a class takes"),
        ("Any", 3),
        ("NowhereDefined", 3),
        ("Callable[[int], int]", "x"),
    ],
)
def test_values_that_fit(annotation: str, value: Any) -> None:
    assert mismatch(value, alternatives(annotation)) is None


@pytest.mark.parametrize(
    ("annotation", "value", "wanted"),
    [
        ("int", "abc", "an int"),
        ("int", 1.5, "an int"),
        ("int", True, "an int"),
        ("int", None, "an int"),
        ("float", "1e-4x", "a number"),
        ("float", True, "a number"),
        ("bool", "maybe", "true or false"),
        ("bool", 0.0, "true or false"),
        ("str", 3, "a text"),
        ("None | int", "x", "an int or null"),
        ("Literal['a', 'b']", "c", "one of a, b"),
        ("Wide", "bf-16", "one of 16, 32, bf16, 16-mixed or null"),
        ("Sequence[str]", "MRR@10", "a list of texts"),
        ("list[int]", ["a"], "a list of ints"),
        ("dict[str, int]", 3, "a mapping"),
        ("int", [1], "an int"),
    ],
)
def test_values_that_do_not(annotation: str, value: Any, wanted: str) -> None:
    assert mismatch(value, alternatives(annotation)) == wanted


def test_typed_fields_read_texts() -> None:
    assert mismatch("5", alternatives("int"), written=True) is None
    assert mismatch(5, alternatives("str"), written=True) == "a text"  # 1_0 is 10 by then
    assert mismatch("x", alternatives("int"), written=True) == "an int"


def test_a_mapping_is_no_instance_of_a_class() -> None:
    assert takes_mapping(alternatives("Thing")) is None
    assert takes_mapping(alternatives("int | None")) is None
    assert takes_mapping(alternatives("Thing | dict[str, int]")) is not None
    assert takes_mapping(alternatives("Any")) is not None


@pytest.mark.parametrize(
    ("annotation", "value", "words"),
    [
        ("int", 10000.0, "write 10000"),
        ("list[str]", "a", "write [a]"),
        ("float", "5", "write 5 without quotes"),
        ("int", "abc", ""),
    ],
)
def test_the_remedy_says_how_to_write_it(annotation: str, value: Any, words: str) -> None:
    assert remedy(value, alternatives(annotation)) == words
