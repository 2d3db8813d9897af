"""What a `_target_` takes: its object is imported, and its signature becomes a pydantic model."""

from __future__ import annotations

import collections.abc
import difflib
import functools
import importlib
import inspect
import pkgutil
import sys
import types
from collections.abc import Hashable, Iterable
from enum import Enum
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict
from pydantic_core import SchemaError

from caravan.cli.schema import As, Valid
from caravan.errors import first_line

RESERVED = {
    "_target_": str,
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["none", "partial", "object", "all"],
    "_args_": list[Any],
}
UNRESOLVABLE = (
    NameError,
    AttributeError,
    TypeError,
    SyntaxError,
    SchemaError,
    pydantic.PydanticUserError,
)
"""What an annotation raises that only a type checker can read; its argument may be anything."""


class Takes(NamedTuple):
    """The arguments of a function or class, or the keys of a section."""

    model: type[BaseModel] | None = None  # None: any arguments
    hints: dict[str, Any] = {}  # noqa: RUF012


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name most like `word`, or None."""
    near = difflib.get_close_matches(word, list(names), 1, cutoff)
    return near[0] if near else None


def locate(target: str) -> Any:
    """The object that a dotted path names; its modules are imported.

    Raises:
        LookupError: with the part that is missing, and a similar name.
    """
    parts = target.split(".")
    if not all(part.isidentifier() for part in parts):
        raise LookupError(f"{target!r} is not a dotted path such as package.module.Class")
    found: Any = None
    for end, part in enumerate(parts, start=1):
        above, path = found, ".".join(parts[:end])
        found = None if above is None else getattr(above, part, None)
        if found is None and (above is None or isinstance(above, types.ModuleType)):
            found = _imported(path)
        if found is None:
            names = _names_in(above)
            near = did_you_mean(part, names, cutoff=0.6 if above else 0.75)
            meant = ".".join([*parts[: end - 1], near or "", *([] if above else parts[1:])])
            where = f" in {'.'.join(parts[: end - 1])}" if above else ""
            hint = f"; did you mean {meant}?" if near else ""
            raise LookupError(f"there is no {part!r}{where}{hint}")
    if not callable(found):
        what = "a module" if isinstance(found, types.ModuleType) else "not callable"
        raise LookupError(f"{target} is {what}; name a class or a function")
    return found


def _imported(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{path}.".startswith(f"{error.name}."):
            return None
        raise LookupError(f"{path} cannot be imported: {first_line(error)}") from error
    except Exception as error:  # of the code of a module
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise LookupError(f"{path} cannot be imported: {reason}") from error


def _names_in(above: Any) -> list[str]:
    if above is None:
        return [*(one.name for one in pkgutil.iter_modules()), *sys.stdlib_module_names]
    inside = pkgutil.iter_modules(getattr(above, "__path__", ()))
    return [name for name in (*dir(above), *(one.name for one in inside)) if name[0] != "_"]


def takes(target: Any, section: bool = False) -> Takes:
    """The arguments of a target of Hydra, or the keys of a dataclass that is a section."""
    return _takes(target, section) if isinstance(target, Hashable) else Takes()


@functools.cache
def _takes(target: Any, section: bool) -> Takes:
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):  # some of C have none
        return Takes()
    function = target
    for kind in inspect.getmro(target) if isinstance(target, type) else ():
        function = vars(kind).get("__init__") or vars(kind).get("__new__")
        if function is not None:
            break
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    config = ConfigDict(arbitrary_types_allowed=True, strict=not section, extra="forbid")
    hints: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            config["extra"] = "allow"
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            hint = hints[name] = _resolved(parameter.annotation, scope, config)
            required = section or parameter.default is parameter.empty
            takes_none = parameter.default is None  # `x: int = None`, as libraries write it
            # An alias, since an argument may have a name that a field may not have.
            fields[f"field_{len(fields)}"] = (
                hint | None if takes_none else hint,
                Field(alias=name) if required else Field(default=None, alias=name),
            )
    for name, hint in {} if section else RESERVED.items():
        fields[f"field{name}"] = (hint, Field(default=None, alias=name))
    return Takes(pydantic.create_model("Arguments", __config__=config, **fields), hints)


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
        marker = next((one for one in hint.__metadata__ if isinstance(one, As)), None)
        if marker is not None:
            return _of_yaml(marker.type)
        checks = (
            AfterValidator(one.check) if isinstance(one, Valid) else one
            for one in hint.__metadata__
        )
        return Annotated[_of_yaml(arguments[0]), *checks]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_of_yaml, arguments))]  # noqa: UP007
    if origin in (dict, list, collections.abc.Mapping, collections.abc.Sequence):
        return origin[tuple(map(_of_yaml, arguments))]
    if origin in (collections.abc.Iterable, collections.abc.Collection):
        return collections.abc.Sequence[_of_yaml(arguments[0])]  # type: ignore[misc]
    if origin in (tuple, set, frozenset):
        inner = tuple(one if one is ... else _of_yaml(one) for one in arguments)
        return Annotated[origin[inner], Strict(False)]
    if isinstance(hint, type) and origin is None:
        if issubclass(hint, PurePath | Enum | tuple | set | frozenset):
            return Annotated[hint, Strict(False)]
        if getattr(hint, "_is_protocol", False):
            return Any
    return hint
