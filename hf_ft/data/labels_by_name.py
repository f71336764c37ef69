"""Labels of a data set as numbered by a trained model's classes, matched by name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from difflib import get_close_matches
from typing import Any

from datasets import ClassLabel, Dataset, List, Value
from transformers.utils import logging

from hf_ft.data.class_names import plain
from hf_ft.data.columns import ProblemType, shown_columns, values_of
from hf_ft.errors import DataError

SHOWN = 5  # names in a message
_GENERIC = re.compile(r"LABEL_\d+")
logger = logging.get_logger(__name__)


def labels_by_name(split: Dataset, column: str, names: Sequence[str], problem_type: ProblemType) -> list[Any]:
    """The labels of a column: class numbers of the model, rows of zeros and ones (C,), or floats; None where missing.

    None, NaN, empty texts, and the negative numbers that hide a benchmark's test classes count as missing. A negative
    number is a class if the model has one of this name, as after training on -1 and 1.

    Args:
        names: the C class names of the model, in order. If Transformers made them up (``LABEL_0``), numbers count.

    Raises:
        DataError: if there is no such column, it holds something else, or a class that the model does not know.
    """
    if column not in split.column_names:
        raise DataError(
            f"there is no column {column!r}, only {shown_columns(split)}: set label_column", arguments=("label_column",)
        )
    values, feature = values_of(split, column), split.features[column]
    if problem_type == "regression":
        return [_number(value, column) for value in values]
    if problem_type == "multi_label_classification":
        return _multi_hot(values, feature, column, names)
    if not isinstance(feature, ClassLabel | Value) or "float" in getattr(feature, "dtype", ""):
        raise _of_another_kind(column, feature, "one class per row")
    known = set(map(plain, names))
    given = [_name(value, feature, known) for value in values]
    index = _index(names, feature, {name for name in given if name is not None})
    _check_known((name for name in given if name is not None), index, column, names)
    return [None if name is None else index[name] for name in given]


def _name(value: Any, feature: Any, known: Set[str]) -> str | None:
    """A label as text; None if it is missing."""
    if value is None or (isinstance(value, str) and not plain(value)):
        return None
    if isinstance(feature, ClassLabel):
        return None if value < 0 else plain(feature.names[value])
    hidden = isinstance(value, int) and value < 0 and str(value) not in known
    return None if hidden else plain(str(value))


def _index(names: Sequence[str], feature: Any, given: set[str]) -> Mapping[str, int]:
    """The number of each class by its name in the data."""
    index = {plain(name): number for number, name in enumerate(names)}
    if given <= set(index) or not all(_GENERIC.fullmatch(name) for name in names):
        return index
    theirs = list(map(plain, getattr(feature, "names", None) or map(str, range(len(names)))))
    if len(theirs) != len(names):
        return index
    logger.warning("the model has no names for its classes: those of the data are matched by their numbers.")
    return {name: number for number, name in enumerate(theirs)}


def _check_known(given: Any, index: Mapping[str, int], column: str, names: Sequence[str]) -> None:
    unknown = Counter(name for name in given if name not in index)
    if not unknown:
        return
    folded = {name.casefold(): name for name in index}
    shown = []
    for name, count in unknown.most_common(SHOWN):
        close = get_close_matches(name.casefold(), folded, n=1, cutoff=0.8)
        hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
        shown.append(f"{name!r} ({count:,} row{'s' if count > 1 else ''}{hint})")
    raise DataError(
        f"column {column!r} has classes that the model does not know: {', '.join(shown)}"
        f"{_more(len(unknown))}. It knows {', '.join(names[:SHOWN])}{_more(len(names))}: rename them, leave these rows "
        "out, or set label_column",
        arguments=("label_column",),
    )


def _more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""


def _multi_hot(values: Sequence[Any], feature: Any, column: str, names: Sequence[str]) -> list[list[float] | None]:
    if not isinstance(feature, List) or not isinstance(feature.feature, ClassLabel | Value):
        raise _of_another_kind(column, feature, "a list of classes per row")
    inner, classes = feature.feature, len(names)
    if all(row is None or (len(row) == classes and all(value in (0, 1) for value in row)) for row in values):
        return [None if row is None else [float(value) for value in row] for row in values]
    known = set(map(plain, names))
    rows = [None if row is None else [_name(value, inner, known) for value in row] for row in values]
    given = [name for row in rows for name in row or () if name is not None]
    index = _index(names, inner, set(given))
    _check_known(given, index, column, names)
    numbers = [None if row is None else {index[name] for name in row if name is not None} for row in rows]
    return [None if some is None else [float(number in some) for number in range(classes)] for some in numbers]


def _number(value: Any, column: str) -> float | None:
    if isinstance(value, str | list):
        raise DataError(
            f"column {column!r} holds {value!r}, but the model predicts a number: set label_column",
            arguments=("label_column",),
        )
    return None if value is None or math.isnan(value) else float(value)


def _of_another_kind(column: str, feature: Any, wanted: str) -> DataError:
    kind = feature.dtype if isinstance(feature, Value) else feature
    return DataError(
        f"column {column!r} is of type {kind}, but the model was trained for {wanted}: set label_column",
        arguments=("label_column",),
    )
