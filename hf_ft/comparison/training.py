"""A single training run of a comparison, from a new model to its scores."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn
from transformers import EvalPrediction, PrinterCallback, TrainerCallback, TrainingArguments

from hf_ft.comparison.contenders import Entrant
from hf_ft.comparison.cost import MB, Clock, PeakMemory, now
from hf_ft.comparison.outputs import LOGITS, TESTS, scored
from hf_ft.comparison.results import Distance, Point, Training
from hf_ft.comparison.settings import FIXED, under
from hf_ft.comparison.tracking import Tracking
from hf_ft.core.compose import recommended_arguments
from hf_ft.core.context import State
from hf_ft.core.head_rate import UNSET_RATE
from hf_ft.core.search_space import RATE
from hf_ft.data.mixing import Mixing
from hf_ft.data.rows import read_rows
from hf_ft.diagnostics.distortion import feature_distortion
from hf_ft.engine.selection import choices
from hf_ft.engine.work import Work
from hf_ft.errors import AnatomyError, OptionError
from hf_ft.metrics import classification_metrics
from hf_ft.trainer.patience import patience_callback
from hf_ft.trainer.selection import is_choice
from hf_ft.trainer.trainer import ClassWeights, FTTrainer

PACKAGES = ("hf-ft", "torch", "transformers", "accelerate", "datasets")


@dataclass(frozen=True)
class CommonSettings:
    """The training settings shared by all contenders.

    Attributes:
        arguments: training arguments.
        metric: a metric from ``hf_ft.metrics.LOCAL_METRICS``.
        greater_is_better: whether higher values of the metric are better.
        class_weights: class weights of the task loss.
        distortion_samples: number of samples of each test set used to measure feature distortion.
        device: type of the device whose time is measured.
        patience: epochs without a better validation score after which training ends; None for never.
        mixing: how the images of a training batch are mixed.
        tracking: where the training runs are logged.
    """

    arguments: Mapping[str, Any]
    metric: str
    greater_is_better: bool
    class_weights: ClassWeights | None = None
    distortion_samples: int = 0
    device: str = "cpu"
    patience: int | None = None
    mixing: Mixing = Mixing()
    tracking: Tracking = Tracking()


@dataclass(frozen=True)
class Measured:
    """The measurements of a contender's strategies, and their cost in compute seconds."""

    states: Mapping[str, State]
    compute: float


def train(
    entrant: Entrant,
    values: Mapping[str, Any],
    seed: int,
    common: CommonSettings,
    work: Path,
    measured: Measured | None = None,
    save_to: Path | None = None,
    final: bool = False,
    on_measured: Callable[[Measured], None] = lambda measured: None,
    counted: Work | None = None,
    run: str = "",
) -> Training:
    """Train once and return scores and costs.

    Args:
        values: the learning rate and tuned options.
        seed: seed of the head initialization, data order and dropout.
        work: temporary folder for checkpoints, deleted afterwards.
        measured: measurements of an earlier training run of this contender; by default the strategies measure now.
        save_to: where the best epoch's model is saved, if it is kept.
        final: whether it is a final run, whose model is scored on the test sets.
        on_measured: called with new measurements.
        counted: counts the work.
        run: name of the run in the trackers; by default, nothing is logged.
    """
    configs = entrant.with_settings(values)
    with temporary(work), collected_warnings() as said, common.tracking.start(run, configs) as tracked:
        with counted or nullcontext(), PeakMemory(common.device) as memory:
            model = entrant.bench.load(seed, entrant.keeps_head)
            trainer = trainer_for(entrant, values, seed, common, work, model, measured, common.tracking.arguments(run))
            if measured is None:
                began = now(common.device)[1]
                states = dict(trainer.measure())
                on_measured(Measured(states, now(common.device)[1] - began if entrant.looks else 0.0))
                if counted is not None:
                    counted.measured = counted.total
            clock = Clock(common.device, counted)
            trainer.add_callback(clock)
            trainer.add_callback(EndDiverged(trainer.model))
            if common.patience is not None:
                trainer.add_callback(patience_callback(common.patience, trainer.args))
            trainer.add_callback(tracked)
            trainer.train()
        training = _result(trainer, values, seed, common, clock, memory.mb)
        if save_to is not None and not training.error:
            shutil.rmtree(save_to, ignore_errors=True)
            trainer.save_model(str(save_to))
            size = sum(file.stat().st_size for file in save_to.rglob("*.safetensors")) / MB
            training = dataclasses.replace(training, checkpoint_mb=size)
        if final and not training.error:
            training = _tested(training, trainer, entrant, common, save_to)
        tracked.outcome = training
    return dataclasses.replace(training, warnings=tuple(dict.fromkeys(said)), versions=versions())


