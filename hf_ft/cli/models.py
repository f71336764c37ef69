"""Models by name, for the commands: resolve a name, check that it fits the data, and show how to load the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from hf_ft.data.columns import Columns
from hf_ft.errors import OptionError
from hf_ft.models.ensemble.processor import CollaborativeTokenizer
from hf_ft.zoo.models import SHORT_NAMES, load_model
from hf_ft.zoo.sources import load_sources


def read_config(name: str) -> Any:
    """The config of a Hub id or a folder.

    Raises:
        OptionError: if there is no config, or Transformers does not know its model type.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"cannot read the model {name!r}: {str(error).strip().splitlines()[0]} It may be a Hub id, a folder "
            f"written by save_pretrained, or one of {', '.join(SHORT_NAMES)}."
        ) from error


def skeleton(name: str) -> nn.Module:
    """A classifier for inspection. For a Hub id or a folder only the config is read: no weights, no memory."""
    if name in SHORT_NAMES:
        return load_model(name)[0]
    config = read_config(name)
    image = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if not image and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise OptionError(f"{name} ({type(config).__name__}) is neither an image nor a text classifier.")
    auto = AutoModelForImageClassification if image else AutoModelForSequenceClassification
    with torch.device("meta"):
        return auto.from_config(config)


def load_classifier(
    name: str,
    columns: Columns,
    seed: int,
    image_size: int | None = None,
    revision: str | None = None,
    keep_source_head: bool = False,
    head: str | None = None,
) -> tuple[Any, Any]:
    """The model with a new head for these classes, and its image processor or tokenizer.

    Raises:
        OptionError: if the model cannot be read, or is for another kind of data.
    """
    if name in SHORT_NAMES:
        fits, kind = SHORT_NAMES[name].task == columns.task, "a short name"
    else:
        image = columns.task == "image"
        config = read_config(name)
        mapping = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if image else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        fits, kind = type(config) in mapping, type(config).__name__
    if not fits:
        raise OptionError(
            f"--model {name} ({kind}) is no {columns.task} classifier, and column {columns.inputs[0]!r} of the data "
            f"is read as {columns.task}: choose another model, or set --image_column or --text_column."
        )
    labels: dict[str, Any] = {"id2label": columns.id2label} if columns.names else {"num_labels": 1}
    more: dict[str, Any] = {"task": columns.task, "seed": seed, "image_size": image_size, "revision": revision}
    more |= {"keep_source_head": keep_source_head, "head": head}
    model, processor = load_model(name, **labels, **more)
    model.config.problem_type = columns.problem_type
    return model, processor


def load_ensemble(
    names: Sequence[str], columns: Columns, seed: int, image_size: int | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """Like :func:`load_classifier`, with one member from each of several source models."""
    labels: dict[str, Any] = {"id2label": columns.id2label} if columns.names else {"num_labels": 1}
    model, processor = load_sources(
        names, **labels, image_size=image_size, seed=seed, task=columns.task, revision=revision
    )
    model.config.problem_type = columns.problem_type
    return model, processor


def usage(folder: str | Path, task: str, example: str | Path | None = None, processor: Any = None) -> str:
    """How to use a checkpoint with Transformers alone; pass ``processor`` only if it has several parts."""
    given = example or ("photo.png" if task == "image" else "some text")
    several = isinstance(processor, CollaborativeTokenizer)  # not supported by AutoTokenizer
    tokenizer = f', tokenizer=hf_ft.CollaborativeTokenizer.from_pretrained("{folder}")' if several else ""
    return (
        "  from transformers import pipeline\n\n"
        f'  classify = pipeline("{task}-classification", model="{folder}"{tokenizer})\n'
        f'  print(classify("{given}"))'
    )


def ensemble_usage(folder: str | Path, task: str, processor: Any) -> str:
    """How to use an ensemble: importing hf_ft registers it with Transformers."""
    return f"  import hf_ft\n{usage(folder, task, processor=processor)}"


def adapter_usage(folder: str | Path) -> str:
    """How to load an adapter onto its base model with PEFT alone."""
    return (
        "  from peft import PeftModel\n\n"
        "  # base: the pretrained model with a head of as many classes\n"
        f'  model = PeftModel.from_pretrained(base, "{folder}")'
    )
