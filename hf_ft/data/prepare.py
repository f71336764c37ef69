"""Transforms and collators that turn a data set's rows into model batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import PIL.ImageOps
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    default_data_collator,
)
from transformers.utils import logging

from hf_ft.data.augment import AUGMENTATIONS, POLICIES, augmented, check_augmentation, shrunk
from hf_ft.data.columns import ROW, Columns, unlabelled, values_of
from hf_ft.data.images import open_batch, resized_side
from hf_ft.data.media import IMAGES, SOUNDS, Media
from hf_ft.data.sounds import SECONDS, SoundCollator, sound_transform
from hf_ft.errors import DataError
from hf_ft.models.ensemble.processor import CollaborativeTokenizer

logger = logging.get_logger(__name__)


def _image_batch(
    batch: dict[str, list[Any]], processor: Any, columns: Columns, augment: str, mirrored: bool = False
) -> dict[str, Any]:
    values = batch[columns.inputs[0]]
    rows = batch.get(ROW, range(len(values)))
    side = resized_side(processor)
    images = open_batch(values, rows, side)
    if change := AUGMENTATIONS[augment]:
        images = [shrunk(image, side) for image in images] if augment in POLICIES else images
        images = augmented(images, change, batch.get(ROW))
    images = [PIL.ImageOps.mirror(image) for image in images] if mirrored else images
    ready = {name: list(tensor) for name, tensor in processor(images=images, return_tensors="pt").items()}
    return ready | ({"labels": columns.encode(batch[columns.label])} if columns.label in batch else {})


def image_transform(
    processor: Any, columns: Columns, augment: str = "none", mirrored: bool = False
) -> Callable[[dict[str, Any]], Any]:
    """Create the transform for ``Dataset.set_transform`` that opens, augments and processes a batch of images.

    A damaged image raises a ``DataError`` that names its path and its row in the source (or, for data not loaded by
    :func:`load_splits`, its position in the batch).

    Args:
        mirrored: swap left and right of every image.
    """
    check_augmentation(augment)
    return partial(_image_batch, processor=processor, columns=columns, augment=augment, mirrored=mirrored)


def _text_batch(
    batch: dict[str, list[Any]], tokenizer: Any, columns: Columns, max_length: int | None
) -> dict[str, Any]:
    texts = [batch[column] for column in columns.inputs]
    for column, values in zip(columns.inputs, texts, strict=True):
        if None in values:
            row = batch.get(ROW, range(len(values)))[values.index(None)]
            raise DataError(
                f"row {row} has no text in column {column!r}: drop it, or set text_column", arguments=("text_column",)
            )
    texts = [[value if isinstance(value, str) else str(value) for value in values] for values in texts]
    encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    return encoded | ({"labels": columns.encode(batch[columns.label])} if columns.label in batch else {})


def text_transform(tokenizer: Any, columns: Columns, max_length: int | None = None) -> Callable[[dict[str, Any]], Any]:
    """Create the function for ``Dataset.map(batched=True)`` that tokenises and truncates to ``max_length`` tokens."""
    return partial(_text_batch, tokenizer=tokenizer, columns=columns, max_length=max_length)


def prepare(
    splits: DatasetDict,
    processor: Any,
    columns: Columns,
    augment: str = "none",
    max_length: int | None = None,
    seconds: float = SECONDS,
) -> DatasetDict:
    """Prepare the splits for the Trainer; only ``train`` is augmented.

    Images and sounds are read on access, so the Trainer needs ``remove_unused_columns=False``: their column is not an
    argument of the model. A test split without labels is dropped, with a warning.

    Args:
        processor: the image processor, feature extractor or tokenizer of the model.
        augment: augmentation of training images, from ``AUGMENTATIONS``; text and sounds have none.
        max_length: maximum length of a text in tokens.
        seconds: length to which sounds are cut.

    Raises:
        DataError: if the augmentation is unknown, or the data are not images.
        ImportError: if the augmentation needs a package that is missing.
    """
    check_augmentation(augment, columns.task)
    ready = DatasetDict()
    for name, split in splits.items():
        if name == "test" and unlabelled(split, columns.label, splits.get("train")):
            logger.warning("the test split has rows without a label and is left out")
        elif columns.task == "text":
            tokenise = text_transform(processor, columns, max_length)
            ready[name] = _named(split.map(tokenise, batched=True, remove_columns=split.column_names), columns)
        elif columns.task == "audio":
            named, renamed = _undecoded(split, columns, SOUNDS)
            ready[name] = named.with_transform(sound_transform(processor, renamed, seconds))
        else:
            named, renamed = _undecoded(split, columns, IMAGES)
            change = augment if name == "train" else "none"
            ready[name] = named.with_transform(image_transform(processor, renamed, change))
    return ready


def _named(ready: Dataset, columns: Columns) -> Dataset:
    """A copy with class names, if labels are single classes."""
    if columns.problem_type != "single_label_classification":
        return ready
    return ready.cast_column("labels", ClassLabel(names=list(columns.names)))


def _undecoded(split: Dataset, columns: Columns, media: Media) -> tuple[Dataset, Columns]:
    """The columns that a transform reads: the files, which it opens, and the labels as class numbers."""
    file, label = columns.inputs[0], columns.label
    split = split.select_columns([name for name in (file, label, ROW) if name in split.column_names])
    if columns.problem_type == "single_label_classification":
        # Encoded in the data set itself, not in the transform: label checks and class weights read this column.
        if columns.index is None:
            split = split if label == "labels" else split.rename_column(label, "labels")
        else:
            numbers, feature = columns.encode(values_of(split, label)), ClassLabel(names=list(columns.names))
            split = split.remove_columns(label).add_column("labels", numbers, feature=feature)
        columns = replace(columns, label="labels", index=None)
    # Undecoded: since the transform opens the file, an error can name the row.
    return split.cast_column(file, media.unopened), columns


def collate(processor: Any) -> Callable[[list[Any]], Any]:
    """The collator for prepared rows: padding for a tokenizer or a feature extractor, stacking for images.

    On a CPU, images are stacked with the channels last in memory. The activations of a convolutional network follow,
    and a network with depthwise convolutions is about 1.3 times as fast (docs/performance.md).
    """
    if isinstance(processor, SequenceFeatureExtractor):
        return SoundCollator(processor)
    text = isinstance(processor, PreTrainedTokenizerBase | CollaborativeTokenizer)
    plain = DataCollatorWithPadding(processor) if text else default_data_collator
    return plain if text or torch.cuda.is_available() else _channels_last


def _channels_last(rows: list[Any]) -> dict[str, Any]:
    return {
        name: value.contiguous(memory_format=torch.channels_last)
        if isinstance(value, Tensor) and value.dim() == 4
        else value
        for name, value in default_data_collator(rows).items()
    }


def usual_length(model: Any, processor: Any) -> int:
    """The maximum input length of the model in tokens, at most 512."""
    models = [model, *getattr(model, "members", ())]
    known = [getattr(one.config, "max_position_embeddings", None) for one in models]
    known.append(getattr(processor, "model_max_length", None))
    # Some configs and tokenizers express "unlimited" by -1 or a huge number.
    return min([512, *(length for length in known if isinstance(length, int) and length > 0)])
