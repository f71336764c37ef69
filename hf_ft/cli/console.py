"""Console output shared by the commands: printing from the main process, notes and plain tables."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from hf_ft.errors import Error, OptionError


def rank() -> int:
    """The rank of this process under a launcher such as ``accelerate launch`` or torchrun."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def say(text: str = "", error: bool = False) -> None:
    """Print on the main process only; what nobody reads any more, as after ``| head``, is dropped."""
    if not is_main():
        return
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors, so that all errors are handled alike."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)

    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


def with_flags(text: str, arguments: Iterable[str]) -> str:
    """Convert the Python arguments in a message to flags; only the last occurrence of each, which states the fix."""
    for name in arguments:
        places = list(re.finditer(rf"(?<![\w-]){name}(?:='(\w+)')?(?!\w)", text))
        if places:
            place = places[-1]
            flag = f"--{name}" + (f" {place[1]}" if place[1] else "")
            text = text[: place.start()] + flag + text[place.end() :]
    return text


def one_line(error: BaseException) -> str:
    """The error message in one line; errors from outside hf_ft include their location for context."""
    text = " ".join(str(error).split()) or type(error).__name__
    frames = list(traceback.walk_tb(error.__traceback__))
    origin = frames[-1][0].f_globals.get("__name__", "") if frames else "hf_ft"
    if origin.partition(".")[0] != "hf_ft":
        return f"{text} ({type(error).__name__} in {origin}; --traceback shows more)"
    return with_flags(text, error.arguments) if isinstance(error, Error) else text


@contextmanager
def refusals() -> Iterator[None]:
    """Convert a bare ``ValueError`` of a library about the user's arguments to an OptionError.

    Raises:
        OptionError: in place of the ``ValueError``.
    """
    try:
        yield
    except Error:
        raise
    except ValueError as error:
        raise OptionError(one_line(error)) from error


def table(rows: Sequence[Sequence[object]], headers: Sequence[str] = (), indent: str = "") -> str:
    """Rows as aligned text; the last column is wrapped at the terminal width."""
    cells = [[str(cell) for cell in row] for row in ([headers] if headers else []) + list(rows)]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    hang = len(indent) + sum(width + 2 for width in widths)
    room = max(30, min(shutil.get_terminal_size((110, 24)).columns, 120) - hang)
    if headers:
        last = min(room, max(len(row[-1]) for row in cells))
        cells.insert(1, ["-" * width for width in (*widths, last)])
    lines = []
    for row in cells:
        wrapped = textwrap.wrap(row[-1], room, break_on_hyphens=False) or [""]
        start = indent + "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False))
        lines += [(start + wrapped[0]).rstrip(), *(" " * hang + line for line in wrapped[1:])]
    return "\n".join(lines)


def count(number: int) -> str:
    """A readable number of parameters: 3.5 M, 12.8 k, 640."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return str(number)
