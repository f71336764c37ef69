"""Errors that a user can mend: the message names the field, its value and the fix.

Whatever a file contains, its reader raises one type:

- CheckpointError: what a training, a search or a comparison saved: weights, states, deltas, positions in streams,
  ``results.json``, ``advice.json``, ``blocks.json``, ``swarm.json``; and the weights of a pretrained model.
- OptionError: what sets options: ``ft_config.json``, a YAML file, the config and processor of a pretrained model, the
  storage of a search.
- DataError: data sets and images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class Error(ValueError):
    """Base of the package's own errors.

    Attributes:
        arguments: the names of the Python arguments in the message that settle it; the command line shows them as
            flags.
    """

    arguments: tuple[str, ...]

    def __init__(self, message: str = "", *, arguments: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.arguments = arguments


class AnatomyError(Error):
    """The model's head or blocks cannot be told; the message names the argument that settles it."""


class CheckpointError(Error):
    """A file that is missing, damaged, or belongs to something else. The message names it and the fix."""


class DataError(Error):
    """Data that cannot be read, or do not fit. The message names the place in them, or the argument that settles it."""


class OptionError(Error):
    """A value that cannot work. The message names the field, the value and the fix."""


class HubError(Error):
    """An upload to the Hub that failed. Nothing is lost by it: the message names the folder and how to go on."""


class MachineError(Error):
    """The disk or the memory of this machine gave out. Nothing is decided by it: the same call goes on later."""


@contextmanager
def accepted(what: str) -> Iterator[None]:
    """Name what a library refuses to make from the user's values.

    Raises:
        OptionError: in place of the library's ``TypeError`` or ``ValueError``.
    """
    try:
        yield
    except Error:
        raise
    except (TypeError, ValueError) as error:
        raise OptionError(f"{what} cannot be made from the training arguments: {error}. Correct them.") from error


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name, with the closest match and all known names."""
    known = list(known)
    guess = get_close_matches(name, known, n=1)
    hint = f" Did you mean {guess[0]!r}?" if guess else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}."
