"""Checks of the labels that a model will be trained and evaluated on, before its first step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np
import torch

from hf_ft.data.labels import LABEL_COLUMNS
from hf_ft.data.rows import drawn_rows, read_rows
from hf_ft.data.streams import is_map_style
from hf_ft.errors import OptionError
from hf_ft.models.preserve import random_states_kept

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
IGNORED = -100  # the index that cross-entropy ignores
READ = 4  # rows of data sets whose labels cannot be read without the inputs


def check_labels(dataset: Any, where: str, num_labels: int, problem_type: str | None) -> str | None:
    """Check all labels of a column, or those of a few rows if a column cannot be read without the inputs.

    Booleans are classes; vectors of 0 and 1 are several labels per sample if ``problem_type`` says so.

    Args:
        where: name of the data set in messages.
        num_labels: number of outputs of the model.
        problem_type: as in the model's config.

    Returns:
        The problem type; if not given, the one that Transformers would infer when the first batch arrives. None
        if there are no labels to read.

    Raises:
        OptionError: naming the data set, column, row, value and fix.
    """
    for column, row, label in _labels(dataset):
        problem_type = problem_type or _problem_type(label, num_labels)
        reason = _wrong(label, num_labels, problem_type)
        if reason:
            shown = repr(label) if not isinstance(label, list | np.ndarray | torch.Tensor) else f"{list(label)!r:.60}"
            raise OptionError(f"{where}: {column} {shown} of row {row} {reason}")
    return problem_type


def _problem_type(label: Any, num_labels: int) -> str:
    if num_labels == 1:
        return REGRESSION
    floats = _is_vector(label) and np.asarray(label).dtype.kind == "f"
    return MULTI if floats else SINGLE


def _labels(dataset: Any) -> Iterable[tuple[str, int, Any]]:
    """Column, row and value of labels: all of a column that can be read alone, otherwise of some rows."""
    if not is_map_style(dataset) or not len(dataset):
        return
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        column = next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)
        if column is not None:
            yield from ((column, row, label) for row, label in enumerate(dataset.with_format(None)[column][:]))
        return
    known = getattr(dataset, "class_labels", None)
    if known is not None:
        yield from (("label", row, int(label)) for row, label in enumerate(known))
        return
    rows = drawn_rows(len(dataset), READ)
    with random_states_kept():
        samples = read_rows(dataset, rows)
    for row, sample in zip(rows, samples, strict=True):
        column = next((name for name in LABEL_COLUMNS if hasattr(sample, "keys") and name in sample), None)
        if column is not None:
            yield column, row, sample[column]


def _wrong(label: Any, num_labels: int, kind: str) -> str:
    """What is wrong with a label, and how to fix it; empty if nothing is."""
    if label is None:
        return "is missing: give every row a label, or leave such rows out."
    if isinstance(label, str | bytes):
        return f"is text: map the class names to the numbers 0..{num_labels - 1}."
    if _is_vector(label):
        return _wrong_vector(label, num_labels, kind)
    value = label.item() if hasattr(label, "item") else label
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number: leave such rows out."
    if kind == REGRESSION:
        return ""
    if kind == MULTI:
        return f"is a single value, but the model's problem_type is {MULTI!r}: give a vector of zeros and ones."
    if isinstance(value, float):
        return "is not an integer: cast the column to integers, or load the model with num_labels=1 for regression."
    if not 0 <= value < num_labels and value != IGNORED:
        return (
            f"lies outside [0, {num_labels}), the model's num_labels={num_labels}. Load the model with "
            "num_labels=<number of classes>, or map the labels to 0..num_labels-1."
        )
    return ""


def _wrong_vector(label: Any, num_labels: int, kind: str) -> str:
    values = np.asarray(label)
    if kind == REGRESSION:
        same = values.ndim == 1 and len(values) == num_labels
        return "" if same else f"is not a vector of {num_labels} numbers, the model's num_labels."
    if values.dtype.kind not in "biuf" or values.ndim != 1:
        return f"is not a vector of {num_labels} numbers: encode the classes as zeros and ones."
    if kind != MULTI:
        return f"is a vector: set model.config.problem_type={MULTI!r} for several labels per sample, or give its class."
    if len(values) != num_labels:
        return f"has {len(values)} values, but the model's num_labels is {num_labels}: give one for each class."
    if not ((values >= 0) & (values <= 1)).all():
        return "has values outside [0, 1]: encode the classes as zeros and ones."
    return ""


def _is_vector(label: Any) -> bool:
    return isinstance(label, list | tuple) or getattr(label, "ndim", 0) > 0
