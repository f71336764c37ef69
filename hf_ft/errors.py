"""Errors that name the field, its value and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AnatomyError(ValueError):
    """The model's head or blocks cannot be found; the message names the argument that specifies them."""


class CheckpointError(ValueError):
    """A file is missing, damaged, or belongs to something else. The message names it and the fix."""


class OptionError(ValueError):
    """An invalid value. The message names the field, the value and the fix."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name, with the closest match and all known names."""
    known = list(known)
    guess = get_close_matches(name, known, n=1)
    hint = f" Did you mean {guess[0]!r}?" if guess else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}."
