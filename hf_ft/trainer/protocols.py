"""Protocols: the parts of the Trainer that each collaborator uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import datasets
import numpy as np
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_ft.core.config import FTConfig
from hf_ft.core.context import Context, FrozenCache, State
from hf_ft.core.task_loss import TaskLoss
from hf_ft.data.info import DataInfo
from hf_ft.data.mixing import Mixing
from hf_ft.engine.run import Run

Collate = Callable[[list[Any]], Any]


class ForData(Protocol):
    """To read samples in the same way as training."""

    args: TrainingArguments
    train_dataset: Any
    data_collator: Any

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]: ...
    def _remove_unused_columns(self, dataset: datasets.Dataset, description: str | None = None) -> datasets.Dataset: ...
    def _get_collator_with_removed_columns(self, data_collator: Collate, description: str | None = None) -> Collate: ...


class ForProbe(ForData, Protocol):
    """To test a batch of one sample."""

    _train_batch_size: int

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int) -> DataLoader: ...


class ForCache(ForData, Protocol):
    """To record the outputs of frozen parts."""

    accelerator: Accelerator
    frozen_cache: FrozenCache
    mixing: Mixing


class ForMixing(ForCache, Protocol):
    """To check the loss of mixed batches."""

    model: Any
    task_loss: TaskLoss

    def context(self) -> Context: ...


class ForStreams(ForData, Protocol):
    """To read source data in addition to the target data."""

    source_dataset: Any
    source_data_collator: Collate | None
    _train_batch_size: int


class ForTrainingStream(ForCache, Protocol):
    """To read streamed training data."""

    model: Any
    shuffle_buffer: int


class ForAttempt(ForStreams, ForTrainingStream, Protocol):
    """To run one training attempt."""


class ForContext(ForCache, ForStreams, Protocol):
    """To let strategies measure the data."""

    configs: tuple[FTConfig, ...]
    model: Any
    plain_train_dataset: Any
    groups: np.ndarray | None
    measure_samples: int
    shuffle_buffer: int
    looked_at: Any
    task_loss: TaskLoss

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, Any]: ...


class ForSelection(ForContext, Protocol):
    """To choose among final models."""

    callback_handler: CallbackHandler
    control: TrainerControl
    eval_dataset: Any
    optimizer: Any
    quiet: bool

    def evaluate(self) -> dict[str, float]: ...
    def log(self, logs: dict[str, float]) -> None: ...


class ForCard(Protocol):
    """To write the model card."""

    args: TrainingArguments
    configs: tuple[FTConfig, ...]
    model: Any
    state: TrainerState
    data_info: DataInfo | None
    test_metrics: Mapping[str, float]
    hub_model_id: str | None
    mixing: Mixing
    processing_class: Any

    @property
    def states(self) -> Mapping[str, State]: ...


class ForPushing(ForCard, Protocol):
    """To upload to the Hub."""

    callback_handler: CallbackHandler
    control: TrainerControl
    push_in_progress: Any

    def _finish_current_push(self) -> None: ...
    def create_model_card(self, *args: Any, **kwargs: Any) -> None: ...
    def is_world_process_zero(self) -> bool: ...
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...


class ForCheckpoints(ForPushing, Protocol):
    """To save and load checkpoints."""

    accelerator: Accelerator
    hp_search_backend: Any
    is_in_train: bool
    processing_class: Any
    overwrite: bool
    _run: Run | None

    def _get_output_dir(self, trial: Any) -> str: ...
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None: ...
    def _save_rng_state(self, output_dir: str) -> None: ...
    def _save_scaler(self, output_dir: str) -> None: ...
    def store_flos(self) -> None: ...
