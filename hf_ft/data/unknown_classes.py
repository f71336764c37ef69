"""Classes that occur in validation or test, but not in training, so that they cannot be learned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

from datasets import ClassLabel, Dataset, Value
from transformers.utils import logging

from hf_ft.errors import DataError

logger = logging.get_logger(__name__)
OnUnknown = Literal["refuse", "drop"]
SHOWN = 5  # classes named in a message


def is_missing(value: Any, hidden: bool) -> bool:
    """Whether a stored label is missing: None, NaN, or the -1 that hides a benchmark's test classes.

    Args:
        hidden: whether negative numbers are not classes.
    """
    return value is None or (isinstance(value, float) and math.isnan(value)) or (hidden and _negative(value))


def hides_labels(feature: Any, train: Sequence[Any]) -> bool:
    """Whether negative numbers in this column are not classes: there are none in training."""
    integers = isinstance(feature, Value) and "int" in feature.dtype
    return isinstance(feature, ClassLabel) or (integers and not any(map(_negative, train)))


def _negative(value: Any) -> bool:
    return isinstance(value, int) and value < 0


def check_known(
    name: str, values: Sequence[Any], train: Sequence[Any], hidden: bool, names: Sequence[str] = ()
) -> None:
    """Check that all classes of a split occur in training.

    Args:
        name: the split.
        values: its labels.
        train: the labels of the training split.
        names: class names, if labels are class numbers.

    Raises:
        DataError: naming the others, with their numbers of rows.
    """
    unknown = _unknown(values, train, hidden)
    if unknown:
        raise DataError(
            f"split {name!r} has classes that no training row has: {_shown(unknown, train, names)}. Correct them, or "
            "set unknown_classes to 'drop' to leave these rows out.",
            arguments=("unknown_classes",),
        )


def known_rows(parts: Mapping[str, Dataset], label: str | None, on_unknown: OnUnknown) -> dict[str, Dataset]:
    """All splits without the rows, and the class names, of classes that only validation or test have.

    Raises:
        DataError: if there are such rows and they may not be dropped, or training has only one class.
    """
    train = parts["train"]
    feature = train.features.get(label)
    if label is None or not isinstance(feature, ClassLabel | Value) or "float" in getattr(feature, "dtype", ""):
        return dict(parts)
    known, names = _values(train, label), getattr(feature, "names", ())
    hidden = hides_labels(feature, known)
    classes = names or sorted({str(value) for value in known if not is_missing(value, hidden)})
    if len(classes) < 2:
        raise DataError(
            f"there is only one class in column {label!r}: {''.join(classes) or 'none'}. A classifier needs two; is "
            "the label in another column (label_column), or one folder higher?",
            arguments=("label_column",),
        )
    kept, dropped = {"train": train}, set()
    for name, split in parts.items():
        if name == "train" or split.features.get(label) != feature:  # reported by find_columns
            kept[name] = split
            continue
        values = _values(split, label)
        if on_unknown == "refuse":
            check_known(name, values, known, hidden, names)
        unknown = _unknown(values, known, hidden)
        dropped |= set(unknown)
        kept[name] = split
        if unknown:
            kept[name] = split.select([row for row, value in enumerate(values) if value not in unknown])
            logger.warning(
                f"{sum(unknown.values()):,} rows of split {name!r} are left out, since no training row has their "
                f"classes: {_shown(unknown, known, names)}."
            )
    return {name: _without_names(split, label, dropped) for name, split in kept.items()} if names and dropped else kept


def _without_names(split: Dataset, label: str, numbers: set[int]) -> Dataset:
    """The split with these class numbers, which no row has, taken out of its class names."""
    left = [number for number in range(split.features[label].num_classes) if number not in numbers]
    feature = ClassLabel(names=[split.features[label].names[number] for number in left])
    place = {number: new for new, number in enumerate(left)}
    labels = [place.get(value, value) for value in _values(split, label)]
    return split.remove_columns(label).add_column(label, labels, feature=feature)


def _unknown(values: Sequence[Any], train: Sequence[Any], hidden: bool) -> Counter[Any]:
    known = set(train)
    return Counter(value for value in values if value not in known and not is_missing(value, hidden))


def _values(split: Dataset, label: str) -> list[Any]:
    return split.with_format(None)[label][:]


def _shown(unknown: Counter[Any], train: Sequence[Any], names: Sequence[str]) -> str:
    """The classes with their numbers of rows, and similar names."""

    def name(value: Any) -> str:
        return str(names[value] if names else value)

    there = {
        name(value).casefold(): name(value) for value in dict.fromkeys(train) if not is_missing(value, bool(names))
    }
    shown = []
    for value, count in unknown.most_common(SHOWN):
        close = get_close_matches(name(value).casefold(), there, n=1, cutoff=0.8)
        hint = f"; did you mean {there[close[0]]!r}?" if close else ""
        shown.append(f"{name(value)!r} ({count:,} row{'s' if count > 1 else ''}{hint})")
    more = len(unknown) - SHOWN
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
