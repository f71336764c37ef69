"""Refuses flags that would have no effect: whoever sets one expects it to have one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from hf_ft.cli.flags import DataFlags
from hf_ft.core.config import FTConfig
from hf_ft.data.augment import AUGMENTATIONS, check_augmentation
from hf_ft.data.images import OnCorrupt
from hf_ft.data.on_duplicates import OnDuplicates
from hf_ft.errors import OptionError
from hf_ft.models.tasks import Task
from hf_ft.trainer.sharding import check_sharding
from hf_ft.zoo.models import SHORT_NAMES

CHOICES = {"augment": tuple(AUGMENTATIONS), "on_corrupt": get_args(OnCorrupt), "on_duplicates": get_args(OnDuplicates)}
SEEDS = 2**32  # number of seeds that NumPy and scikit-learn accept
# Flags that say something about what another one names.
ABOUT = {"source_split": "source_dataset", "ood_split": "ood_dataset"}
ABOUT |= {"shuffle_buffer": "streaming", "measure_samples": "streaming"}
# Flags that another one with this value switches off.
OFF = {
    ("frozen_cache", "never"): ("frozen_cache_memory_gb", "frozen_cache_disk_gb"),
    ("trials", 0): ("learning_rates", "most_trials", "sampling_seed"),
}
NOT_OF: dict[Task, tuple[str, ...]] = {
    "image": ("max_length", "max_seconds", "text_column", "audio_column"),
    "text": ("image_size", "max_seconds", "image_column", "audio_column", "on_corrupt"),
    "audio": ("image_size", "max_length", "image_column", "text_column"),
}


def check_flags(values: Mapping[str, Any]) -> None:
    """Check the flags that were given against each other.

    Raises:
        OptionError: if a flag has an unknown value or no effect, or if it or the launcher shards the model; the message
            names the flag and the fix.
        ImportError: if one needs a package that is missing.
    """
    check_sharding(values)
    for name, choices in CHOICES.items():
        if values.get(name) not in (None, *choices):
            raise OptionError(f"--{name} {values[name]} is unknown: choose one of {', '.join(choices)}.")
    check_augmentation(values.get("augment") or "none")
    _check_scored(values)
    _check_numbers(values)
    for name, other in ABOUT.items():
        if values.get(name) is not None and values.get(other) is None:
            raise OptionError(f"--{name} {values[name]} has no effect without --{other}: add that, or leave it out.")
    for (name, value), others in OFF.items():
        if name in values and values[name] == value:
            refuse(values, others, f"--{name} is {value}")
    model = values.get("model")
    if model in SHORT_NAMES or (model is not None and Path(model).is_dir()):
        what = "a folder" if Path(model).is_dir() else "a short name"
        refuse(values, ["revision"], f"it refers to a model on the Hub, but --model {model} is {what}")


def _check_scored(values: Mapping[str, Any]) -> None:
    """Refuse training arguments with which an evaluation would have no logits or labels to score."""
    if values.get("prediction_loss_only"):
        raise OptionError("--prediction_loss_only True leaves no logits to score: leave it out.")
    names = values.get("label_names")
    if names not in (None, ["labels"]):
        raise OptionError(
            f"--label_names {' '.join(names)}: models call them labels, whatever the column. Leave it out; "
            "--label_column names the column."
        )


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Refuse numbers with which data cannot be read or processed."""
    seed, length = values.get("split_seed"), values.get("max_length")
    if seed is not None and not 0 <= seed < SEEDS:
        raise OptionError(f"--split_seed {seed} is not a seed: use a number from 0 to {SEEDS - 1}.")
    if length is not None and length < 1:
        raise OptionError(f"--max_length {length} is not a number of tokens: use at least 1, or leave it out.")


def check_task(flags: DataFlags, task: Task) -> None:
    """Check the flags of the data against the kind of data.

    Raises:
        OptionError: if one is for the other kind.
    """
    if flags.max_seconds is not None and not 0 < flags.max_seconds < math.inf:
        raise OptionError(
            f"--max_seconds {flags.max_seconds:g} is not a length in seconds: set it above 0, such as 20."
        )
    given = {field.name: getattr(flags, field.name) for field in fields(flags)}
    refuse(given, NOT_OF[task], f"--dataset {flags.dataset} is read as {task}")


def check_source_data(flags: DataFlags, configs: Iterable[FTConfig]) -> None:
    """Check that a strategy uses the source data, if there are any.

    Raises:
        OptionError: if none does.
    """
    if all(config.needs().source_data == "no" for config in configs):
        refuse({"source_dataset": flags.source_dataset}, ["source_dataset"], "no strategy chosen uses source data")


def refuse(values: Mapping[str, Any], useless: Collection[str], why: str) -> None:
    """Refuse flags that have no effect; None counts as not given.

    Raises:
        OptionError: if one of them is given.
    """
    for name in useless:
        if values.get(name) is not None:
            raise OptionError(f"--{name} {values[name]} has no effect: {why}. Leave it out.")
