"""A look at streamed training data: a few samples, for measurements before training."""

from __future__ import annotations

import itertools
import random
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from hf_ft.data.labels import LABEL_COLUMNS
from hf_ft.data.streams import is_map_style
from hf_ft.errors import OptionError
from hf_ft.models.preserve import random_states_kept
from hf_ft.trainer.protocols import ForContext


class FewSamples(list[Any]):
    """Samples of a stream, kept in memory."""

    @cached_property
    def class_labels(self) -> np.ndarray | None:
        """Their classes, (N,); None if they have none."""
        if not self or not hasattr(self[0], "keys"):
            return None
        column = next((name for name in LABEL_COLUMNS if name in self[0]), None)
        labels = np.asarray([] if column is None else [np.asarray(sample[column]) for sample in self])
        return labels if len(labels) == len(self) and labels.ndim == 1 and labels.dtype.kind in "iu" else None


def measurable(trainer: ForContext) -> Any:
    """Training samples that can be read by index, without augmentation if the user provided such a data set.

    From a stream, a few samples that are read once; None if the user allows none.
    """
    dataset, plain = trainer.train_dataset, trainer.plain_train_dataset
    chosen = dataset if plain is None else plain
    if is_map_style(chosen):
        return chosen
    if chosen is None or not trainer.measure_samples:
        return None
    if trainer.looked_at is None:
        with random_states_kept(trainer.args.seed):
            trainer.looked_at = _drawn(chosen, trainer.measure_samples, trainer.shuffle_buffer, trainer.args.seed)
    return trainer.looked_at


def _drawn(dataset: Any, count: int, among: int, seed: int) -> FewSamples:
    """The first samples of a pass, or a random draw from the first ``among``: the same on every process.

    Raises:
        OptionError: if there are none.
    """
    if isinstance(dataset, datasets.IterableDataset):
        dataset = split_dataset_by_node(dataset, 0, 1)  # at its first epoch, whatever epoch the user's is at
    drawing, kept = random.Random(seed), FewSamples()
    for number, sample in enumerate(itertools.islice(iter(dataset), max(count, among))):
        if number < count:
            kept.append(sample)
        elif (place := drawing.randrange(number + 1)) < count:
            kept[place] = sample
    if not kept:
        raise OptionError("train_dataset contains no samples: pass one that does.")
    return kept
