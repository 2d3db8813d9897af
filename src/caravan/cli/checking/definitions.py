"""Where a dotted name is_main_process, found in source files and never by importing.

To check a config means to know what `pytorch_lightning.Trainer` takes, and importing that takes
many seconds. So a module's file is found without importing its parents, parsed with `ast`, and
names are followed through re-exports, star imports and classes to their definition. Only what has
no Python source (builtins, C extensions) is imported; what the source does not tell (lazy modules,
names made at run time) is "unknown", and never called wrong.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

MAX_STEPS = 40
"""Re-exports followed from a name to its definition before giving up."""
MAX_STARS = 200
"""Files read to find a name behind star imports; after that it counts as unknown, not as wrong."""
STAR = re.compile(r"^\s*from (\.*)([\w.]*) import \*", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    """Where a dotted name leads: a module, a class, a function, an expression, or unknown."""

    module: str
    node: ast.AST | None = None  # None: the module itself
    known: bool = True  # False: it exists, but the source does not tell what it is


@dataclass(frozen=True)
class Import:
    """`from module import name`, or `import module` where name is None."""

    module: str
    name: str | None


@dataclass
class Module:
    """One parsed file: what its top level binds, and the modules it imports with a star."""

    name: str
    package: bool
    text: str
    bindings: dict[str, ast.AST | Import] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    @property
    def dynamic(self) -> bool:
        """Names may appear at run time: a module `__getattr__` or a lazy module."""
        return "__getattr__" in self.bindings or "sys.modules[__name__]" in self.text


class Live(ast.AST):
    """An object without Python source, imported because nothing else tells what it takes."""

    value: object


def did_you_mean(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name most like `word`, or None."""
    near = difflib.get_close_matches(word, list(names), 1, cutoff)
    return near[0] if near else None


def locate(target: str) -> Found:
    """Follow a dotted path to its definition, through modules, re-exports and classes."""
    parts = target.split(".")
    if not all(part.isidentifier() for part in parts):
        raise LookupError(f"{target!r} is no dotted path such as package.module.Class")
    if _source(parts[0]) is None:
        meant = did_you_mean(parts[0], _top_level_names(), cutoff=0.75)
        hint = f"; did you mean {'.'.join([meant, *parts[1:]])}?" if meant else ""
        raise LookupError(f"there is no module {parts[0]!r}{hint}")
    found = Found(parts[0])
    for i, part in enumerate(parts[1:], start=1):
        if not found.known:
            return found
        inner = _member(found, part)
        more = i < len(parts) - 1
        if inner is None or (more and not inner.known and _is_no_module(found, part)):
            where = ".".join(parts[:i])
            meant = did_you_mean(part, _names_in(found))
            hint = f"; did you mean {where}.{meant}?" if meant else ""
            raise LookupError(f"there is no {part!r} in {where}{hint}")
        found = inner
    return found


def _is_no_module(found: Found, name: str) -> bool:
    """Whether `name`, with more after it, has to be a submodule of a package and is none.

    A lazy package (caravan, transformers) may define any class at run time, but its submodules are
    files, and submodules are what names in lower case before the last one are.
    """
    module = _module(found.module) if found.node is None else None
    if module is None or not module.package or not name.islower() or name in module.bindings:
        return False
    return _source(f"{found.module}.{name}") is None


def resolve(scope: str, expression: ast.expr) -> Found | None:
    """The definition of a name (`Name` or `a.b.Name`) as it is seen inside module `scope`."""
    if isinstance(expression, ast.Name):
        return _lookup(scope, expression.id, MAX_STEPS)
    if isinstance(expression, ast.Attribute):
        owner = resolve(scope, expression.value)
        if owner is None or not owner.known:
            return owner
        return _member(owner, expression.attr)
    return None


def bases(found: Found) -> Iterator[Found | None]:
    """The base classes that may define arguments; None for one that cannot be found."""
    assert isinstance(found.node, ast.ClassDef)
    for base in found.node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        if ast.unparse(plain).rpartition(".")[2] in ("object", "ABC", "Generic", "Protocol"):
            continue
        yield resolve(found.module, plain)


