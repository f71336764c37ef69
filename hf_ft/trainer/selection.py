"""The choice among final models, on the Trainer's evaluation data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.utils import logging

from hf_ft.engine.run import Run
from hf_ft.engine.selection import CHOICE, Judge
from hf_ft.errors import OptionError
from hf_ft.models.preserve import random_states_kept
from hf_ft.trainer.context import batches_of
from hf_ft.trainer.protocols import ForSelection

logger = logging.get_logger(__name__)


def metric_of(args: TrainingArguments) -> tuple[str, bool]:
    """The metric to choose by, as evaluation names it, and whether higher is better: the one of the best model."""
    metric = args.metric_for_best_model
    if metric is None:
        return "eval_loss", False
    return metric if metric.startswith("eval_") else f"eval_{metric}", bool(args.greater_is_better)


def select(trainer: ForSelection, run: Run) -> Run:
    """Make the choices of a run's plan on the Trainer's evaluation data, and log them with the chosen model's metrics.

    Raises:
        OptionError: if the evaluation lacks the metric.
    """
    if not run.plan.select:
        return run
    leave_training = getattr(trainer.optimizer, "eval", None)  # some optimizers keep two sets of weights
    if callable(leave_training):
        leave_training()
    metric, greater_is_better = metric_of(trainer.args)
    evaluated: list[tuple[float, dict[str, float]]] = []

    def score() -> float:
        with _quiet(trainer), random_states_kept():
            metrics = broadcast_object_list([trainer.evaluate()])[0] if _several(trainer) else trainer.evaluate()
        if metric not in metrics:
            raise OptionError(
                f"{run.plan.select[0].name} chooses by {metric}, which is missing from the evaluation (it has "
                f"{', '.join(sorted(metrics))}): set metric_for_best_model. The model is left as trained."
            )
        evaluated.append((metrics[metric], metrics))
        return float(metrics[metric])

    judge = Judge(
        score=score if _can_judge(trainer.eval_dataset, metric, run) else None,
        greater_is_better=greater_is_better,
        metric=metric,
        batches=partial(training_batches, trainer),
        computing=trainer.accelerator.autocast,
        reduce=partial(trainer.accelerator.reduce, reduction="sum"),
    )
    chosen = run.select_by(judge)
    trainer.log({**_metrics(chosen, evaluated), **_logged(chosen)})
    return chosen


def _can_judge(dataset: Any, metric: str, run: Run) -> bool:
    """Whether there are evaluation data and, if all choices are optional, whether their metric is known to be there."""
    if dataset is None or not all(selection.optional for selection in run.plan.select):
        return dataset is not None
    return not isinstance(dataset, Mapping) or any(metric.startswith(f"eval_{name}_") for name in dataset)


def is_choice(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of the log is about the model chosen after training, and not about one during it."""
    return any(name.startswith(f"{CHOICE}/") for name in entry)


@contextmanager
def _quiet(trainer: ForSelection) -> Iterator[None]:
    """Evaluate without logs and callbacks: the scores of candidates are not part of the run."""
    handler, control = trainer.callback_handler, trainer.control
    trainer.callback_handler = CallbackHandler(
        [DefaultFlowCallback()], handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
    )
    trainer.quiet = True
    try:
        yield
    finally:
        trainer.callback_handler, trainer.control, trainer.quiet = handler, control, False


def _several(trainer: ForSelection) -> bool:
    return trainer.args.world_size > 1


def training_batches(trainer: ForSelection) -> Iterator[dict[str, Any]]:
    """The training data, augmented as in training but the same in each pass."""
    batches, number = batches_of(trainer), 0
    while True:
        with random_states_kept(seed=trainer.args.seed + number):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
        number += 1


def _metrics(run: Run, evaluated: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """The metrics of the model that was chosen last."""
    if not evaluated:
        return {}
    last = run.plan.select[-1]
    offset = len(evaluated) - len(last.candidates)
    index = last.candidates.index(run.states[last.name].info[CHOICE]["value"])
    return evaluated[offset + index][1]


def _logged(run: Run) -> dict[str, float]:
    found: dict[str, float] = {}
    for selection in run.plan.select:
        record: Mapping[str, Any] = run.states[selection.name].info[CHOICE]
        found[f"{CHOICE}/{selection.name}"] = record["value"]
        if len(record["scores"]) > 1:
            scores = {value: math.nan if score is None else score for value, score in record["scores"]}
            found |= {f"{CHOICE}/{selection.name}/{value:g}": score for value, score in scores.items()}
    return found
