"""Does a value from a config fit the annotation of the argument that it is given to?

Annotations are read as source (`ast`), in the module where they stand, so that an alias such as
Lightning's `_PRECISION_INPUT` is followed to its Literal. Known are the common ones: int, float,
bool, str, None, Optional, Union, Literal, sequences, mappings; every other annotation takes
anything, except that a plain mapping is no instance of a class.

    mismatch("abc", annotation, "pytorch_lightning.trainer.trainer")  ->  "an int"
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from caravan.cli.checking.definitions import resolve

_LISTS = ("list", "List", "tuple", "Tuple", "set", "Set", "frozenset", "FrozenSet")
SEQUENCES = frozenset((*_LISTS, "Sequence", "MutableSequence", "Iterable", "Collection"))
MAPPINGS = frozenset(("dict", "Dict", "Mapping", "MutableMapping", "OrderedDict", "defaultdict"))
WRAPPERS = frozenset(("Annotated", "Final", "ClassVar", "Required", "NotRequired", "InitVar"))
SCALARS = {"int": "an int", "float": "a number", "bool": "true or false", "str": "a text"}
OTHERS = {
    "none": "null",
    "mapping": "a mapping",
    "node": "a mapping with a _target_",
    "nodes": "a mapping of names to nodes with a _target_",
    "section": "a mapping",
}
MAX_DEPTH = 12


@dataclass(frozen=True)
class Kind:
    """One alternative of an annotation.

    `name` is a key of SCALARS or OTHERS, or "literal", "sequence", "class" (an instance of some
    class), "any". `values` are a Literal's; `inner` is the annotation of the elements, or the class
    of a section.
    """

    name: str
    values: tuple[Any, ...] = ()
    inner: ast.expr | None = None
    scope: str = ""


ANY = (Kind("any"),)


def kinds(annotation: ast.expr | None, scope: str, depth: int = 0) -> tuple[Kind, ...]:
    """The alternatives that an annotation allows; `scope` is the module that it stands in."""
    if annotation is None or depth > MAX_DEPTH:
        return ANY
    return tuple(_kinds(annotation, scope, depth))


def _kinds(annotation: ast.expr, scope: str, depth: int) -> Iterator[Kind]:
    if isinstance(annotation, ast.Constant):
        if annotation.value is None:
            yield Kind("none")
        elif isinstance(annotation.value, str):
            yield from kinds(_parse(annotation.value), scope, depth + 1)
        else:
            yield from ANY
    elif isinstance(annotation, ast.BinOp):
        yield from kinds(annotation.left, scope, depth + 1)
        yield from kinds(annotation.right, scope, depth + 1)
    elif isinstance(annotation, ast.Subscript):
        yield from _subscript(annotation, scope, depth)
    elif isinstance(annotation, ast.Name | ast.Attribute):
        yield from _name(annotation, scope, depth)
    else:
        yield from ANY


def _subscript(annotation: ast.Subscript, scope: str, depth: int) -> Iterator[Kind]:
    head = ast.unparse(annotation.value).rpartition(".")[2]
    inside = annotation.slice
    items = inside.elts if isinstance(inside, ast.Tuple) else [inside]
    if head in ("Optional", "Union"):
        for item in items:
            yield from kinds(item, scope, depth + 1)
        if head == "Optional":
            yield Kind("none")
    elif head == "Literal":
        values = []
        for item in items:
            if isinstance(item, ast.Constant):
                values.append(item.value)
            elif isinstance(item, ast.UnaryOp) and isinstance(item.operand, ast.Constant):
                values.append(ast.literal_eval(item))
            else:  # a Literal inside a Literal, or an enum's member
                yield from kinds(item, scope, depth + 1)
        yield Kind("literal", values=tuple(values))
    elif head in SEQUENCES:
        each = {ast.unparse(item) for item in items} - {"..."}
        yield Kind("sequence", inner=items[0] if len(each) == 1 else None, scope=scope)
    elif head in MAPPINGS:
        yield Kind("mapping", inner=items[-1], scope=scope)
    elif head in WRAPPERS:
        yield from kinds(items[0], scope, depth + 1)
    else:
        yield Kind("class")


def _name(annotation: ast.Name | ast.Attribute, scope: str, depth: int) -> Iterator[Kind]:
    name = ast.unparse(annotation).rpartition(".")[2]
    if name in SCALARS:
        yield Kind(name)
    elif name == "None":
        yield Kind("none")
    elif name in ("Path", "PathLike", "LiteralString"):
        yield Kind("str")
    elif name in SEQUENCES:
        yield Kind("sequence")
    elif name in MAPPINGS:
        yield Kind("mapping")
    elif name in ("Any", "object"):
        yield from ANY
    else:
        yield from _resolved(annotation, scope, depth)


def _resolved(annotation: ast.expr, scope: str, depth: int) -> Iterator[Kind]:
    """An alias is followed; a class is a class; what cannot be found is anything."""
    found = resolve(scope, annotation)
    if found is None or not found.known:
        yield from ANY
    elif isinstance(found.node, ast.ClassDef):
        above = " ".join(ast.unparse(base) for base in found.node.bases)
        if "TypedDict" in above:
            yield Kind("mapping")
        elif "Enum" in above or "Protocol" in above:
            yield from ANY
        else:
            yield Kind("class")
    elif isinstance(found.node, ast.Subscript | ast.BinOp | ast.Name | ast.Attribute):
        yield from kinds(found.node, found.module, depth + 1)
    else:
        yield from ANY


def _parse(text: str) -> ast.expr | None:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return None


def takes_mapping(alternatives: tuple[Kind, ...]) -> Kind | None:
    """The alternative that a mapping without `_target_` fits, or None."""
    return next((kind for kind in alternatives if kind.name in ("mapping", "any")), None)


def mismatch(value: Any, alternatives: tuple[Kind, ...], written: bool = False) -> str | None:
    """What the annotation asks for, in words, if a plain value does not fit; else None.

    Args:
        value: None, bool, int, float, str, or a list of such; an element that is a mapping passes.
        written: the value goes through OmegaConf's typed fields, which take "5" for 5, instead of
            straight to a function. They take 5 for "5" too, but 1_0 would become "10".
    """
    if any(_fits(value, kind, written) for kind in alternatives):
        return None
    return describe(alternatives)


def _fits(value: Any, kind: Kind, written: bool) -> bool:
    if kind.name in ("any", "class"):
        return True
    if isinstance(value, dict):
        return kind.name == "mapping"
    if value is None:
        return kind.name == "none"
    if isinstance(value, list):
        inside = kinds(kind.inner, kind.scope)
        return kind.name == "sequence" and all(
            isinstance(item, dict) or any(_fits(item, inner, written) for inner in inside)
            for item in value
        )
    if kind.name == "literal":
        return any(value == allowed and type(value) is type(allowed) for allowed in kind.values)
    if kind.name == "bool":
        return (
            isinstance(value, bool)
            or (is_int(value) and value in (0, 1))
            or (written and _reads_as(value, "bool"))
        )
    if kind.name == "int":
        return is_int(value) or (written and _reads_as(value, "int"))
    if kind.name == "float":
        return is_int(value) or isinstance(value, float) or (written and _reads_as(value, "float"))
    if kind.name == "str":
        return isinstance(value, str)
    return False


def is_int(value: Any) -> bool:
    """An int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _reads_as(value: Any, kind: str) -> bool:
    if not isinstance(value, str):
        return False
    if kind == "bool":
        return value.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0")
    try:
        int(value) if kind == "int" else float(value)
    except ValueError:
        return False
    return True


