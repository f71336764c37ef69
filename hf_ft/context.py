"""What a strategy gets from a Trainer to look at the data with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from hf_ft.core.context import Context, Samples, Source
from hf_ft.data.labels import class_labels
from hf_ft.data.rows import read_rows
from hf_ft.engine.short_training import recipe_of
from hf_ft.errors import OptionError
from hf_ft.sampling import batches_of, readable


def measuring_context(trainer: Any) -> Context:
    """What ``measure`` gets from a Trainer."""
    recipe, described = recipe_of(trainer)
    return Context(
        batches=partial(batches_of, trainer),
        reduce=partial(trainer.accelerator.reduce, reduction="sum"),
        device=trainer.args.device,
        generator=torch.Generator().manual_seed(trainer.args.seed),
        samples=_samples(trainer),
        labels=class_labels(trainer.train_dataset),
        recipe=recipe,
        described=described,
        frozen_cache=trainer.frozen_cache,
        source=None if trainer.source_dataset is None else Source(trainer.source_dataset, trainer._source_batches),
        folder=Path(trainer.args.output_dir),
        progress=trainer.args.process_index == 0 and not trainer.args.disable_tqdm,
        rank=trainer.args.process_index,
        ranks=trainer.args.world_size,
    )


def _samples(trainer: Any) -> Samples:
    """The training samples by number, without augmentation where the user gave such.

    Raises:
        OptionError: those are not as many as the augmented ones.
    """
    dataset, plain = trainer.train_dataset, trainer.plain_train_dataset
    if plain is not None and len(plain) != len(dataset):
        raise OptionError(
            f"plain_train_dataset has {len(plain)} samples, train_dataset {len(dataset)}: pass the same ones, in the "
            "same order, without augmentation."
        )
    chosen = dataset if plain is None else plain

    @cache  # not at once: a stream is refused only where samples are asked for
    def source() -> Any:
        return readable(trainer, chosen)

    def read(rows: Sequence[int]) -> dict[str, Any]:
        kept, collate = source()
        return trainer._prepare_inputs(collate(read_rows(kept, rows)))

    return Samples(len(chosen) if hasattr(chosen, "__len__") else 0, read)
