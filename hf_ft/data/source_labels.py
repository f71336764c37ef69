"""Mapping of a source data set's labels to the classes of the pretrained head."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import ClassLabel
from torch import Tensor

from hf_ft.data.labels import LABEL_COLUMNS, class_labels
from hf_ft.errors import OptionError

LabelMap = dict | Literal["by_name", "by_number"] | None
LABEL_MAP_HELP = (
    "Mapping from the source data's labels to the source head's classes, if they differ: a dictionary of names or "
    "numbers; 'by_name'; or 'by_number' to match the numbers even if the names differ."
)
_GENERIC = re.compile(r"LABEL_\d+")
SHOWN = 4  # names in a message


@dataclass(frozen=True)
class SourceLabels:
    """A stream's ``prepare``: reject a data set whose labels do not fit the head, and map the labels of each batch.

    Without a map, labels are class numbers of the head; if both sides name their classes, the names must be equal and
    in the same order.

    Args:
        classes: number of classes of the head.
        names: class names of the head, in order; empty if unknown.
        label_map: from the data set's class names or numbers to the head's; ``"by_name"``, or ``"by_number"`` to use
            the numbers regardless of names.
    """

    classes: int
    names: tuple[str, ...] = ()
    label_map: LabelMap = None

    def __call__(self, dataset: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """The function that maps the labels of a batch of this data set.

        Raises:
            OptionError: if they do not fit; the message explains how to map them.
        """
        named = class_names(dataset)
        if self.label_map is None:
            self._compare(named)
        table = self._table(named)
        labels = class_labels(dataset)
        if labels is not None:
            self._apply(torch.as_tensor(labels), table)
        return lambda batch: {**batch, "labels": self._apply(_labels(batch), table)}

    def _compare(self, named: tuple[str, ...]) -> None:
        if not named or not self.names or named == self.names:
            return
        if sorted(named) == sorted(self.names):
            wrong, fix = "in a different order", "Set source_label_map='by_name'"
        elif set(named) <= set(self.names):
            wrong, fix = "only some of them", "Set source_label_map='by_name'"
        else:
            fix = (
                f"Set source_label_map={{{named[0]!r}: {self.names[0]!r}, ...}} (names or numbers on either side), or "
                "'by_number' if label i is the head's class i nevertheless"
            )
            wrong = "others"
        raise OptionError(
            f"source_dataset's classes are {_shown(named)}, but the source head's are {_shown(self.names)}: {wrong}. "
            f"{fix}."
        )

    def _table(self, named: tuple[str, ...]) -> Tensor | None:
        """The head's class for each label, -1 if there is none; None for the identity."""
        if self.label_map in (None, "by_number"):
            return None
        if self.label_map == "by_name":
            places = self._by_name(named)
        else:
            assert isinstance(self.label_map, dict)
            if not self.label_map:
                raise OptionError("source_label_map={} is empty: give a class of the head for each label.")
            places = {self._label(key, named): self._class(key, value) for key, value in self.label_map.items()}
        table = torch.full((max(places) + 1,), -1)
        for label, place in places.items():
            table[label] = place
        return table

    def _by_name(self, named: tuple[str, ...]) -> dict[int, int]:
        for side, names in (("source_dataset", named), ("the source head", self.names)):
            if not names:
                raise OptionError(
                    f"source_label_map='by_name': {side} does not name its classes. Give a dictionary from labels to "
                    "the head's class numbers."
                )
        unknown = [name for name in named if name not in self.names]
        if unknown:
            raise OptionError(
                f"source_label_map='by_name': the source head has no class {unknown[0]!r}, only {_shown(self.names)}. "
                "Give a dictionary, or remove its samples and its name."
            )
        return {label: self.names.index(name) for label, name in enumerate(named)}

    def _label(self, key: str, named: tuple[str, ...]) -> int:
        if key in named:
            return named.index(key)
        if key.isdigit():
            return int(key)
        known = f"its classes are {_shown(named)}" if named else "it does not name its classes: use numbers"
        raise OptionError(f"source_label_map: source_dataset has no class {key!r}; {known}.")

    def _class(self, key: str, value: Any) -> int:
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        number = int(value) if isinstance(value, int) or str(value).isdigit() else -1
        if not 0 <= number < self.classes:
            known = f"a number in [0, {self.classes})" + (f" or one of {_shown(self.names)}" if self.names else "")
            raise OptionError(f"source_label_map: {key!r} -> {value!r} is not a class of the source head: use {known}.")
        return number

    def _apply(self, labels: Tensor, table: Tensor | None) -> Tensor:
        if table is None:
            bad = labels[(labels < 0) | (labels >= self.classes)]
            if len(bad):
                raise OptionError(
                    f"source_dataset: label {int(bad[0])} lies outside [0, {self.classes}), the source head's classes. "
                    "Map the data set's labels to them: source_label_map={<label>: <class of the head>, ...}."
                )
            return labels
        known = (labels >= 0) & (labels < len(table))
        mapped = torch.where(known, table[labels.clamp(0, len(table) - 1)], -1)
        if bool((mapped < 0).any()):
            raise OptionError(
                f"source_label_map has no entry for label {int(labels[mapped < 0][0])} of source_dataset: add one, or "
                "remove its samples."
            )
        return mapped


def as_json(label_map: LabelMap) -> LabelMap:
    """Convert the keys of a map to strings, as in JSON."""
    return {str(key): value for key, value in label_map.items()} if isinstance(label_map, dict) else label_map


def class_names(dataset: Any) -> tuple[str, ...]:
    """The class names of a data set, if its features contain them."""
    features = getattr(dataset, "features", None) or {}
    column = next((features[name] for name in LABEL_COLUMNS if name in features), None)
    return tuple(column.names) if isinstance(column, ClassLabel) else ()


def head_names(names: Mapping[int, str]) -> tuple[str, ...]:
    """The class names of a head in order; empty if they are generic numbered labels."""
    found = tuple(names[index] for index in sorted(names))
    return () if any(_GENERIC.fullmatch(str(name)) for name in found) else found


def _labels(batch: Mapping[str, Any]) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        raise OptionError(
            f"source_dataset yields batches of {sorted(batch)}, without 'labels': add a column of its classes."
        )
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        actual = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise OptionError(f"source_dataset: 'labels' are {actual}, but one integer class per sample, (B,), is needed.")
    return labels


def _shown(names: tuple[str, ...]) -> str:
    shown = list(names[:SHOWN])
    return f"{shown}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
