"""Errors that a user can fix: the message names the field, its value and the fix.

Whatever a file contains, its reader raises a single type:

- CheckpointError: what a training run, a search or a comparison saved: weights, states, deltas, positions in streams,
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
        arguments: the names of the Python arguments in the message that fix the error; the command line shows them as
            flags.
    """

    arguments: tuple[str, ...]

    def __init__(self, message: str = "", *, arguments: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.arguments = arguments


class AnatomyError(Error):
    """The model's head or blocks cannot be determined; the message names the argument that sets them."""


class CheckpointError(Error):
    """A file that is missing, damaged, or belongs to something else. The message names it and the fix."""


class DataError(Error):
    """Data that cannot be read or do not fit. The message names the place in the data, or the argument to set."""


class OptionError(Error):
    """A value that cannot work. The message names the field, the value and the fix."""


class HubError(Error):
    """An upload to the Hub that failed. Nothing is lost: the message names the folder and says how to continue."""


class MachineError(Error):
    """This machine ran out of disk space or memory. No result is affected: the same call continues later."""


@contextmanager
def accepted(what: str) -> Iterator[None]:
    """Name what a library refuses to create from the user's values.

    Raises:
        OptionError: in place of the library's ``TypeError`` or ``ValueError``.
    """
    try:
        yield
    except Error:
        raise
    except (TypeError, ValueError) as error:
        raise OptionError(f"{what} cannot be created from the training arguments: {error}. Correct them.") from error


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name, with the closest match and all known names."""
    known = list(known)
    return f"unknown {what} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the closest match, after a space; empty if nothing is close."""
    guess = get_close_matches(name, list(known), n=1)
    return f" Did you mean {guess[0]!r}?" if guess else ""
