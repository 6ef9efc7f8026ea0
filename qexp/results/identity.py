"""The code that a result depends on: the source of its classes and of what their modules import, versions of plugins.

Every name under which a run keeps something (a point, a float network and its score, calibration statistics) uses `code` of this module.

* A user's code, which lies outside `site-packages`: the module of each class involved, the packages it lies in, and all modules of the
  user's that these import, recursively. Comments, docstrings and layout do not change a name; every other edit does.
* A plugin in `site-packages` (timm, a package of quantizers): the version of its distribution.
* qexp itself: the modules of the classes involved, and what these import from their own folder. An edited quantizer renames only the
  points that use it: after a release or an unrelated edit of qexp, finished points stay finished. The row's column `commit`, not the
  name, records the rest of qexp.

The libraries that every run needs (torch, Lightning, NumPy, ...) are recorded in the row and in `environment.json`, not in names.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions, version
from pathlib import Path
from pydoc import locate
from types import CodeType, ModuleType
from typing import Any

EVERY_RUN = {
    *(
        "torch",
        "torchvision",
        "torchmetrics",
        "pytorch_lightning",
        "lightning",
        "lightning_utilities",
        "lightning_fabric",
        "hydra",
    ),
    *("omegaconf", "yaml", "pandas", "bokeh", "numpy", "scipy", "sklearn", "safetensors", "cloudpickle", "tqdm", "PIL"),
    *("setuptools", "typing_extensions", "packaging", "antlr4", "qexp_kernels"),
}
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
# Module and path -> the loaded module, the hash of its code, the modules it imports.
_read: dict[str, tuple[object, str, tuple[str, ...]]] = {}


def named(node: Any) -> Iterator[str]:
    """Yields the dotted names in a plain configuration: every `_target_`, and every other text that may name a class or a function."""
    if isinstance(node, dict):
        for value in node.values():
            yield from named(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from named(value)
    elif isinstance(node, str) and DOTTED.fullmatch(node):
        yield node


def code(things: Iterable[Any], owners: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """Returns what identifies the code of some things: the source hash of each module, the version of each distribution.

    Args:
        things: Classes, functions, objects (their classes), or dotted names of these; a name that does not exist adds nothing.
        owners: What `owners` returned for names in `things`; these are not imported.
    """
    found: dict[str, str] = {}
    known = owners or {}
    waiting = [
        name
        for thing in things
        for name in (known[thing] if isinstance(thing, str) and thing in known else _modules(thing, found))
    ]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        top = name.partition(".")[0]
        if top in EVERY_RUN or top in sys.stdlib_module_names:
            continue
        path = _file(name)
        if path is None:
            continue
        if top != "qexp" and {"site-packages", "dist-packages"} & set(path.parts):
            found |= _versions(top)
            continue
        digest, imported = _source(name, path)
        if name != "qexp":  # the top module imports every part
            found[name] = digest
            waiting += [other for other in imported if top != "qexp" or _beside(other, name, path)]
    return dict(sorted(found.items()))


def owners(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns, for each name in qexp, the modules that define it and its base classes; the modules of other names need no import."""
    return {name: _modules(name, {}) for name in names if name.startswith("qexp.")}


def digest(found: dict[str, str]) -> str:
    """Returns one short hash of what `code` returned."""
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]


def _modules(thing: Any, found: dict[str, str]) -> list[str]:
    """Returns the modules that define a thing; code without a file (in a notebook) goes directly into `found`."""
    if isinstance(thing, str):
        if not thing.startswith("qexp."):
            return list(_prefixes(thing))
        module, own = thing.rpartition(".")[0], _located(thing)
        named = _file(module)  # a module that may only re-export the class
        return [
            *([module] if named and named.name != "__init__.py" else []),
            *([] if own is None else _modules(own, found)),
        ]
    if isinstance(thing, ModuleType):
        return list(_prefixes(thing.__name__))
    if isinstance(thing, partial):
        return [name for part in (thing.func, *thing.args, *thing.keywords.values()) for name in _of(part, found)]
    return _of(inspect.unwrap(thing) if callable(thing) else thing, found)