def averaged(trainings: Sequence[Training]) -> Training:
    """The means of training runs with the same settings on several folds, as one run; failed if any of them failed."""
    first, *others = trainings
    if not others:
        return first
    scores = [training.validation for training in trainings if training.validation is not None]
    points = zip(*(training.curve for training in trainings), strict=False)
    return dataclasses.replace(
        first,
        validation=fmean(scores) if len(scores) == len(trainings) else None,
        curve=tuple(Point(epoch=p[0]["epoch"], validation=fmean(point["validation"] for point in p)) for p in points),
        chosen={name: fmean(training.chosen[name] for training in trainings) for name in first.chosen},
        passes=round(fmean(training.passes for training in trainings)),
        peak_memory_mb=max(training.peak_memory_mb for training in trainings),
        warnings=tuple(dict.fromkeys(warning for training in trainings for warning in training.warnings)),
        error=next((training.error for training in trainings if training.error), ""),
        best_epoch=fmean(training.best_epoch for training in trainings),
        seconds=fmean(training.seconds for training in trainings),
        compute=fmean(training.compute for training in trainings),
        evaluation_seconds=fmean(training.evaluation_seconds for training in trainings),
        share=fmean(training.share for training in trainings),
    )


def versions() -> dict[str, str]:
    """Versions of the packages that affect the results."""
    return {name: version(name) for name in PACKAGES}


def trainer_for(
    entrant: Entrant,
    values: Mapping[str, Any],
    seed: int,
    common: CommonSettings,
    work: Path,
    model: nn.Module,
    measured: Measured | None,
    tracking: Mapping[str, Any] = MappingProxyType({}),
) -> FTTrainer:
    """A trainer with the settings of the comparison, and training arguments for trackers."""
    data, configs = entrant.bench.data, entrant.with_settings(values)
    optim = entrant.optim(values)
    shared = under(common.arguments, optim, recommended_arguments(configs, optim, model))
    args = TrainingArguments(
        str(work),
        **{"dataloader_pin_memory": common.device == "cuda"} | shared | FIXED,
        **tracking,
        learning_rate=values.get(RATE, UNSET_RATE),
        seed=seed,
        metric_for_best_model=common.metric,
        greater_is_better=common.greater_is_better,
    )
    trainer = FTTrainer(
        model,
        args,
        strategy=configs,
        states=None if measured is None else measured.states,
        class_weights=common.class_weights,
        train_dataset=data["train"],
        plain_train_dataset=entrant.bench.plain,
        groups=entrant.bench.groups,
        eval_dataset=data["validation"],
        source_dataset=entrant.bench.source if _takes_source(entrant) else None,
        data_collator=entrant.bench.collate,
        processing_class=entrant.bench.processor,
        compute_metrics=finite_metrics,
        mixup=common.mixing.mixup,
        cutmix=common.mixing.cutmix,
    )
    trainer.data_info = entrant.bench.info
    trainer.remove_callback(PrinterCallback)
    return trainer


def _takes_source(entrant: Entrant) -> bool:
    return any(config.needs().source_data != "no" for config in entrant.configs)


def finite_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """All applicable local metrics; nan for all if the outputs are not finite because training diverged."""
    outputs = prediction.predictions
    logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
    if np.isfinite(logits).all():
        return classification_metrics(prediction)
    zeros = prediction.__class__(np.zeros_like(logits), prediction.label_ids)
    return dict.fromkeys(classification_metrics(zeros), math.nan)


