"""One training attempt: the state that is created whenever training begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ft.engine.batch import row_shares, users_columns
from hf_ft.engine.objective import Objective
from hf_ft.engine.stepper import Stepper
from hf_ft.errors import DataError
from hf_ft.trainer.loss_log import TermLog
from hf_ft.trainer.protocols import ForAttempt
from hf_ft.trainer.source_streams import SourceStreams
from hf_ft.trainer.stage_cache import StageCache
from hf_ft.trainer.training_stream import TrainingStream


@dataclass(frozen=True, eq=False)
class Attempt:
    """The state of a Trainer during training, kept until training begins again.

    Another call to ``train()``, or a restart with smaller batches after running out of memory, is a new attempt.
    Evaluation without training is also an attempt, with an empty plan.

    Attributes:
        objective: the module that the Trainer trains in place of the model.
        stepper: moves the objective through its stages.
        log: the loss terms since the last log.
        cache: the recorded outputs of frozen parts.
        data: the training data, if they are streamed.
        streams: the source data used in addition to the target data.
        accumulation: number of micro-batches of an update, except for the last update of an epoch.
        shares: shares of the micro-batches that are still to come in this update; see :class:`Objective`.
        epoch: number of the current epoch, from 0, in memory that is shared with the workers of a data loader.
    """

    objective: Objective
    stepper: Stepper
    log: TermLog
    cache: StageCache
    data: TrainingStream
    streams: SourceStreams
    accumulation: int = 1
    shares: deque[float] = field(default_factory=deque)
    epoch: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_())

    @classmethod
    def begin(cls, trainer: ForAttempt, objective: Objective, last: Attempt | None) -> Attempt:
        """Start a new attempt and end the previous one."""
        if last is not None:
            last.end()
        cache = StageCache(trainer, objective)
        stepper = Stepper(objective, borders=(), then=lambda _: cache.start(stepper.left))
        log = TermLog(objective.plan.terms, set() if last is None else last.log.told)
        data, streams = TrainingStream(trainer, objective), SourceStreams(trainer, objective)
        return cls(objective, stepper, log, cache, data, streams, trainer.args.gradient_accumulation_steps)

    def enter(self, step: int) -> None:
        """Enter the stage that this optimizer step (from 0) belongs to."""
        self.stepper(step)
        self.cache.leave_out_unused()

    def begin_epoch(self, epoch: int, step: int, looking: Callable[[], dict[str, Any]]) -> None:
        """Determine the rates of single tensors for an epoch that begins with this optimizer step, if there are any."""
        if self.objective.plan.tensor_rates is not None:
            self.enter(step)
            self.stepper.begin_epoch(epoch, **looking())

    def begin_update(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Note how the rows of an update are distributed over its micro-batches."""
        self.shares.clear()
        self.shares.extend(row_shares(batches))
        self.log.update_size = len(batches)

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """The outputs of the objective, as wrapped by the Trainer, for a batch of the Trainer's loader.

        Raises:
            DataError: if the outputs contain no loss.
        """
        self.objective.share = self.shares.popleft() if self.objective.training and self.shares else 1.0
        outputs = model(**self.streams.add(self.cache.present_form(batch), self._missing()))
        if outputs.get("loss") is None:
            raise DataError(
                f"the model returned no loss, only {sorted(outputs)}, for the inputs {sorted(users_columns(batch))}. "
                "Does the data set have a column of labels (see args.label_names, and label_column)?",
                arguments=("label_column",),
            )
        self.log.add(outputs.pop("terms", None))
        return outputs

    def _missing(self) -> int:
        """The number of micro-batches that this update lacks, given with its last one."""
        return 0 if self.shares else self.accumulation - self.log.update_size

    def end(self) -> None:
        """Drop all recordings and stop reading data."""
        self.cache.forget()
        self.streams.close()


class ForStages(Protocol):
    """The part of a Trainer that stage changes need."""

    _attempt: Attempt | None

    def _finish_run(self) -> None: ...


class StageBorders(TrainerCallback):
    """Moves the current attempt of a Trainer through the stages of its plan."""

    def __init__(self, trainer: ForStages) -> None:
        self._trainer = trainer

    def _enter(self, step: int) -> None:
        assert self._trainer._attempt is not None
        self._trainer._attempt.enter(step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._enter(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._enter(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._finish_run()
