"""Pretrained models with a new head for the classes of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from hf_ft.data.columns import Columns
from hf_ft.errors import DataError, OptionError
from hf_ft.models.tasks import classes_of
from hf_ft.zoo.models import SHORT_NAMES, load_model
from hf_ft.zoo.reading import read_config
from hf_ft.zoo.sources import load_sources

logger = logging.get_logger(__name__)


def load_classifier(
    name: str,
    columns: Columns,
    seed: int,
    image_size: int | None = None,
    revision: str | None = None,
    keep_source_head: bool = False,
    head: str | None = None,
) -> tuple[Any, Any]:
    """The model with a new head for these classes, and its image processor, feature extractor or tokenizer.

    Args:
        name: a short name, a Hub id or a folder.
        seed: seed of the new head.
        keep_source_head: also keep the pretrained head.
        head: name of the head module, if it cannot be determined.

    Raises:
        OptionError: if the model's config or processor cannot be read.
        CheckpointError: if its weights cannot be loaded.
        DataError: if the model is for another kind of data.
    """
    _check_task(name, columns, revision)
    model, processor = load_model(
        name,
        **_labels(columns),
        task=columns.task,
        seed=seed,
        image_size=image_size,
        revision=revision,
        keep_source_head=keep_source_head,
        head=head,
    )
    model.config.problem_type = columns.problem_type
    if columns.task == "text":
        settle_padding(name, model, processor)
    _check_processor(name, processor, columns)
    return model, processor


def settle_padding(name: str, model: Any, tokenizer: Any) -> None:
    """Pad with the end-of-sequence token if a tokenizer has no padding token, as with GPT-2 and Llama.

    Raises:
        DataError: if there is no such token either, or the model does not know all tokens.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError(
                f"the tokenizer of {name} has neither a padding nor an end-of-sequence token, so texts cannot be "
                "batched: add one with tokenizer.add_special_tokens({'pad_token': ...}) and save it with the model."
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning(f"the tokenizer of {name} has no padding token: texts are padded with {tokenizer.eos_token!r}.")
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise DataError(
            f"the tokenizer of {name} has {len(tokenizer):,} tokens, but its model only {known:,}: save the tokenizer "
            "that belongs to it, or enlarge the model with model.resize_token_embeddings(len(tokenizer))."
        )
    # Decoders find the last token by this number; configs without padding have None or -1.
    model.config.pad_token_id = tokenizer.pad_token_id


def load_ensemble(
    names: Sequence[str], columns: Columns, seed: int, image_size: int | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """Like :func:`load_classifier`, with one member from each of several source models."""
    model, processor = load_sources(
        names, **_labels(columns), task=columns.task, seed=seed, image_size=image_size, revision=revision
    )
    model.config.problem_type = columns.problem_type
    _check_processor(", ".join(names), processor, columns)
    return model, processor


def _check_processor(name: str, processor: Any, columns: Columns) -> None:
    """Process one sample: configs are read without checking their values, which would fail only in training.

    Raises:
        OptionError: if that fails.
    """
    try:
        if columns.task == "audio":
            processor(np.zeros(processor.sampling_rate, np.float32), sampling_rate=processor.sampling_rate)
        elif columns.task == "image":
            processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
        else:
            processor(*("a" for _ in columns.inputs))
    except Exception as error:  # values of any type may be wrong anywhere
        what = "tokenizer" if columns.task == "text" else "preprocessor_config.json"
        raise OptionError(
            f"{name}: its {what} cannot process a sample ({type(error).__name__}: {error}). Restore the file, or use "
            "another model."
        ) from error


def _labels(columns: Columns) -> dict[str, Any]:
    return {"id2label": columns.id2label} if columns.names else {"num_labels": 1}


def _check_task(name: str, columns: Columns, revision: str | None) -> None:
    if name in SHORT_NAMES:
        fits, kind = SHORT_NAMES[name].task == columns.task, "a short name"
    else:
        config = read_config(name, revision=revision or "main")
        fits, kind = bool(classes_of(config, columns.task)), type(config).__name__
    if not fits:
        raise DataError(
            f"{name} ({kind}) is not a classifier of {columns.task} data, but column {columns.inputs[0]!r} is read as "
            f"{columns.task}: choose another model, or set image_column, audio_column or text_column.",
            arguments=("image_column", "audio_column", "text_column"),
        )
