"""The types of the columns of a csv file, from all of its fields.

pandas would look at 10,000 rows at a time, so that a word in a later row is an error; it would also read ``001`` as the
number 1, and 20 digits as a number close to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MISSING = ""
# In order: a column has the first type that fits all of its fields.
PATTERNS = {
    "int64": re.compile(r"\s*[+-]?(0|[1-9]\d{0,17})\s*"),
    "float64": re.compile(r"\s*[+-]?(?=\.?\d)(0|[1-9]\d{0,17})?(\.\d*)?([eE][+-]?\d+)?\s*"),
    "bool": re.compile(r"True|TRUE|true|False|FALSE|false"),
    "string": re.compile(r".*", re.DOTALL),
}
WITHOUT_MISSING = {"int64": "float64", "bool": "string"}  # what pandas can mix with missing fields


class FieldTypes:
    """The types of columns, while their records are read."""

    def __init__(self, columns: int) -> None:
        self._possible = [list(PATTERNS) for _ in range(columns)]
        self._missing = [False] * columns

    def see(self, record: Sequence[str]) -> None:
        """Narrow the types with another record, which may be too short."""
        for column, possible in enumerate(self._possible):
            field = record[column] if column < len(record) else MISSING
            if field == MISSING:
                self._missing[column] = True
            elif len(possible) > 1:
                possible[:] = [kind for kind in possible if PATTERNS[kind].fullmatch(field)]

    def named(self, header: Iterable[str]) -> dict[str, str]:
        """The type of each column by the name that pandas gives it."""
        types = {}
        for column, name in enumerate(header):
            kind = self._possible[column][0]
            kind = WITHOUT_MISSING.get(kind, kind) if self._missing[column] else kind
            types[name or f"Unnamed: {column}"] = kind
        return types
