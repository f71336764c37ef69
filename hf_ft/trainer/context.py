"""The context in which strategies measure the data, built from a Trainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.amp import GradScaler
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_ft.core.context import Context, Recipe, Samples, Source
from hf_ft.data.labels import class_labels
from hf_ft.data.rows import read_rows
from hf_ft.data.sampling import share_of_batches
from hf_ft.data.streams import is_map_style
from hf_ft.engine.param_groups import schedule_curve
from hf_ft.errors import OptionError, accepted
from hf_ft.models.preserve import random_states_kept
from hf_ft.trainer.look import measurable
from hf_ft.trainer.protocols import Collate, ForContext, ForStreams

READ = 64  # batch size of a measuring pass over source samples


def measuring_context(trainer: ForContext) -> Context:
    """The context passed to ``measure``."""
    recipe, described = recipe_of(trainer)
    source = trainer.source_dataset
    return Context(
        batches=partial(batches_of, trainer),
        reduce=partial(trainer.accelerator.reduce, reduction="sum"),
        device=trainer.args.device,
        generator=torch.Generator().manual_seed(trainer.args.seed),
        samples=_samples(trainer),
        groups=trainer.groups,
        labels=class_labels(trainer.train_dataset if is_map_style(trainer.train_dataset) else measurable(trainer)),
        recipe=recipe,
        described=described,
        frozen_cache=trainer.frozen_cache,
        source=None if source is None else Source(source, partial(source_batches, trainer)),
        folder=Path(str(trainer.args.output_dir)),
        progress=trainer.args.process_index == 0 and not trainer.args.disable_tqdm,
        rank=trainer.args.process_index,
        ranks=trainer.args.world_size,
    )


def looking(trainer: ForContext) -> dict[str, Any]:
    """What is needed to read training samples at the beginning of an epoch."""
    args = trainer.args
    return {
        "samples": _samples(trainer),
        "recipe": recipe_of(trainer)[0],
        "seed": args.seed,
        "reduce": partial(trainer.accelerator.reduce, reduction="sum"),
        "rank": args.process_index,
        "ranks": args.world_size,
    }


def _samples(trainer: ForContext) -> Samples:
    """Indexed access to the training samples, without augmentation if the user provided such a data set.

    Raises:
        OptionError: if the plain and the augmented data set differ in length.
    """
    dataset, plain = trainer.train_dataset, trainer.plain_train_dataset
    if is_map_style(plain) and is_map_style(dataset) and len(plain) != len(dataset):
        raise OptionError(
            f"plain_train_dataset has {len(plain)} samples, but train_dataset has {len(dataset)}: pass the same ones, "
            "in the same order, without augmentation."
        )
    chosen = measurable(trainer)

    @cache  # lazy: a data set without length is rejected only if samples are requested
    def source() -> Any:
        return readable(trainer, chosen)

    def read(rows: Sequence[int]) -> dict[str, Any]:
        kept, collate = source()
        return trainer._prepare_inputs(collate(read_rows(kept, rows)))

    return Samples(0 if chosen is None else len(chosen), read)


def curve(args: TrainingArguments, steps: int) -> Callable[[int], float]:
    """The learning rate schedule from the training arguments, over one stage."""
    kwargs: Any = args.lr_scheduler_kwargs or {}
    if not isinstance(kwargs, Mapping):
        raise OptionError(
            f"lr_scheduler_kwargs={kwargs!r} is not a mapping: give names and values, such as {{'power': 2}}."
        )
    return schedule_curve(args.lr_scheduler_type, steps, args.get_warmup_steps(steps), **kwargs)


def recipe_of(trainer: ForContext) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a Trainer and a description of its settings."""
    args = trainer.args
    kind, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)

    def optimizer(groups: Any) -> Any:
        with accepted("the optimizer"):
            return kind(groups, **options)

    recipe = Recipe(
        optimizer=optimizer,
        curve=partial(curve, args),
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm or 0.0,
        task_loss=trainer.task_loss,
        computing=trainer.accelerator.autocast,
        scaler=partial(GradScaler, args.device.type, enabled=trainer.accelerator.scaler is not None),
        epochs=_epochs(trainer),
    )
    names = "learning_rate weight_decay optim optim_args lr_scheduler_type lr_scheduler_kwargs warmup_steps "
    names += "max_grad_norm label_smoothing_factor bf16 fp16"
    described = {name: value for name, value in args.to_dict().items() if name in names.split()}
    described["optimizer"] = f"{kind.__name__}({', '.join(f'{key}={value}' for key, value in sorted(options.items()))})"
    function = trainer.task_loss.compute_loss_func
    described["compute_loss_func"] = (
        None if function is None else getattr(function, "__qualname__", repr(type(function)))
    )
    weights = trainer.task_loss.class_weights
    described["class_weights"] = None if weights is None else weights.tolist()
    return recipe, described


