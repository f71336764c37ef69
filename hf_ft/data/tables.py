"""How tables of comma separated values are read: their separator, encoding, and what counts as missing."""

from __future__ import annotations

import codecs
import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_ft.data.field_types import FieldTypes
from hf_ft.errors import DataError

TABLES = (".csv", ".tsv")
SEPARATORS = (",", ";", "\t", "|")
READ = 2**20  # bytes decoded at a time


def table_options(file: Path, encoding: str | None = None) -> dict[str, Any]:
    """Options of pandas' reader, and the types of columns as ``features``.

    Only an empty field is missing: words such as "None" or "NA" are classes or texts.

    Args:
        encoding: by default UTF-8.

    Raises:
        DataError: if the file has another encoding, or is not a table; the message names the place.
    """
    _check_encoding(file, encoding or "utf-8")
    known = encoding or "utf-8-sig"  # without the byte order mark that some programs write at the beginning
    separator = "\t" if file.suffix.lower() == ".tsv" else _separator(file, known)
    types = _checked_types(file, separator, known)
    return {
        "features": types,
        "sep": separator,
        "keep_default_na": False,
        "na_values": [""],
        "encoding": encoding,
        "index_col": False,  # otherwise rows of one field more than the header would lose their first
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
            opened.seek(0)
            marked = opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            raise DataError(
                f"{str(file)!r} is not {encoding}: line {line} has the byte 0x{error.object[error.start]:02x}. Set "
                f"encoding, such as {repr('utf-16') if marked else repr('latin-1') + ' or ' + repr('cp1252')}",
                arguments=("encoding",),
            ) from error


def _separator(file: Path, encoding: str) -> str:
    """The separator that occurs in the first line, outside of quotes; a comma if several do."""
    with file.open(encoding=encoding) as opened:
        header = re.sub(r'"[^"]*"', "", opened.readline())
    return next((separator for separator in SEPARATORS if separator in header), ",")


def _checked_types(file: Path, separator: str, encoding: str) -> dict[str, str]:
    """The types of the columns by name.

    What pandas would misread is refused: fields without a column, quotes that enclose whole rows.

    Raises:
        DataError: naming the line.
    """
    records = _records(file, separator, encoding)
    _, header = next(records, (0, []))
    if not header:
        raise DataError(f"{str(file)!r} is empty: its first line must name the columns")
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise DataError(f"{str(file)!r} has several columns {twice[0]!r}: rename or remove all but one")
    types, line = FieldTypes(len(header)), 0
    for line, record in records:
        types.see(record)
        if any(record[len(header) :]):
            raise DataError(
                f"{str(file)!r}: line {line} has {len(record)} fields, but the first line names {len(header)} columns: "
                f"enclose fields that contain {separator!r} in quotes"
            )
    if not line:
        raise DataError(f"{str(file)!r} has no rows, only column names")
    return types.named(header)


def _records(file: Path, separator: str, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each non-blank record, and the line on which it begins."""
    limit = csv.field_size_limit(sys.maxsize)
    line = 1
    try:
        with file.open(encoding=encoding, newline="") as opened:
            reader = csv.reader(opened, delimiter=separator, strict=True)
            for record in reader:
                if record:
                    yield line, record
                line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{str(file)!r}: line {line}: the opening quote of a field is not closed at its end ({error}): double the "
            "quotes within fields, and enclose such fields in quotes"
        ) from error
    finally:
        csv.field_size_limit(limit)