def describe(alternatives: tuple[Kind, ...]) -> str:
    """The alternatives in words: "an int or null", "one of 16, 32, bf16", "a list"."""
    words: list[str] = []
    word: str | None
    choices = [value for kind in alternatives for value in kind.values]
    for kind in alternatives:
        if kind.name == "sequence":
            inner = {part.name for part in kinds(kind.inner, kind.scope)} - {"any", "class"}
            of = {"int": " of ints", "float": " of numbers", "str": " of texts"}
            word = "a list" + (of.get(inner.pop(), "") if len(inner) == 1 else "")
        elif kind.name == "literal":
            word = "one of " + ", ".join(dict.fromkeys(map(str, choices)))
        else:
            word = SCALARS.get(kind.name, OTHERS.get(kind.name))
        if word and word not in words:
            words.append(word)
    words.sort(key=lambda word: word == "null")
    return " or ".join(words)


def remedy(value: Any, alternatives: tuple[Kind, ...]) -> str:
    """How the value would have to be written to fit, or ""."""
    names = {kind.name for kind in alternatives}
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 and "int" in names:
        return f"write {int(value)}"
    if isinstance(value, str) and "sequence" in names:
        return f"write [{value}]"
    if isinstance(value, str) and {"int", "float"} & names and _reads_as(value, "float"):
        return f"write {value} without quotes"
    return ""
