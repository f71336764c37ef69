"""The training runs of a comparison in experiment trackers: a run each, all in one folder, experiment or project."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from hf_ft.comparison.results import Training
from hf_ft.core.config import FTConfig
from hf_ft.trainer import trackers

FOLDER = "tensorboard"  # in the output folder; other trackers have places of their own
# Training arguments that say where to log, and nothing about how to train.
ARGUMENTS = ("report_to", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Tracking:
    """Where the training runs of a comparison are logged.

    Attributes:
        report_to: names of trackers, as in ``TrainingArguments``.
        folder: the output folder of the comparison.
        given: training arguments for trackers, set by the user.
    """

    report_to: tuple[str, ...] = ()
    folder: Path = Path()
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def project(self) -> str:
        """The experiment or project of all runs: the user's, or the name of the output folder."""
        return str(self.given.get("project") or self.folder.resolve().name)

    def arguments(self, run: str) -> dict[str, Any]:
        """The training arguments that trackers read."""
        return {**self.given, "project": self.project, "run_name": run} if self.report_to and run else {}

    def start(self, run: str, configs: Sequence[FTConfig]) -> Tracked:
        """What logs a training run under this name; without a name, nothing is logged."""
        if not run:
            return Tracked(())
        options = trackers.options_of(configs)
        return Tracked([self._tracker(kind, run, options) for kind in _kinds(self.report_to)])

    def _tracker(self, kind: type[TrainerCallback], run: str, options: Mapping[str, Any]) -> TrainerCallback:
        ours = trackers.OURS.get(kind)
        if ours is trackers.TensorBoard:
            board = trackers.TensorBoard(options)
            board.logging_dir = str(self.folder / FOLDER / run)
            shutil.rmtree(board.logging_dir, ignore_errors=True)  # an interrupted run starts again
            return board
        if ours is trackers.MLflow:
            return trackers.MLflow(options, self.project)
        return kind() if ours is None else ours(options)


def _kinds(report_to: Sequence[str]) -> list[type[TrainerCallback]]:
    return get_reporting_integration_callbacks(list(report_to))


def tracking_of(arguments: Mapping[str, Any], folder: Path) -> tuple[Tracking, dict[str, Any]]:
    """What the training arguments of a comparison say about trackers, and the other arguments.

    Raises:
        OptionError: if a tracker is unknown.
        ImportError: if one is not installed.
    """
    wanted = arguments.get("report_to")
    trackers.check(wanted)
    named = {name: arguments[name] for name in ARGUMENTS if name in arguments and name != "report_to"}
    others = {name: value for name, value in arguments.items() if name not in ARGUMENTS}
    # "all" means those that are installed
    chosen = trackers.chosen_in(TrainingArguments("unused", report_to=wanted or "none"))
    for kind in _kinds(chosen):
        if kind not in trackers.OURS:
            try:
                kind()
            except RuntimeError as error:
                raise ImportError(str(error)) from error
    return Tracking(tuple(chosen), folder, named), others


def run_name(contender: str, training: str, fold: int | None = None) -> str:
    """The name of a run, which is also a folder name: ``l2_sp-trial-3``, ``lp_ft+l2_sp-trial-1-fold-2``."""
    parts = [contender, training, *([] if fold is None else [f"fold {fold + 1}"])]
    return "-".join(re.sub(r"[^\w+.]+", "-", part).lstrip(".") for part in parts)


class Tracked(TrainerCallback):
    """Passes the logs of a training run to trackers, as one run in each, which ends with the context.

    A tracker that fails is left out with a warning: an unreachable server says nothing about a strategy.

    Attributes:
        outcome: the training run, when it is done.
    """

    def __init__(self, told: Sequence[TrainerCallback]) -> None:
        self.trackers = list(told)
        self.outcome: Training | None = None
        self._last: tuple[tuple[Any, ...], Any] | None = None

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, *error: object) -> None:
        """End the run, with the scores of the training run if it was completed."""
        if self._last is None:
            return
        args, model = self._last
        if self.outcome is not None:
            self._pass_on("on_log", *args, logs=_scores(self.outcome), model=model)
        for tracker in self.trackers:
            if isinstance(tracker, trackers.MLflow) and (self.outcome is None or self.outcome.error):
                tracker.status = "FAILED"
        self._pass_on("on_train_end", *args, model=model)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = args, kwargs.get("model")
        self._pass_on("on_train_begin", *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._pass_on("on_log", *args, **kwargs)

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        for tracker in tuple(self.trackers):
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # some announce each run
                    getattr(tracker, event)(*args, **kwargs)
            except Exception as error:
                self.trackers.remove(tracker)
                logger.warning(f"{type(tracker).__name__} failed and logs nothing more from this training run: {error}")


def _scores(training: Training) -> dict[str, float]:
    """The validation score that counts, and the test scores, under names as in the logs of a Trainer."""
    best = {} if training.validation is None else {"eval_best": training.validation}
    places = {"test": "test", "ood": "test_ood"}
    return best | {
        f"{place}_{name}": value
        for split, place in places.items()
        for name, value in training.scores.get(split, {}).items()
    }
