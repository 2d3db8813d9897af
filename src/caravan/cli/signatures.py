"""What a `_target_` takes: its object is imported, and its signature becomes a pydantic model."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, create_model
from pydantic_core import SchemaError

from caravan.errors import first_line

RESERVED = {
    "_target_": str,
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["none", "partial", "object", "all"],
    "_args_": list[Any],
}
"""Keys of a node that Hydra itself uses."""
UNRESOLVABLE = (NameError, AttributeError, TypeError, SyntaxError, SchemaError, PydanticUserError)
"""What an annotation raises that only a type checker can read; its argument may be anything."""


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name most like `word`, or None."""
    near = difflib.get_close_matches(word, list(names), 1, cutoff)
    return near[0] if near else None


def locate(target: str) -> Any:
    """Import the class or function that a dotted path names.

    Raises:
        LookupError: With a similar name, or why the import failed.
    """
    place, _, name = target.rpartition(".")
    try:
        found = _found(target)
        names = [] if callable(found) else dir(_found(place))
    except Exception as error:  # of the code of a module
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise LookupError(f"{target} cannot be imported: {reason}") from error
    if callable(found):
        return found
    near = did_you_mean(name, [one for one in names if one[0] != "_" and one != name])
    hint = f"; did you mean {place}.{near}?" if near else ""
    raise LookupError(f"there is no class or function {target!r}{hint}")


def _found(path: str) -> Any:
    """A module, or an attribute of one; None if there is none.

    `pydoc.locate` misses modules that Hydra has loaded as plugins.
    """
    place, _, name = path.rpartition(".")
    if not name:
        return None
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise
    return getattr(_found(place), name, None)


@functools.cache
def takes(target: Any) -> type[BaseModel] | None:
    """A model of the arguments of a class or function; None for some of C, which have no signature.

    It validates JSON in strict mode, whose types are those of YAML: a list is accepted for a tuple,
    and a text for a path or an enum, but no text for a number.
    """
    try:
        parameters = inspect.signature(target).parameters.values()
    except (ValueError, TypeError):
        return None
    maker = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    scope: dict[str, Any] = {}
    for base in reversed(getattr(target, "__mro__", ())):  # a dataclass inherits fields with hints
        scope |= getattr(sys.modules.get(base.__module__), "__dict__", {})
    scope |= getattr(inspect.unwrap(maker), "__globals__", {})
    config = ConfigDict(arbitrary_types_allowed=True, strict=True, extra="forbid")
    fields: dict[str, Any] = {name: (hint, None) for name, hint in RESERVED.items()}
    for one in parameters:
        if one.kind is one.VAR_KEYWORD:
            config["extra"] = "allow"
        elif one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD):
            hint = _resolved(one.annotation, scope, config)
            # None is a value of `x: int = None`, as libraries write it.
            hint = hint | None if one.default is None else hint
            fields[one.name] = (hint, ... if one.default is one.empty else None)
    # A field has an alias, because an argument may have a name that a field cannot have.
    aliased = {
        f"field_{name}": (hint, Field(default, alias=name))
        for name, (hint, default) in fields.items()
    }
    return create_model("Arguments", __config__=config, **aliased)  # type: ignore[call-overload]


def _resolved(annotation: Any, scope: dict[str, Any], config: ConfigDict) -> Any:
    """The type of an annotation; Any where it cannot be evaluated or is unknown to pydantic."""
    if annotation is inspect.Parameter.empty:
        return Any
    holder = SimpleNamespace(__annotations__={"it": annotation})
    try:
        hint = get_type_hints(holder, scope, include_extras=True)["it"]
        create_model("Probe", __config__=config, field=(hint, ...)).model_rebuild()
    except UNRESOLVABLE:
        return Any
    return hint


def takes_object(hint: Any) -> bool:
    """Whether a type is that of objects with fields (dataclasses, models), and not of mappings."""
    kinds = list(_members(hint))
    if any(kind is Any or issubclass(kind, Mapping) for kind in kinds):
        return False
    return any(is_dataclass(kind) or issubclass(kind, BaseModel) for kind in kinds)


def _members(hint: Any) -> Iterator[Any]:
    """The classes, and `Any`, in a type: of `list[A | None]` those of list, A and None."""
    origin = get_origin(hint) or hint
    if origin is Any or isinstance(origin, type):
        yield origin
    for one in get_args(hint):
        yield from _members(one)
