"""Passes over the data for what a strategy measures: every sample exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Subset

from hf_ft.config import Context
from hf_ft.fields import OptionError


def measuring_context(trainer: Any) -> Context:
    """What ``measure`` gets from a Trainer.

    Raises:
        OptionError: the training data have no length, so that they cannot be divided among ranks.
    """
    if not hasattr(trainer.train_dataset, "__len__"):
        names = ", ".join(config.ft_type for config in trainer.configs)
        raise OptionError(f"{names} looks at the training data first: train_dataset must be map-style, not iterable.")
    return Context(
        batches=partial(_batches, trainer),
        reduce=partial(trainer.accelerator.reduce, reduction="sum"),
        device=trainer.args.device,
        generator=torch.Generator().manual_seed(trainer.args.seed),
    )


def _batches(trainer: Any) -> Iterator[dict[str, Any]]:
    dataset, collate = trainer.train_dataset, trainer.data_collator
    if isinstance(dataset, datasets.Dataset):
        dataset = trainer._remove_unused_columns(dataset, description="measured")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="measured")
    # accelerate's samplers repeat samples so that all ranks get as many: a mean would count those twice.
    share = range(trainer.args.process_index, len(dataset), trainer.args.world_size)
    loader = DataLoader(
        Subset(dataset, share),
        batch_size=trainer.args.per_device_train_batch_size,
        collate_fn=collate,
        num_workers=trainer.args.dataloader_num_workers,
    )
    for batch in loader:
        yield trainer._prepare_inputs(batch)
