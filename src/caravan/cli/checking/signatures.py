"""What a `_target_` takes: its arguments, read from its source and never by importing it.

A function, a class (the nearest `__init__` among its bases, or a dataclass's fields), a method or
classmethod. `**kwargs` makes a signature open: any further argument may be right.

    signature("pytorch_lightning.Trainer").parameters["max_steps"].annotation
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass, field

from caravan.cli.checking.definitions import Found, Live, bases, locate

SOME = ast.Constant(...)
"""A default that is there, though its source is not."""


@dataclass(frozen=True)
class Parameter:
    """One argument that can be given by name."""

    name: str
    annotation: ast.expr | None
    scope: str  # the module in which the annotation is to be read
    default: ast.expr | None  # None: it must be given

    @property
    def required(self) -> bool:
        return self.default is None

    @property
    def takes_none(self) -> bool:
        """`x: int = None` takes None, whatever its annotation says."""
        return isinstance(self.default, ast.Constant) and self.default.value is None


@dataclass(frozen=True)
class Signature:
    """The arguments of a function, class or classmethod; `open` where **kwargs takes more."""

    target: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False


def signature(target: str) -> Signature:
    """The arguments that `target`, a dotted path as in `_target_`, can be given.

    Raises:
        LookupError: there is nothing of that name; the message says what might have been meant.
    """
    found = locate(target)
    if not found.known:
        return Signature(target, open=True)
    if found.node is None:
        raise LookupError(f"{target} is a module; name a class or a function in it")
    if isinstance(found.node, ast.ClassDef):
        return _of_class(target, found, set())
    if isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
        owner = _owner(target)
        bound = owner is not None and not _decorated(found.node, "staticmethod")
        return _of_function(target, found, found.node, skip_first=bound)
    if isinstance(found.node, Live):
        return _of_live(target, found.node)
    return Signature(target, open=True)


def _owner(target: str) -> Found | None:
    """The class that `target` is a method of, or None."""
    found = locate(target.rpartition(".")[0]) if target.count(".") > 1 else None
    return found if found is not None and isinstance(found.node, ast.ClassDef) else None


def _decorated(node: ast.AST, name: str) -> bool:
    for decorator in getattr(node, "decorator_list", []):
        plain = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(plain).rpartition(".")[2] == name:
            return True
    return False


def _of_function(
    target: str,
    found: Found,
    node: ast.FunctionDef | ast.AsyncFunctionDef,
    skip_first: bool,
) -> Signature:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    by_name = list(zip(positional, defaults, strict=True))[max(skip_first, len(args.posonlyargs)) :]
    by_name += zip(args.kwonlyargs, args.kw_defaults, strict=True)
    parameters = {}
    for arg, default in by_name:
        parameters[arg.arg] = Parameter(arg.arg, arg.annotation, found.module, default)
    return Signature(target, parameters, open=args.kwarg is not None)


def _of_class(target: str, found: Found, seen: set[int]) -> Signature:
    """The arguments of a class: its fields if it is a dataclass, else the nearest __init__."""
    node = found.node
    assert isinstance(node, ast.ClassDef)
    if id(node) in seen:
        return Signature(target, open=True)
    seen.add(id(node))
    if is_dataclass(node):
        # Another decorator, or a base that cannot be found, may add arguments.
        certain = len(node.decorator_list) == 1 and all(b and b.known for b in bases(found))
        return Signature(target, _fields(found), open=not certain)
    if any(ast.unparse(base).rpartition(".")[2] == "NamedTuple" for base in node.bases):
        return Signature(target, _fields(found))
    for name in ("__init__", "__new__"):
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                if _decorated(statement, "overload"):
                    continue
                return _of_function(target, found, statement, skip_first=True)
    for base in bases(found):
        if base is None or not base.known or not isinstance(base.node, ast.ClassDef):
            return Signature(target, open=True)
        inherited = _of_class(target, base, seen)
        if inherited.parameters or inherited.open:
            return inherited
    # No __init__ anywhere: a decorator (attrs') or a metaclass may make one.
    return Signature(target, open=bool(node.decorator_list or node.keywords))


def is_dataclass(node: ast.AST | None) -> bool:
    """Whether a class definition carries @dataclass."""
    return isinstance(node, ast.ClassDef) and _decorated(node, "dataclass")


def _fields(found: Found) -> dict[str, Parameter]:
    """The fields of a dataclass, those of its bases first."""
    parameters: dict[str, Parameter] = {}
    assert isinstance(found.node, ast.ClassDef)
    for base in bases(found):
        if base is not None and is_dataclass(base.node):
            parameters |= _fields(base)
    for statement in found.node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name, kind = statement.target.id, ast.unparse(statement.annotation)
        if "ClassVar" in kind or kind.rpartition(".")[2] == "KW_ONLY":
            continue
        default = statement.value
        if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
            given = {keyword.arg: keyword.value for keyword in default.keywords}
            init = given.get("init")
            if isinstance(init, ast.Constant) and init.value is False:
                continue
            default = given.get("default") or given.get("default_factory")
        parameters[name] = Parameter(name, statement.annotation, found.module, default)
    return parameters


def _of_live(target: str, node: Live) -> Signature:
    try:
        live = inspect.signature(node.value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Signature(target, open=True)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {
        name: Parameter(
            name, None, "builtins", None if parameter.default is parameter.empty else SOME
        )
        for name, parameter in live.parameters.items()
        if parameter.kind in by_name
    }
    spare = any(p.kind is p.VAR_KEYWORD for p in live.parameters.values())
    return Signature(target, parameters, open=spare)
