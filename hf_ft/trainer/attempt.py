"""One attempt at training: what is made anew whenever training begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ft.engine.batch import users_columns
from hf_ft.engine.objective import Objective
from hf_ft.engine.run import Stepper
from hf_ft.trainer.loss_log import TermLog
from hf_ft.trainer.protocols import ForAttempt
from hf_ft.trainer.source_streams import SourceStreams
from hf_ft.trainer.stage_cache import StageCache


@dataclass(frozen=True, eq=False)
class Attempt:
    """What a Trainer holds while it trains, and until it trains again.

    A further ``train()``, or smaller batches after running out of memory, are another attempt. Evaluation alone
    is one too, of a plan without stages.

    Attributes:
        objective: what the Trainer trains in the model's place.
        stepper: moves it through its stages.
        log: the summands of the loss since the last log.
        cache: what is frozen, and recorded.
        streams: source data beside the target's.
    """

    objective: Objective
    stepper: Stepper
    log: TermLog
    cache: StageCache
    streams: SourceStreams

    @classmethod
    def begin(cls, trainer: ForAttempt, objective: Objective, last: Attempt | None) -> Attempt:
        """A new attempt in place of the last one, which ends."""
        if last is not None:
            last.end()
        cache = StageCache(trainer, objective)
        stepper = Stepper(objective, borders=(), then=lambda _: cache.start(stepper.left))
        log = TermLog(objective.plan.terms, set() if last is None else last.log.told)
        return cls(objective, stepper, log, cache, SourceStreams(trainer, objective))

    def enter(self, step: int) -> None:
        """Be where this optimizer step (from 0) belongs."""
        self.stepper(step)
        self.cache.leave_out_unused()

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """What the objective, as the Trainer wrapped it, gives for a batch of the Trainer's loader.

        Raises:
            ValueError: no loss among it.
        """
        outputs = model(**self.streams.add(self.cache.present_form(batch)))
        if outputs.get("loss") is None:
            raise ValueError(
                f"the model returned no loss, only {sorted(outputs)}, for the inputs {sorted(users_columns(batch))}. "
                "Is there a column of labels in the data set (see args.label_names)?"
            )
        self.log.add(outputs.pop("terms", None))
        return outputs

    def end(self) -> None:
        """Give up what was recorded, and what reads data."""
        self.cache.forget()
        self.streams.close()


class ForStages(Protocol):
    """To go through stages."""

    _attempt: Attempt | None

    def _finish_run(self) -> None: ...


class StageBorders(TrainerCallback):
    """Moves a Trainer's attempt through the stages of its plan."""

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
