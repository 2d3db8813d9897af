"""The docstrings of installed Python sources, read with `ast`: nothing is imported or run."""

from __future__ import annotations

import ast
import gc
import multiprocessing
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from caravan.distributed import cores

STDLIB = "stdlib"
BLOCK = 128  # files that a process is sent at once
LEFT_OUT = {
    "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip",
    "site-packages", "dist-packages",
    "_vendor", "_vendored", "vendored",  # copies of other distributions
}  # fmt: skip
TEST_FILE = re.compile(r"(test_.*|.*_test|conftest|setup)\.py")

Docstrings = list[tuple[str, str]]
"""(qualified name, docstring): `module:` is the module's own, `module:Class.method` a method's."""


@dataclass
class Sources:
    """Files to read: `files[module] = path`, and what they come from."""

    files: dict[str, Path] = field(default_factory=dict)  # stdlib first, then by module
    versions: dict[str, str] = field(default_factory=dict)  # of each distribution, and of Python
    missing: list[str] = field(default_factory=list)  # distributions that are not installed


def installed_sources(packages: Iterable[str]) -> Sources:
    """The Python files of `packages`: distribution names, or "stdlib".

    Tests and vendored copies are left out. The result does not depend on where they lie.
    """
    names = {_plain(name) for name in packages}
    found = Sources()
    if STDLIB in names:
        found.versions["python"] = sys.version.split()[0]
        found.files |= _modules(_stdlib_files())
    other: dict[str, Path] = {}
    for name in sorted(names - {STDLIB}):
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found.missing.append(name)
            continue
        found.versions[name] = dist.version
        listed = ((file.as_posix(), Path(str(dist.locate_file(file)))) for file in dist.files or ())
        for module, path in _modules(listed).items():
            if module not in found.files:
                other.setdefault(module, path)
    found.files |= dict(sorted(other.items()))
    return found


def required_by(roots: Iterable[str]) -> set[str]:
    """`roots` and everything they require on this machine, extras they ask for included."""
    from packaging.requirements import Requirement

    seen: set[tuple[str, str]] = set()
    todo = [(_plain(name), "") for name in roots]
    while todo:
        name, extra = item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(_plain(needed.name), wanted) for wanted in ("", *needed.extras)]
    return {name for name, _ in seen}


def read(files: Iterable[tuple[str, Path]]) -> Iterator[Docstrings]:
    """The docstrings of each (module, path); none of a file that this Python cannot parse."""
    # A worker runs no code of the caller, so that it may be a fork of a process with threads.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(8, cores()), context, initializer=_prepare) as pool:
        yield from pool.map(_read, files, chunksize=BLOCK)


def _prepare() -> None:
    warnings.simplefilter("ignore")  # invalid escapes in other people's strings
    gc.disable()  # a tree has no cycles worth looking for, and looking takes a third of the time


def _read(file: tuple[str, Path]) -> Docstrings:
    module, path = file
    try:
        return docstrings(path.read_bytes(), module)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return []


def docstrings(source: bytes, module: str) -> Docstrings:
    """The docstrings of one file, indentation removed; functions inside functions left out.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: as `ast.parse`.

    >>> docstrings(b'class A:\\n  def b(self):\\n    "Do it."', "m")
    [('m:A.b', 'Do it.')]
    """
    found: dict[str, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                keep(child, prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                visit(child, prefix)

    def keep(
        node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
    ) -> None:
        text = ast.get_docstring(node)
        if text:  # of several definitions of one name the first counts
            found.setdefault(f"{module}:{name}", text.encode("utf-8", "replace").decode())

    tree = ast.parse(source)
    keep(tree, "")
    visit(tree, "")
    return list(found.items())


def _modules(files: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Module names of relative paths, tests and oddly named files left out, sorted."""
    modules = {}
    for relative, path in files:
        *folders, name = relative.split("/")
        if not name.endswith(".py") or TEST_FILE.fullmatch(name) or LEFT_OUT & set(folders):
            continue
        parts = [*folders, name.removesuffix(".py")]
        if all(part.isidentifier() for part in parts):
            if parts[-1] == "__init__" and folders:
                parts.pop()
            modules[".".join(parts)] = path
    return dict(sorted(modules.items()))


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in names:
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