# --- files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A module's file (None: no Python source) and, of a package, where its submodules are."""

    file: Path | None
    folders: tuple[str, ...] | None


_sources: dict[str, _Source] = {}


def _source(name: str) -> _Source | None:
    """Find a module without importing it or its parents; None where there is no such module."""
    known = _sources.get(name)
    if known is not None and (known.file is None or known.file.exists()):
        return known
    found = _find(name)
    if found is not None:
        _sources[name] = found
    return found


def _find(name: str) -> _Source | None:
    loaded = sys.modules.get(name)
    spec = getattr(loaded, "__spec__", None)
    if loaded is not None and spec is None:
        file = getattr(loaded, "__file__", None)
        return _Source(Path(file) if file else None, None)
    if spec is None:
        parent = name.rpartition(".")[0]
        path = None
        if parent:
            above = _source(parent)
            if above is None or above.folders is None:
                return None
            path = list(above.folders)
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path) if find else None
            if spec is not None:
                break
    if spec is None:
        return None
    places = spec.submodule_search_locations
    folders = None if places is None else tuple(getattr(places, "_path", places))
    is_source = bool(spec.origin) and str(spec.origin).endswith(".py")
    return _Source(Path(str(spec.origin)) if is_source else None, folders)


def _module(name: str) -> Module | None:
    """Parse a module; None where it has no Python source or one that does not parse."""
    source = _source(name)
    if source is None:
        return None
    if source.file is None:
        return Module(name, True, "") if source.folders else None
    return _parse(name, source.file, source.folders is not None, source.file.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _parse(name: str, file: Path, package: bool, changed_ns: int) -> Module | None:
    """Parse a file; `changed_ns` makes an edited file (a notebook's user edits) a new one."""
    try:
        text = file.read_text("utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return None
    module = Module(name, package, text)
    for statement in _statements(tree.body):
        _bind(module, statement)
    return module


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, with those inside if, try and with."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            yield from _statements(statement.body)
            yield from _statements(getattr(statement, "orelse", []))
            yield from _statements(getattr(statement, "finalbody", []))
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)


def _bind(module: Module, statement: ast.stmt) -> None:
    names = module.bindings
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        names[statement.name] = statement
    elif isinstance(statement, ast.ImportFrom):
        origin = _absolute(module.name, module.package, statement.level, statement.module or "")
        for alias in statement.names:
            if alias.name == "*":
                module.stars.append(origin)
            else:
                names.setdefault(alias.asname or alias.name, Import(origin, alias.name))
    elif isinstance(statement, ast.Import):
        for alias in statement.names:
            whole = alias.name if alias.asname else alias.name.partition(".")[0]
            names.setdefault(alias.asname or whole, Import(whole, None))
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Name):
                names.setdefault(target.id, statement.value)
            elif isinstance(target, ast.Tuple):
                for item in target.elts:
                    if isinstance(item, ast.Name):
                        names.setdefault(item.id, ast.Tuple(elts=[], ctx=ast.Load()))
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        names.setdefault(statement.target.id, statement.value or statement.annotation)


def _absolute(name: str, package: bool, level: int, path: str) -> str:
    """The full name of `from <level dots><path> import`, as seen in module `name`."""
    if not level:
        return path
    parts = name.split(".")
    base = parts[: len(parts) - level + package]
    return ".".join([*base, path] if path else base)


# --- names --------------------------------------------------------------------------------------


def _member(found: Found, name: str) -> Found | None:
    """`name` inside a module or a class; None where it is not there."""
    if found.node is None:
        return _lookup(found.module, name, MAX_STEPS)
    if isinstance(found.node, ast.ClassDef):
        for statement in reversed(found.node.body):  # the last of several is not an overload
            if getattr(statement, "name", None) == name:
                return Found(found.module, statement)
        unknown = Found(found.module, known=False)
        for base in bases(found):
            inner = _member(base, name) if base is not None and base.known else unknown
            if inner is not None:
                return inner
        return None
    if isinstance(found.node, Live):
        return _live(found.module, getattr(found.node.value, name, None))
    return Found(found.module, known=False)


