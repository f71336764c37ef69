"""One table, name <-> config class. The command line, the docs and the conformance tests read it."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

from hf_ft.errors import OptionError

if TYPE_CHECKING:
    from hf_ft.config import FTConfig

C = TypeVar("C", bound="type[FTConfig]")
_CONFIGS: dict[str, type[FTConfig]] = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a config known under ``name``, which becomes its ``ft_type``.

    Raises:
        ValueError: the name is taken by another class.
    """

    def add(config_class: C) -> C:
        known = _CONFIGS.get(name)
        if known is not None and known.__qualname__ != config_class.__qualname__:
            raise ValueError(f"strategy name {name!r} is taken by {known.__module__}.{known.__qualname__}.")
        config_class.ft_type = name
        _CONFIGS[name] = config_class
        return config_class

    return add


def strategies() -> dict[str, type[FTConfig]]:
    """All registered strategies, in the order of registration."""
    return dict(_CONFIGS)


def config_class(name: str) -> type[FTConfig]:
    """The config class of a registered name.

    Raises:
        OptionError: unknown name; the message lists the names there are.
    """
    if name in _CONFIGS:
        return _CONFIGS[name]
    guess = get_close_matches(name, _CONFIGS, n=1)
    hint = f" Did you mean {guess[0]!r}?" if guess else ""
    raise OptionError(f"unknown strategy {name!r}.{hint} Known: {', '.join(_CONFIGS)}.")