def _result(
    trainer: FTTrainer, values: Mapping[str, Any], seed: int, common: CommonSettings, clock: Clock, peak: float
) -> Training:
    curve = _curve(trainer, common.metric)
    found = [point for point in curve if math.isfinite(point["validation"])]
    sign = 1 if common.greater_is_better else -1
    # The first among equals, as in Trainer.
    best = max(found, key=lambda point: sign * point["validation"], default=None)
    validation = best["validation"] if best else None
    chosen = next((entry[f"eval_{common.metric}"] for entry in trainer.state.log_history if is_choice(entry)), None)
    if best and chosen is not None and math.isfinite(chosen):
        validation = chosen
    assert trainer.optimizer is not None
    return Training(
        seed=seed,
        params=dict(values),
        validation=validation,
        best_epoch=best["epoch"] if best else 0.0,
        curve=tuple(curve),
        chosen={name: float(choice["value"]) for name, choice in choices(trainer.states).items()},
        seconds=clock.seconds,
        compute=clock.compute,
        evaluation_seconds=clock.paused,
        passes=round(len(trainer.train_dataset) * (trainer.state.epoch or 0.0)),
        share=trainer.state.global_step / trainer.state.max_steps,
        error="" if found else f"no epoch has a finite {common.metric}: the training diverged",
        peak_memory_mb=peak,
        # The optimizer holds the parameters trained in any stage.
        parameters_trained=sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]),
    )


class EndDiverged(TrainerCallback):
    """Ends a training run that has diverged: its logits are not finite, or its loss stays far above its start.

    The loss counts as far above if it is more than twice that of the first step, and of a uniform prediction, in two
    consecutive epochs.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        kind, classes = config.problem_type, max(2, getattr(config, "num_labels", 2))
        uniform = {"single_label_classification": math.log(classes), "multi_label_classification": math.log(2)}
        self.level = uniform.get(kind, 0.0)
        self.above = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss/task", (logs or {}).get("loss"))
        if loss is None:
            return
        if state.global_step == 1:
            self.level = max(self.level, loss) if math.isfinite(loss) else self.level
            return
        self.above = 0 if loss <= 2 * self.level else self.above + 1
        if not math.isfinite(loss) or self.above == 2:
            control.should_training_stop = True


def _curve(trainer: FTTrainer, metric: str) -> list[Point]:
    """The scores after each epoch."""
    losses = {entry["epoch"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    evaluated = [e for e in trainer.state.log_history if f"eval_{metric}" in e and not is_choice(e)]
    curve = []
    for entry in evaluated:
        point = Point(epoch=entry["epoch"], validation=entry[f"eval_{metric}"])
        loss = losses.get(entry["epoch"])
        if loss is not None and math.isfinite(loss):
            point["loss"] = loss
        curve.append(point)
    return curve


def _tested(
    training: Training, trainer: FTTrainer, entrant: Entrant, common: CommonSettings, folder: Path | None
) -> Training:
    """Evaluate the model on the test sets, once for each final run; its outputs are saved next to it."""
    found = scored(trainer, entrant.bench.data)
    if folder is not None:
        found.save(folder.parent / LOGITS)
        found.save_calibration(trainer.model, folder)
    distortion = _distortion(trainer, entrant, training.seed, common.distortion_samples)
    return dataclasses.replace(
        training,
        scores=found.scores,
        predictions=found.predictions,
        temperature=found.temperature,
        calibration=found.calibration,
        distortion=distortion,
    )


def _distortion(trainer: FTTrainer, entrant: Entrant, seed: int, samples: int) -> dict[str, dict[str, Distance]]:
    """Distance of the features from the pretrained ones; empty if the parts of the models cannot be determined."""
    found: dict[str, dict[str, Distance]] = {}
    if not samples:
        return found
    before = entrant.bench.load(seed, False).to(trainer.args.device)
    for split in TESTS:
        if split in entrant.bench.data:
            data = entrant.bench.data[split]
            rows = np.linspace(0, len(data) - 1, min(samples, len(data))).round().astype(int).tolist()
            batches = [entrant.bench.collate(read_rows(data, rows[i : i + 64])) for i in range(0, len(rows), 64)]
            try:
                measured = feature_distortion(before, trainer.model, batches)
            except (OptionError, AnatomyError):
                return {}
            found[split] = {
                block: Distance(cosine=value.cosine, relative_l2=value.relative_l2) for block, value in measured.items()
            }
    return found


@contextmanager
def temporary(work: Path) -> Iterator[None]:
    """Delete a folder on exit."""
    try:
        yield
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the warnings of hf_ft instead of printing them for every training run."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, keep = logging.getLogger("hf_ft"), Keep(logging.WARNING)
    others, propagate = logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [keep], False
    try:
        yield said
    finally:
        logger.handlers, logger.propagate = others, propagate
