"""Class labels of a data set."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from torch.utils.data import Subset

LABEL_COLUMNS = ("labels", "label", "label_ids")


def class_labels(dataset: Any) -> np.ndarray | None:
    """The integer label column, read without transforms; None if there is none that is cheap to read.

    A part of a data set (``torch.utils.data.Subset``) has the labels of its rows. Other data sets may provide them as
    ``class_labels``, as :class:`~hf_ft.data.in_memory.Held` does.
    """
    if isinstance(dataset, Subset):
        known = class_labels(dataset.dataset)
        return None if known is None else known[np.asarray(dataset.indices, dtype=int)]
    if not isinstance(dataset, datasets.Dataset):
        return getattr(dataset, "class_labels", None)
    column = next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)
    if column is None:
        return None
    labels = np.asarray(dataset.with_format(None)[column])
    return labels if labels.ndim == 1 and labels.dtype.kind in "iu" else None
