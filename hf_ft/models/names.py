"""Names of modules and parameters, and the names they cover."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator


def matches(name: str, prefixes: Iterable[str]) -> bool:
    """Whether `name` is one of the modules `prefixes` or lies inside one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


# A module of a model with two paths: its gate and its frozen copy, which are not layers of the network.
BESIDE = "two_paths"

Names = tuple[str, ...]
EVERYTHING: Names = ("",)


def covers(prefix: str, name: str) -> bool:
    """Whether a module or parameter name covers a parameter name; ``""`` covers every name."""
    return prefix in ("", name) or name.startswith(prefix + ".")


def covered(name: str, prefixes: Collection[str]) -> bool:
    """Whether any of many module or parameter names, preferably a set, covers a parameter name."""
    return "" in prefixes or any(parent in prefixes for parent in parents(name))


def parents(name: str) -> Iterator[str]:
    """A name and those of the modules that contain it, without ``""``."""
    while name:
        yield name
        name = name.rpartition(".")[0]
