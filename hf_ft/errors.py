"""Errors that name the field, its value and the fix."""

from __future__ import annotations


class AnatomyError(ValueError):
    """The model's head or blocks cannot be told; the message names the argument that settles it."""


class CheckpointError(ValueError):
    """A file that is missing, damaged, or belongs to something else. The message names it and the fix."""


class OptionError(ValueError):
    """A value that cannot work. The message names the field, the value and the fix."""
