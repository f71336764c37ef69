"""Public names of a package that are imported when they are first used (PEP 562).

A package declares them once, as type checkers read them: ``from MODULE import NAME as NAME`` under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def declared(package: str) -> dict[str, str]:
    """The names that a package re-exports, and the module of each; the package itself is not imported."""
    spec = find_spec(package)
    source = getattr(spec.loader, "get_source")(package) if spec else None  # noqa: B009, not in the type of a loader
    if source is None:
        raise ImportError(f"the source of {package} is needed to find its public names.", name=package)
    names: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        for alias in node.names:
            if alias.name == "*":
                names |= declared(node.module)
            elif alias.name == alias.asname:
                names[alias.name] = node.module
    return names


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package."""
    names = declared(package)

    def get(name: str) -> Any:
        home = names.get(name, package)
        if home != package:
            value = getattr(importlib.import_module(home), name)
            setattr(sys.modules[package], name, value)  # from now on, it is found without this function
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}"):
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return get, names_of, sorted(name for name in names if not name.startswith("_"))
