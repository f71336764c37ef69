"""Builds model, data and processor from the flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict
from transformers import TrainingArguments

from hf_ft.cli.console import refusals
from hf_ft.cli.flags import CHECKED_UNASKED, DataFlags
from hf_ft.cli.logs import quieten
from hf_ft.cli.models import load_classifier, load_ensemble
from hf_ft.cli.request import Request
from hf_ft.core.compose import shared_option
from hf_ft.core.context import FrozenCache
from hf_ft.data.columns import Columns, find_columns
from hf_ft.data.images import check_images
from hf_ft.data.load import load_split, load_splits
from hf_ft.data.prepare import collate, prepare, usual_length
from hf_ft.errors import OptionError
from hf_ft.metrics import LOCAL_METRICS, classification_metrics, compute_metrics
from hf_ft.trainer.trainer import FTTrainer


@dataclass(frozen=True)
class Made:
    """The objects built for a request: the trainer, the prepared splits, and the columns of the data."""

    trainer: FTTrainer
    splits: DatasetDict
    columns: Columns
    augment: str


def make(request: Request) -> Made:
    """Load model and data, and create the trainer."""
    quieten()
    with refusals():
        args = TrainingArguments(**request.training_arguments())
    with args.main_process_first(desc="reading the data"):
        splits = read_splits(request.data)
    columns = find_columns(splits, request.data.image_column, request.data.text_column, request.data.label_column)
    splits = readable_images(splits, columns, request.data.on_corrupt)
    augment = _augmentation(request.data.augment, columns)
    with refusals():
        model, processor = _load(request, columns, args.seed)
    length = token_length(request.data, model, processor)
    with args.main_process_first(desc="preparing the data"):
        ready = prepare(splits, processor, columns, augment, length)
        plain = ready if augment == "none" else prepare(splits, processor, columns, "none", length)
        source = _source(request.data, processor, columns, augment, length)
    _settle(args, request, columns)
    method = request.method
    cache = FrozenCache(method.frozen_cache, method.frozen_cache_memory_gb, method.frozen_cache_disk_gb)
    with refusals():
        trainer = FTTrainer(
            model,
            args,
            strategy=request.configs,
            class_weights=None if method.class_weights == "none" else method.class_weights,
            overwrite=method.overwrite,
            frozen_cache=cache,
            plain_train_dataset=plain["train"],
            source_dataset=source,
            train_dataset=ready["train"],
            eval_dataset=ready["validation"],
            data_collator=collate(processor),
            processing_class=processor,
            compute_metrics=compute_metrics(method.metrics) if method.metrics else classification_metrics,
        )
    return Made(trainer, ready, columns, augment)


def _load(request: Request, columns: Columns, seed: int) -> tuple[Any, Any]:
    size, revision = request.data.image_size, request.data.revision
    if request.sources:
        return load_ensemble(request.sources, columns, seed, size, revision)
    return load_classifier(
        str(request.data.model),
        columns,
        seed,
        size,
        revision,
        keep_source_head=any(config.needs().source_head for config in request.configs),
        head=shared_option(request.configs, "head"),
    )


def read_splits(flags: DataFlags, **more: Any) -> DatasetDict:
    """The splits given by the flags; ``more`` is passed to :func:`~hf_ft.data.load_splits`."""
    return load_splits(
        str(flags.dataset),
        config_name=flags.config_name,
        train_split=flags.train_split,
        validation_split=flags.validation_split,
        test_split=flags.test_split,
        validation_fraction=flags.validation_fraction,
        max_train_samples=flags.max_train_samples,
        label_column=flags.label_column,
        seed=flags.split_seed,
        **more,
    )


def readable_images(splits: DatasetDict, columns: Columns, on_corrupt: str | None) -> DatasetDict:
    """The splits without unreadable images, if images are checked at all.

    Raises:
        OptionError: if there are unreadable images that may not be skipped.
    """
    if on_corrupt is None and sum(map(len, splits.values())) > CHECKED_UNASKED:
        return splits
    return check_images(splits, columns, "skip" if on_corrupt == "skip" else "refuse")[0]


def _source(flags: DataFlags, processor: Any, target: Columns, augment: str, length: int | None) -> Any:
    """The source data, processed like the target data.

    Raises:
        OptionError: if they are of another kind than the target data.
    """
    if flags.source_dataset is None:
        return None
    rows = DatasetDict({"train": load_split(flags.source_dataset, flags.source_split)})
    columns = find_columns(rows)
    if columns.task != target.task:
        raise OptionError(f"--source_dataset {flags.source_dataset} holds {columns.task}, --dataset {target.task}.")
    return prepare(readable_images(rows, columns, flags.on_corrupt), processor, columns, augment, length)["train"]


def _augmentation(wanted: str | None, columns: Columns) -> str:
    if columns.task == "text" and wanted not in (None, "none"):
        raise OptionError(f"--augment {wanted} changes images, and these data are text: use none.")
    return wanted or ("basic" if columns.task == "image" else "none")


def token_length(flags: DataFlags, model: Any, processor: Any) -> int | None:
    return flags.max_length or usual_length(model, processor)


def _settle(args: TrainingArguments, request: Request, columns: Columns) -> None:
    """Set what depends on the data: the metric of the best model, and whether columns are dropped."""
    if columns.task == "image":
        args.remove_unused_columns = False  # images are opened on access
    if not torch.accelerator.is_available() and "dataloader_pin_memory" not in request.given:
        args.dataloader_pin_memory = False
    if not args.load_best_model_at_end or "metric_for_best_model" in request.given:
        return
    names = request.method.metrics or ([] if columns.problem_type == "regression" else ["accuracy"])
    best = names[0] if names and names[0] in LOCAL_METRICS else "loss"
    args.metric_for_best_model = best
    args.greater_is_better = best != "loss" and LOCAL_METRICS[best].kinds != ("regression",)
