"""How tables of comma separated values are read: their separator, encoding, and what counts as missing."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

from hf_ft.errors import DataError

TABLES = (".csv", ".tsv")
SEPARATORS = (",", ";", "\t", "|")
READ = 2**20  # bytes decoded at a time


def table_options(file: Path, encoding: str | None = None) -> dict[str, Any]:
    """Options of pandas' reader. Only an empty field is missing: words such as "None" or "NA" are classes or texts.

    Args:
        encoding: by default UTF-8.

    Raises:
        DataError: if the file has another encoding; the message names the place.
    """
    _check_encoding(file, encoding or "utf-8")
    return {
        "sep": "\t" if file.suffix.lower() == ".tsv" else _separator(file, encoding or "utf-8"),
        "keep_default_na": False,
        "na_values": [""],
        "encoding": encoding,
    }


def _check_encoding(file: Path, encoding: str) -> None:
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError as error:
        raise DataError(
            f"encoding={encoding!r} is unknown: set one such as 'utf-8' or 'latin-1'", arguments=("encoding",)
        ) from error
    with file.open("rb") as opened:
        line = 1
        try:
            while block := opened.read(READ):
                line += decoder.decode(block).count("\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line += bytes(error.object[: error.start]).count(b"\n")
            raise DataError(
                f"{str(file)!r} is not {encoding}: line {line} has the byte 0x{error.object[error.start]:02x}. Set "
                "encoding, such as 'latin-1' or 'cp1252'",
                arguments=("encoding",),
            ) from error


def _separator(file: Path, encoding: str) -> str:
    """The separator that occurs in the first line; a comma if several do."""
    with file.open(encoding=encoding) as opened:
        header = opened.readline()
    return next((separator for separator in SEPARATORS if separator in header), ",")