def _of(thing: Any, found: dict[str, str]) -> list[str]:
    if isinstance(thing, type):
        owners = list(thing.__mro__)
    else:
        owners = [thing] if hasattr(thing, "__qualname__") else list(type(thing).__mro__)
    names = []
    for owner in owners:
        module = getattr(owner, "__module__", None)
        if not isinstance(module, str):
            continue
        names += _prefixes(module)
        if _file(module) is None and module.partition(".")[0] not in sys.stdlib_module_names - {"__main__"}:
            found[f"{module}.{owner.__qualname__}"] = _unfiled(owner)
    return names


@cache
def _located(name: str) -> Any:
    """Returns the object of a dotted name in qexp, also if a package only re-exports it; None if there is none."""
    try:
        return locate(name)
    except Exception:  # an extra that is not installed: the run itself raises the error
        return None


def _prefixes(name: str) -> Iterator[str]:
    """Yields `a`, `a.b`, `a.b.c` of `a.b.c`: since importing a module runs its packages. For qexp, yields the module alone."""
    parts = name.split(".")
    if parts[0] == "qexp":
        yield name
        return
    for i in range(len(parts)):
        yield ".".join(parts[: i + 1])


def _beside(other: str, name: str, path: Path) -> bool:
    """Returns whether a module of qexp lies in the same folder as `name`."""
    folder = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return other.rpartition(".")[0] == folder


def _file(name: str) -> Path | None:
    """Returns the file of a module, without importing it; None if it has no file or does not exist."""
    module = sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None) or getattr(getattr(module, "__spec__", None), "origin", None)
        return _present(file) if file else None
    spec = _spec(name)
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


@cache  # of a loaded module, whose code stays what it was when the file is removed
def _present(file: str) -> Path | None:
    path = Path(file)
    return path if path.is_file() else None


def _spec(name: str) -> Any:
    parent = name.rpartition(".")[0]
    try:
        if not parent:
            return importlib.util.find_spec(name)
        above = sys.modules.get(parent)
        where = getattr(above, "__path__", None) or getattr(_spec(parent), "submodule_search_locations", None)
        return PathFinder.find_spec(name, list(where)) if where else None
    except (ImportError, ValueError, AttributeError):
        return None


def _source(name: str, path: Path) -> tuple[str, tuple[str, ...]]:
    """Returns the hash of a module's code, and the names it imports; a module that is loaded counts as it was loaded.

    If a file is edited during a sweep, the sweep's points keep the name of the code that they ran.
    """
    loaded = getattr(sys.modules.get(name), "__spec__", None) or sys.modules.get(name)
    before = _read.get(f"{name} {path}")
    # Specs are equal too easily.
    if before is not None and loaded is not None and (before[0] is None or before[0] is loaded):
        found = (loaded, *before[1:])
    else:
        found = (loaded, *_parsed(name, path))
    _read[f"{name} {path}"] = found
    return found[1:]


def _parsed(name: str, path: Path) -> tuple[str, tuple[str, ...]]:
    content = path.read_bytes()
    try:
        tree = ast.parse(content)
        imported = tuple(_imports(tree, name if path.name == "__init__.py" else name.rpartition(".")[0]))
        content = ast.unparse(_bare(tree)).encode()
    except (SyntaxError, ValueError, RecursionError):  # a compiled module; for unreadable code, the run raises an error
        imported = ()
    return hashlib.sha256(content).hexdigest()[:16], imported


def _bare(tree: ast.Module) -> ast.Module:
    """Returns the tree without its docstrings, in place."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        is_owner = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_owner and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:] or [ast.Pass()]
    return tree


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Yields the modules that a module imports anywhere, and the packages they lie in; some of the names are not modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _prefixes(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from _prefixes(base)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield from _prefixes(node.args[0].value)


def _unfiled(owner: Any) -> str:
    """Returns the hash of a class or function without a file: of its source if a notebook keeps it, else of its bytecode."""
    try:
        text = inspect.getsource(owner)
    except (OSError, TypeError):
        members = vars(owner).values() if isinstance(owner, type) else [owner]
        codes = [getattr(getattr(m, "__func__", m), "__code__", None) for m in members]
        text = repr([_bytecode(c) for c in codes if c is not None])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bytecode(own: CodeType) -> list[Any]:
    constants = [_bytecode(c) if isinstance(c, CodeType) else repr(c) for c in own.co_consts]
    return [own.co_code.hex(), own.co_names, constants]


@cache
def _versions(top: str) -> dict[str, str]:
    """Returns the version of each distribution that provides a package, by its name."""
    return {name: version(name) for name in _distributions().get(top, ())}


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())
