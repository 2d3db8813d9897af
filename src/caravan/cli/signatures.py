"""What a `_target_` takes: its object is imported, and its signature becomes a pydantic model."""

from __future__ import annotations

import collections.abc
import difflib
import functools
import importlib
import inspect
import types
from collections.abc import Hashable, Iterable
from enum import Enum
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pydantic
from pydantic import BaseModel, ConfigDict, Field, Strict
from pydantic_core import SchemaError

from caravan.errors import first_line

RESERVED = {
    "_target_": str,
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["none", "partial", "object", "all"],
    "_args_": list[Any],
}
UNRESOLVABLE = (
    *(NameError, AttributeError, TypeError, SyntaxError),
    *(SchemaError, pydantic.PydanticUserError),
)
"""What an annotation raises that only a type checker can read; its argument may be anything."""
Takes = tuple[type[BaseModel] | None, dict[str, Any]]


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name most like `word`, or None."""
    near = difflib.get_close_matches(word, list(names), 1, cutoff)
    return near[0] if near else None


def locate(target: str) -> Any:
    """The object that a dotted path names; its modules are imported.

    Raises:
        LookupError: with a similar name.
    """
    place, _, name = target.rpartition(".")
    if not place:
        raise LookupError(f"{target!r} is not a dotted path such as package.module.Class")
    try:
        found = _found(target)
        names = [] if callable(found) else dir(_found(place))
    except Exception as error:  # of the code of a module
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise LookupError(f"{target} cannot be imported: {reason}") from error
    if callable(found):
        return found
    near = did_you_mean(name, [one for one in names if one[0] != "_"])
    hint = f"; did you mean {place}.{near}?" if near else ""
    raise LookupError(f"there is no class or function {target}{hint}")


def _found(path: str) -> Any:
    """A module, or an attribute of one; None if there is none."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise
    place, _, name = path.rpartition(".")
    return getattr(_found(place), name, None) if place else None


def takes(target: Any, node: bool = True) -> Takes:
    """A model of the arguments of a target, and their types by name; (None, {}) if unknown.

    Args:
        node: it may have Hydra's own keys too, such as `_partial_`.
    """
    return _takes(target, node) if isinstance(target, Hashable) else (None, {})


@functools.cache
def _takes(target: Any, node: bool) -> Takes:
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):  # some of C have none
        return None, {}
    function = target
    for kind in inspect.getmro(target) if isinstance(target, type) else ():
        function = vars(kind).get("__init__") or vars(kind).get("__new__")
        if function is not None:
            break
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    config = ConfigDict(arbitrary_types_allowed=True, strict=True, extra="forbid")
    hints: dict[str, Any] = {}
    # A field has an alias, since an argument may have a name that a field may not have.
    fields: dict[str, Any] = {
        f"field{name}": (hint, Field(default=None, alias=name))
        for name, hint in (RESERVED if node else {}).items()
    }
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            config["extra"] = "allow"
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            hint = hints[name] = _resolved(parameter.annotation, scope, config)
            if parameter.default is parameter.empty:
                fields[f"field_{len(fields)}"] = (hint, Field(alias=name))
            else:  # None is a value of `x: int = None`, as libraries write it
                hint = hint | None if parameter.default is None else hint
                fields[f"field_{len(fields)}"] = (hint, Field(default=None, alias=name))
    return pydantic.create_model("Arguments", __config__=config, **fields), hints


def _resolved(annotation: Any, scope: dict[str, Any], config: ConfigDict) -> Any:
    """An annotation in which pydantic can validate data of YAML; Any where it cannot be read."""
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        holder = types.SimpleNamespace(__annotations__={"it": annotation})
        hint = _of_yaml(get_type_hints(holder, scope, include_extras=True)["it"])
        pydantic.create_model("Probe", __config__=config, field=(hint, ...))
    except UNRESOLVABLE:
        return Any
    return hint


def _of_yaml(hint: Any) -> Any:
    """A type hint for data of YAML, which has lists for tuples and texts for paths."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[_of_yaml(arguments[0]), *arguments[1:]]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_of_yaml, arguments))]  # noqa: UP007
    if origin in (dict, list, collections.abc.Mapping, collections.abc.Sequence):
        return origin[tuple(map(_of_yaml, arguments))]
    if origin in (collections.abc.Iterable, collections.abc.Collection):
        return collections.abc.Sequence[_of_yaml(arguments[0])]  # type: ignore[misc]
    if origin in (tuple, set, frozenset):
        inner = tuple(one if one is ... else _of_yaml(one) for one in arguments)
        return Annotated[origin[inner], Strict(False)]
    loose = (PurePath, Enum, tuple, set, frozenset)
    if isinstance(hint, type) and origin is None and issubclass(hint, loose):
        return Annotated[hint, Strict(False)]
    return hint
