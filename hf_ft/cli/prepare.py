"""Builds data, model, processor and trainer from the flags."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_ft.cli.checks import check_task
from hf_ft.cli.console import is_main, refusals
from hf_ft.cli.flags import CHECKED_UNASKED, TEXTS_UNASKED, DataFlags
from hf_ft.cli.logs import quieten
from hf_ft.cli.request import Request
from hf_ft.cli.streaming import process_streamed, read_streamed, stream_options
from hf_ft.core.compose import shared_option
from hf_ft.core.context import FrozenCache
from hf_ft.data.align import find_like, load_further
from hf_ft.data.check_results import FILE, DataChecks
from hf_ft.data.classifier import load_classifier, load_ensemble
from hf_ft.data.columns import Columns, find_columns
from hf_ft.data.images import check_images
from hf_ft.data.load import load_splits
from hf_ft.data.mixing import Mixing
from hf_ft.data.on_duplicates import checked
from hf_ft.data.prints import Prints
from hf_ft.data.progress import hide_bars
from hf_ft.data.sounds import SECONDS
from hf_ft.data.streamed import Streamed
from hf_ft.data.task import Data, process
from hf_ft.documents.public import shareable_name
from hf_ft.errors import OptionError
from hf_ft.metrics import LOCAL_METRICS, classification_metrics, compute_metrics, fitting_metrics
from hf_ft.trainer.patience import patience_callback
from hf_ft.trainer.trainer import FTTrainer
from hf_ft.zoo.datasets import DATA_NOTICES


@dataclass(frozen=True)
class Made:
    """The objects built for a request: the trainer, the data, and the splits processed for the model."""

    trainer: FTTrainer
    data: Data
    splits: dict[str, Any]


class KeepChecks(TrainerCallback):
    """Writes the findings of the data checks when training begins; before, nothing is written to the output folder."""

    def __init__(self, checks: DataChecks) -> None:
        self.checks = checks

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            self.checks.save(str(args.output_dir))


def make(request: Request) -> Made:
    """Load model and data, and create the trainer."""
    quieten()
    with refusals():
        args = TrainingArguments(**request.training_arguments())
    hide_bars(args.disable_tqdm or not is_main())
    data, streamed = _read(request, args)
    with refusals():
        request.mixing.check_task(data.columns.task)
        model, processor = _load(request, data.columns, args.seed)
    with args.main_process_first(desc="preparing the data"):
        if streamed is not None:
            processed = process_streamed(streamed, data, model, processor)
        else:
            processed = process(data, model, processor)
    _check_metric(request, data.columns)
    _settle(args, request, data.columns, model)
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
            plain_train_dataset=processed.plain,
            groups=None if streamed else data.groups,
            source_dataset=processed.source,
            train_dataset=processed.splits["train"],
            eval_dataset=processed.splits["validation"],
            data_collator=processed.collate,
            processing_class=processor,
            mixup=method.mixup,
            cutmix=method.cutmix,
            **stream_options(request.stream),
            compute_metrics=compute_metrics(method.metrics) if method.metrics else classification_metrics,
        )
        if method.patience is not None:
            trainer.add_callback(patience_callback(method.patience, args))
            args.restore_callback_states_from_checkpoint = True  # so that a resumed run ends where it would have
    if data.checks is not None:
        trainer.add_callback(KeepChecks(data.checks))
    trainer.data_info = data.info
    return Made(trainer, data, processed.splits)


def _read(request: Request, args: TrainingArguments) -> tuple[Data, Streamed | None]:
    """The data, and their stream if the training rows are streamed; other data are checked."""
    if request.stream.streaming:
        streamed = read_streamed(request.data)
        return _data_of(streamed, request.data), streamed
    prints = prints_for(request.data)
    reading = args.main_process_first(desc="reading the data")
    data = read_data(request.data, reading=reading, augment_images=True, prints=prints)
    return check_data(data, request.data, prints, request.output_dir), None


def read_data(
    flags: DataFlags,
    *,
    reading: AbstractContextManager[Any] | None = None,
    splits: Collection[str] | None = None,
    augment_images: bool = False,
    prints: Prints | None = None,
    **more: Any,
) -> Data:
    """The data given by the flags: splits made, columns found, images checked.

    Args:
        reading: context in which files are read, such as one that lets the main process go first.
        splits: the splits to keep; by default all.
        augment_images: whether training images are augmented by default.
        prints: takes fingerprints while files are checked, for :func:`check_data`.
        more: passed to :func:`~hf_ft.data.load_splits`.

    Raises:
        OptionError: if flags do not fit the data, or the source data do not fit the target data.
        DataError: if data cannot be read, or there are unreadable images that may not be skipped.
    """
    with reading or nullcontext():
        rows = _read_splits(flags, **more)
        source = None
        if flags.source_dataset is not None:
            source = load_further(flags.source_dataset, flags.source_split, flags.encoding)
    columns = find_columns(rows, flags.image_column, flags.text_column, flags.label_column, flags.audio_column)
    check_task(flags, columns.task)
    if splits is not None:
        rows = DatasetDict({name: rows[name] for name in splits})
    rows, skipped = readable(rows, columns, flags.on_corrupt, prints)
    source, source_columns = (None, None) if source is None else _source(source, flags, columns)
    return Data(
        rows,
        columns,
        name=shareable_name(str(flags.dataset)),
        augment=_augmentation(flags.augment, columns, augment_images),
        max_length=flags.max_length,
        seconds=flags.max_seconds or SECONDS,
        source=source,
        source_columns=source_columns,
        group_column=flags.group_column,
        skipped=skipped,
        notices=notices(flags.dataset, flags.source_dataset),
    )


def _data_of(streamed: Streamed, flags: DataFlags) -> Data:
    """Everything but the stream of training rows.

    Raises:
        OptionError: if flags do not fit the data.
    """
    check_task(flags, streamed.columns.task)
    return Data(
        streamed.splits,
        streamed.columns,
        name=shareable_name(str(flags.dataset)),
        augment=_augmentation(flags.augment, streamed.columns, augment_images=True),
        max_length=flags.max_length,
        seconds=flags.max_seconds or SECONDS,
        notices=notices(flags.dataset),
    )


def augmentation_of(data: Data, mixing: Mixing) -> str:
    """What is done to training images, in words."""
    return ", ".join([f"augmentation: {data.augment}", *([str(mixing)] if mixing else [])])


def notices(*names: str | None) -> tuple[str, ...]:
    """The notices of the data sets, by short name; data sets without a notice are left out."""
    return tuple(DATA_NOTICES[name] for name in dict.fromkeys(names) if name in DATA_NOTICES)


def _read_splits(flags: DataFlags, **more: Any) -> DatasetDict:
    return load_splits(
        str(flags.dataset),
        config_name=flags.config_name,
        train_split=flags.train_split,
        validation_split=flags.validation_split,
        test_split=flags.test_split,
        validation_fraction=flags.validation_fraction,
        max_train_samples=flags.max_train_samples,
        label_column=flags.label_column,
        group_column=flags.group_column,
        unknown_classes=flags.unknown_classes,
        encoding=flags.encoding,
        seed=flags.split_seed,
        **more,
    )


def prints_for(flags: DataFlags) -> Prints | None:
    """What takes fingerprints while files are read; None if duplicates are ignored."""
    return None if flags.on_duplicates == "ignore" else Prints()


def check_data(data: Data, flags: DataFlags, prints: Prints | None, folder: Path) -> Data:
    """The data with what was found in them, without duplicates if this is wanted.

    Args:
        prints: what was taken when files were checked; may be empty.
        folder: the output folder, where an earlier run may have kept what it found.

    Raises:
        DataError: if there are duplicates, and they are refused.
    """
    total, most = sum(map(len, data.splits.values())), TEXTS_UNASKED if data.columns.task == "text" else CHECKED_UNASKED
    too_many = flags.on_duplicates is None and total > most
    why = f"duplicates are not searched for in {total:,} samples: add --on_duplicates warn" if too_many else ""
    splits, found = checked(
        data.splits,
        data.columns,
        flags.on_duplicates or "warn",  # type: ignore[arg-type]
        group_column=data.group_column,
        prints=prints,
        folder=folder,
        not_compared=why,
    )
    return replace(data, splits=splits, checks=found)


def check_rows(data: Data, folder: Path) -> list[tuple[str, str]]:
    """What the checks found, as rows of a table."""
    if data.checks is None:
        return []
    said = [f"all of them: {folder / FILE}"] if data.checks.duplicates else []
    return [("" if row else "checks", text) for row, text in enumerate([*data.checks.sentences(), *said])]


def readable(
    splits: DatasetDict, columns: Columns, on_corrupt: str | None, prints: Prints | None = None
) -> tuple[DatasetDict, dict[str, int]]:
    """The splits without unreadable files, and how many were skipped by split; large data are checked only if asked.

    Raises:
        DataError: if there are unreadable images that may not be skipped.
    """
    if on_corrupt is None and sum(map(len, splits.values())) > CHECKED_UNASKED:
        return splits, {}
    kept, unreadable = check_images(splits, columns, "skip" if on_corrupt == "skip" else "refuse", prints)
    return kept, {name: len(images) for name, images in unreadable.items() if images}


def _source(rows: Dataset, flags: DataFlags, target: Columns) -> tuple[Dataset, Columns]:
    """The readable source data and their columns.

    Raises:
        OptionError: if they are of another kind than the target data.
    """
    splits = DatasetDict({"train": rows})
    columns = find_like(str(flags.source_dataset), splits, target)
    if columns.task != target.task:
        raise OptionError(f"--source_dataset {flags.source_dataset} holds {columns.task}, --dataset {target.task}.")
    return readable(splits, columns, flags.on_corrupt)[0]["train"], columns


def _augmentation(wanted: str | None, columns: Columns, augment_images: bool) -> str:
    if columns.task != "image" and wanted not in (None, "none"):
        raise OptionError(f"--augment {wanted} changes images, but these data are {columns.task}: use none.")
    return wanted or ("basic" if columns.task == "image" and augment_images else "none")


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


def _check_metric(request: Request, columns: Columns) -> None:
    """Check that an evaluation has the score that chooses the best model.

    Raises:
        OptionError: if it does not.
    """
    wanted, metrics = request.given.get("metric_for_best_model"), request.method.metrics
    if wanted is None or any(name not in LOCAL_METRICS for name in metrics):  # which may name their scores freely
        return
    kind: Any = columns.problem_type.removesuffix("_classification")
    known = ["loss", *(metrics or fitting_metrics(kind))]
    if wanted.removeprefix("eval_") not in known:
        raise OptionError(
            f"--metric_for_best_model {wanted} is no score of an evaluation: choose one of {', '.join(known)}."
        )


def _settle(args: TrainingArguments, request: Request, columns: Columns, model: nn.Module) -> None:
    """Set what depends on the model (learning rate, warm-up) and on the data (best model's metric, dropped columns)."""
    usual = request.recommended()
    for name, wanted in request.recommended(model).items():
        if name not in usual or wanted != usual[name]:
            setattr(args, name, wanted.value)
    if columns.task != "text" or request.stream.streaming:
        args.remove_unused_columns = False  # images and sounds are opened on access
    if not torch.accelerator.is_available() and "dataloader_pin_memory" not in request.given:
        args.dataloader_pin_memory = False
    if args.load_best_model_at_end:
        _settle_best_metric(args, request, columns)


def _settle_best_metric(args: TrainingArguments, request: Request, columns: Columns) -> None:
    """Set the best model's metric, unless it is given, and whether higher is better, unless that is."""
    if "metric_for_best_model" not in request.given:
        names = request.method.metrics or ([] if columns.problem_type == "regression" else ["accuracy"])
        args.metric_for_best_model = names[0] if names and names[0] in LOCAL_METRICS else "loss"
    best = str(args.metric_for_best_model).removeprefix("eval_")
    if "greater_is_better" in request.given:
        return
    if best in LOCAL_METRICS:
        args.greater_is_better = LOCAL_METRICS[best].kinds != ("regression",)
    elif best == "loss":
        args.greater_is_better = False
