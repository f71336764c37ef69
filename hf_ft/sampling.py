"""Passes over the data for what is measured: every sample exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader

from hf_ft.data.sampling import share_of_batches
from hf_ft.errors import OptionError


def batches_of(trainer: Any) -> Iterator[dict[str, Any]]:
    """This process's batches of the training data."""
    args, (dataset, collate) = trainer.args, readable(trainer, trainer.train_dataset)
    loader = DataLoader(
        dataset,
        batch_sampler=share_of_batches(
            len(dataset), args.per_device_train_batch_size, args.seed, args.process_index, args.world_size
        ),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),  # without one, it draws from the global random state
    )
    for batch in loader:
        yield trainer._prepare_inputs(batch)


def readable(trainer: Any, dataset: Any) -> tuple[Any, Callable[[list[Any]], Any]]:
    """A data set without unused columns, and what makes batches of its rows.

    Raises:
        OptionError: it has no length, so that it cannot be divided among ranks, nor read by number.
    """
    if not hasattr(dataset, "__len__"):
        names = ", ".join(config.ft_type for config in trainer.configs)
        raise OptionError(f"{names} looks at the training data first: train_dataset must be map-style, not iterable.")
    if isinstance(dataset, datasets.Dataset):
        return trainer._remove_unused_columns(dataset, description="measured"), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="measured")