def _lookup(module_name: str, name: str, steps: int) -> Found | None:
    """`name` as bound in a module: defined, imported, a submodule, or behind a star import."""
    unknown = Found(module_name, known=False)
    if steps <= 0:
        return unknown
    module = _module(module_name)
    if module is None:
        return _import(module_name, name)
    bound = module.bindings.get(name)
    if isinstance(bound, Import):
        if bound.name is None:
            return Found(bound.module) if _source(bound.module) else unknown
        if bound.module == module_name and bound.name == name:
            submodule = f"{module_name}.{name}"
            return Found(submodule) if _source(submodule) else unknown
        if _source(bound.module) is None:
            return unknown
        return _lookup(bound.module, bound.name, steps - 1) or unknown
    if isinstance(bound, ast.Name | ast.Attribute):
        if isinstance(bound, ast.Name) and bound.id == name:
            return unknown
        return resolve(module_name, bound) or Found(module_name, bound)
    if bound is not None:
        return Found(module_name, bound)
    if module.package and _source(f"{module_name}.{name}") is not None:
        return Found(f"{module_name}.{name}")
    origin = _behind_stars(module, name)
    if origin is not None:
        return _lookup(origin, name, steps - 1) if origin else unknown
    return unknown if module.dynamic else None


def _behind_stars(module: Module, name: str) -> str | None:
    """The module, reached by star imports alone, that binds `name`; "" if the search gave up.

    Packages such as transformers reach a thousand files by stars, so files are read as text, those
    named like `name` first, and only one that holds the word is parsed.
    """
    word = re.compile(rf"\b{name}\b")
    queue, seen = list(module.stars), {module.name}
    while queue:
        if len(seen) > MAX_STARS:
            return ""
        queue.sort(key=lambda star: not any(p in name.lower() for p in re.split("[._]", star)))
        star = queue.pop(0)
        source = _source(star) if star not in seen else None
        seen.add(star)
        if source is None or source.file is None:
            continue
        text = source.file.read_text("utf-8", errors="replace")
        behind = _module(star) if word.search(text) else None
        if behind is not None and name in behind.bindings:
            return star
        package = source.folders is not None
        for level, path in STAR.findall(text):
            queue.append(_absolute(star, package, len(level), path))
    return None


def _names_in(found: Found) -> list[str]:
    """The public names of a module (with its submodules) or of a class, for "did you mean"."""
    if isinstance(found.node, ast.ClassDef):
        own = [statement.name for statement in found.node.body if hasattr(statement, "name")]
        return [*own, *(name for base in bases(found) if base for name in _names_in(base))]
    module, source = _module(found.module), _source(found.module)
    names = set(module.bindings) if module else set(dir(sys.modules.get(found.module)))
    names |= set(_modules_in((source.folders or ()) if source else ()))
    return sorted(name for name in names if not name.startswith("_"))


def _modules_in(folders: Iterable[str]) -> Iterator[str]:
    for folder in folders:
        if os.path.isdir(folder):
            for entry in os.listdir(folder):
                name = entry.removesuffix(".py")
                if name.isidentifier():
                    yield name


def _top_level_names() -> set[str]:
    return set(_modules_in(path or "." for path in sys.path)) | set(sys.stdlib_module_names)


def _import(module_name: str, name: str) -> Found | None:
    """Import a module without Python source and take `name` from it."""
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise LookupError(f"{module_name} cannot be imported: {error}") from error
    return _live(module_name, getattr(module, name, None))


def _live(module_name: str, value: object) -> Found | None:
    if value is None:
        return None
    node = Live()
    node.value = value
    return Found(module_name, node)
