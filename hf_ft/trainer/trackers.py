"""Experiment trackers: Transformers' callbacks for them, with the strategy's options, and one run per training."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    get_reporting_integration_callbacks,
)

from hf_ft.core.config import FTConfig
from hf_ft.errors import OptionError

EXTRAS = ("tensorboard", "mlflow", "trackio")  # covered by our tests; each is an extra of the package


class TensorBoard(TensorBoardCallback):
    """Transformers' callback, with the options as a text, and the scores of predictions."""

    def __init__(self, options: Mapping[str, Any], tb_writer: Any = None) -> None:
        super().__init__(tb_writer)
        self.options = options

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer is not None and state.is_world_process_zero:
            self.tb_writer.add_text("strategy", "\n".join(f"    {name}: {v}" for name, v in self.options.items()))

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any) -> None:
        self.on_log(args, state, control, logs=metrics)


class MLflow(MLflowCallback):
    """Transformers' callback, with the options as parameters, and everything from one training in one MLflow run.

    What is logged after training, such as the scores of the best model, belongs to the run of that training, which
    Transformers' callback has already ended: MLflow would start another run. A slash in a name becomes an underscore:
    MLflow's file store keeps ``loss`` in a file of this name, next to which there can be no folder for ``loss/task``.

    Args:
        experiment: where to start a run in any case, nested in the active one, if there is one; by default, a run
            is started as Transformers' callback does.
    """

    def __init__(self, options: Mapping[str, Any], experiment: str = "") -> None:
        super().__init__()
        self.options, self.experiment = options, experiment
        self.status = "FINISHED"
        self._ended = ""  # the run of the last training
        self._auto_end_run: bool

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        if self.experiment and state.is_world_process_zero:
            self._start(args)
        super().setup(args, state, model)
        if state.is_world_process_zero:
            self._auto_end_run |= bool(self.experiment)
            longest = self._MAX_PARAM_VAL_LENGTH
            self._ml_flow.log_params({name: str(value)[:longest] for name, value in self.options.items()})

    def _start(self, args: TrainingArguments) -> None:
        parent = self._ml_flow.active_run()
        if parent is None:
            place = self._ml_flow.set_experiment(self.experiment).experiment_id
        else:
            place = parent.info.experiment_id
        self._ml_flow.start_run(run_name=args.run_name, experiment_id=place, nested=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._ended:  # another training: a run of its own
            self._initialized, self._ended = False, ""
        super().on_train_begin(args, state, control, model, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any = None, **kwargs: Any) -> None:
        logs = {name.replace("/", "_"): value for name, value in logs.items()}
        again = bool(self._ended) and self._ml_flow.active_run() is None
        if again:
            self._ml_flow.start_run(run_id=self._ended)
        super().on_log(args, state, control, logs, model, **kwargs)
        if again:
            self._ml_flow.end_run(self.status)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.on_log(args, state, control, metrics, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        active = self._ml_flow.active_run()
        if self._auto_end_run and active is not None and state.is_world_process_zero:
            self._ended = active.info.run_id
            self._ml_flow.end_run(self.status)
        self._auto_end_run = False  # when this object is deleted, it would end whichever run is then active


class Trackio(TrackioCallback):
    """Transformers' callback, with the options added to its configuration."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = options

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            self._trackio.config.update(dict(self.options), allow_val_change=True)


OURS: dict[type[TrainerCallback], type[TensorBoard] | type[MLflow] | type[Trackio]] = {
    TensorBoardCallback: TensorBoard,
    MLflowCallback: MLflow,
    TrackioCallback: Trackio,
}


def options_of(configs: Iterable[FTConfig]) -> dict[str, Any]:
    """The strategies and their options as a flat dictionary: ``strategy``, and ``l2_sp.alpha`` for each option."""
    configs = tuple(configs)
    found: dict[str, Any] = {"strategy": "+".join(config.ft_type for config in configs)}
    for config in configs:
        values = {name: value for name, value in config.shareable().items() if name != "ft_type"}
        found |= {f"{config.ft_type}.{name}": _plain(value) for name, value in values.items()}
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value)


def adopt(callbacks: list[TrainerCallback], report_to: Sequence[str], configs: Iterable[FTConfig]) -> None:
    """Replace the callbacks that a Trainer made for ``report_to`` by ours; the user's callbacks stay as they are."""
    made = get_reporting_integration_callbacks(report_to)
    options = options_of(configs)
    for kind in made:
        if kind in OURS:
            place = next(place for place, callback in enumerate(callbacks) if type(callback) is kind)
            callbacks[place] = OURS[kind](options)


def chosen_in(args: TrainingArguments) -> list[str]:
    """The names of the trackers; training arguments hold a list once they are made."""
    return list(args.report_to or ())


def check(report_to: str | Sequence[str] | None) -> None:
    """Check that trackers are known and installed.

    Raises:
        OptionError: if one is unknown.
        ImportError: if one is missing; the message says how to install it.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in names:
        if name in ("none", "all"):
            continue
        try:
            (kind,) = get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise OptionError(f"report_to={name!r} is unknown: {error}") from error
        if name in EXTRAS and importlib.util.find_spec(name) is None and not _other(name):
            raise ImportError(f"report_to={name!r} needs {name}: pip install 'hf-ft[{name}]'.", name=name)


def _other(name: str) -> bool:
    return name == "tensorboard" and importlib.util.find_spec("tensorboardX") is not None