def _epochs(trainer: ForContext) -> float:
    """The length of the training run in epochs; on a stream, in passes over the samples that may be read beforehand."""
    args, dataset = trainer.args, trainer.train_dataset
    dataset = dataset if is_map_style(dataset) else measurable(trainer)
    if args.max_steps <= 0 or dataset is None:
        return float(args.num_train_epochs)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps / max(1, -(-len(dataset) // size))


def batches_of(trainer: ForContext) -> Iterator[dict[str, Any]]:
    """Batches of the training data for this process."""
    dataset = trainer.train_dataset if is_map_style(trainer.train_dataset) else measurable(trainer)
    args, (dataset, collate) = trainer.args, readable(trainer, dataset)
    loader = DataLoader(
        dataset,
        batch_sampler=share_of_batches(
            len(dataset), args.per_device_train_batch_size, args.seed, args.process_index, args.world_size
        ),
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),  # otherwise it draws from the global random state
    )
    for batch in loader:
        yield trainer._prepare_inputs(batch)


def source_collator(trainer: ForStreams) -> Collate:
    """The collator for source samples."""
    collate = trainer.source_data_collator or trainer.data_collator
    return trainer._get_collator_with_removed_columns(collate, description="source")


def source_batches(trainer: ForStreams, limit: int) -> Iterator[dict[str, Any]]:
    """At most ``limit`` source samples, identical on every rank, as batches on the device."""
    dataset, collate = trainer.source_dataset, source_collator(trainer)
    if is_map_style(dataset):
        rows = range(0, len(dataset), max(1, -(-len(dataset) // limit)))
        parts: Iterator[list[Any]] = (read_rows(dataset, rows[i : i + READ]) for i in range(0, len(rows), READ))
    else:
        samples = itertools.islice(iter(dataset), limit)
        parts = iter(lambda: list(itertools.islice(samples, READ)), [])
    for number in itertools.count():
        with random_states_kept(seed=trainer.args.seed + number):  # do not advance the global random state
            part = next(parts, None)
            batch = None if part is None else collate(part)
        if batch is None:
            return
        yield trainer._prepare_inputs(batch)


def readable(trainer: ForContext, dataset: Any) -> tuple[Any, Callable[[list[Any]], Any]]:
    """A data set without unused columns, and the collator for its rows.

    Raises:
        OptionError: if there is none, since a stream may not be read before training.
    """
    if dataset is None:
        raise OptionError(measures_first(", ".join(config.ft_type for config in trainer.configs)))
    if isinstance(dataset, datasets.Dataset):
        return trainer._remove_unused_columns(dataset, description="measured"), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="measured")


def measures_first(names: str) -> str:
    """Why a strategy cannot train on a stream, and what to do."""
    return (
        f"{names} measures the training data first: train_dataset must be map-style, not iterable; or let it read "
        "a few samples of the stream with measure_samples=256 (--measure_samples on the command line)."
    )
