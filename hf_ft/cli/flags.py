"""Flags of the commands, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hf_ft.core.config import strategies
from hf_ft.core.options import options
from hf_ft.data.augment import AUGMENTATIONS
from hf_ft.data.sounds import SECONDS
from hf_ft.metrics import LOCAL_METRICS
from hf_ft.zoo.datasets import DATASETS
from hf_ft.zoo.models import SHORT_NAMES

# Flags that give several source models instead of one, by strategy.
SOURCES_FLAGS = {n: f"--{n}.{kind.sources_option}" for n, kind in strategies().items() if kind.sources_option}
BUDGET = "budget"  # the option of strategies that --budget sets
BUDGETED = [name for name, kind in strategies().items() if any(f.name == BUDGET for f in options(kind))]
# Opening all images takes as long as reading them in one epoch; for larger data sets the user must request it.
CHECKED_UNASKED = 20_000
TEXTS_UNASKED = 200_000  # texts that are searched for duplicates by default
BUFFER, LOOKED_AT = 1000, 256


def _flag(help: str, default: Any = None, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


def _list_flag(help: str) -> Any:
    return field(default_factory=list, metadata={"help": help, "action": "extend"})


@dataclass
class DataFlags:
    """Flags of model and data, for HfArgumentParser."""

    model: str | None = _flag(
        f"Hub id, folder written by save_pretrained, or one of {', '.join(SHORT_NAMES)}; several: "
        f"{' or '.join(SOURCES_FLAGS.values())} a,b"
    )
    dataset: str | None = _flag(
        "Hub id; folder with a subfolder of images or sounds per class, or with such a folder per split; csv, tsv, "
        "json, jsonl or parquet file, or a folder of them; folder written by save_to_disk; or one of "
        f"{', '.join(DATASETS)}"
    )
    revision: str | None = _flag("branch, tag or commit of the model on the Hub")
    config_name: str | None = _flag("configuration of a Hub data set")
    train_split: str = _flag("name of the training split", "train")
    validation_split: str | None = _flag("validation split (default: by its usual names, or else part of train)")
    test_split: str | None = _flag("test split (default: by its usual names, if there is one)")
    validation_fraction: float = _flag("fraction of train to hold out if there is no validation split", 0.2)
    split_seed: int = _flag("seed of the rows held out, independent of --seed", 0)
    max_train_samples: int | None = _flag("maximum number of training rows, drawn stratified by class")
    image_column: str | None = _flag("name of the image column (default: found by name and type)")
    audio_column: str | None = _flag("name of the audio column (default: found by name and type)")
    text_column: str | None = _flag("name of the text column, or two joined by a comma for pairs")
    label_column: str | None = _flag("name of the label column (default: found by name and type)")
    group_column: str | None = _flag("column of groups, such as patients: each group stays in one split")
    image_size: int | None = _flag("image side in pixels (default: that of the checkpoint or the short name)")
    max_length: int | None = _flag("maximum text length in tokens (default: that of the model, at most 512)")
    max_seconds: float | None = _flag(f"length to which sounds are cut (default: {SECONDS:g})")
    augment: str | None = _flag(f"of training images: {', '.join(AUGMENTATIONS)} (default: basic)")
    on_corrupt: str | None = _flag(
        "unreadable images or sounds: refuse or skip (default: refuse; checked before training if there are at most "
        f"{CHECKED_UNASKED:,}, or if this flag is given)"
    )
    on_duplicates: str | None = _flag(
        "duplicates and near duplicates: warn, drop (from train), refuse or ignore (default: warn, for at most "
        f"{CHECKED_UNASKED:,} files or {TEXTS_UNASKED:,} texts)"
    )
    encoding: str | None = _flag("encoding of csv and tsv files, such as latin-1 (default: UTF-8)")
    unknown_classes: Literal["refuse", "drop"] = _flag(
        "rows of other splits with a class that no training row has", "refuse"
    )
    source_dataset: str | None = _flag("source data (of pretraining), for strategies that use them: soft, co_tuning")
    source_split: str = _flag("split of the source data", "train")


@dataclass
class StreamFlags:
    """Streaming of the training rows."""

    streaming: bool = _flag("read training rows as they come, without a copy on disk; needs --max_steps", False)
    shuffle_buffer: int | None = _flag(f"rows shuffled at a time when streaming (default: {BUFFER})")
    measure_samples: int | None = _flag(
        f"rows that a strategy may measure before streaming; 0 for none (default: {LOOKED_AT})"
    )


@dataclass
class MethodFlags:
    """Strategy and scores."""

    strategy: list[str] = _list_flag("name from `hf-ft list`; repeat the flag to compose several (default: full)")
    metrics: list[str] = _list_flag(
        f"metrics to report: {', '.join(LOCAL_METRICS)} are computed locally, any other by evaluate.load, which runs "
        "code from the Hub (default: all local ones that apply)"
    )
    class_weights: Literal["balanced", "none"] = _flag("balanced: weight classes by their inverse frequency", "none")
    frozen_cache: Literal["auto", "always", "never"] = _flag(
        "compute the frozen part of a stage only once; auto: if samples are the same on every read (--augment none)",
        "auto",
    )
    frozen_cache_memory_gb: float = _flag("maximum size in memory; the rest goes to a temporary file", 2.0)
    frozen_cache_disk_gb: float = _flag("maximum size of that file", 20.0)
    mixup: float = _flag("mix the images of a batch: alpha, such as 0.2", 0.0)
    cutmix: float = _flag("paste parts of other images of the batch: alpha, such as 1", 0.0)
    patience: int | None = _flag("stop after this many evaluations without a better score (default: never)")
    budget: str | None = _flag(f"cost of the run in full fine-tuning runs, such as 3x; for {' and '.join(BUDGETED)}")
    uncalibrated: bool = _flag("fit no temperature on the validation data (see `hf-ft predict`)", False)
    overwrite: bool = _flag("continue even if output_dir is not empty; checkpoints in it are deleted", False)


# Used where the defaults of TrainingArguments do not suit a few hundred images.
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/train",
    "num_train_epochs": 16,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_strategy": "epoch",
    "load_best_model_at_end": True,
    "log_level_replica": "error",
}
EVALUATIONS = 16  # when streaming, which has no epochs
