"""Settings shared by all strategies of a comparison, and the tuning budget of each."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_ft.core.compose import UNDER_SGD
from hf_ft.core.recommended import ADAM, SGD, Recommended
from hf_ft.core.search_space import LogRange
from hf_ft.data.mixing import Mixing
from hf_ft.errors import OptionError
from hf_ft.metrics import LOCAL_METRICS
from hf_ft.search.storage import MISSING
from hf_ft.trainer.checks import check_counts

# The optimizers that each strategy tries, unless the user chooses one.
OPTIMIZERS = {"image": (ADAM, SGD), "text": (ADAM,), "audio": (ADAM,)}
WARMUP = "warmup_steps"
LOCAL = ("storage", "study_name", "retry_failed", "thumbnails")  # settings of a call, not of the comparison
CONFIRMED = 2  # seeds with which the best trial and the defaults are trained before one of them is chosen
WIDTH = 30.0  # width of the range of learning rates, around the recommended one
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 16,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
}
# Set by the comparison for every training run, as are learning_rate, seed, metric_for_best_model and greater_is_better.
FIXED: dict[str, Any] = {
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "save_strategy": "best",  # the best epoch's model is the result
    "save_total_limit": 1,
    "save_only_model": True,
    "load_best_model_at_end": True,
    "report_to": "none",
    "log_level": "error",
    "disable_tqdm": True,
    "remove_unused_columns": False,
}
# Each training run is reported to trackers by hf_ft.comparison.tracking.
OURS = (
    *(name for name in FIXED if name != "report_to"),
    "learning_rate",
    "seed",
    "run_name",
    "metric_for_best_model",
    "greater_is_better",
    "resume_from_checkpoint",
)


# Settings that are numbers, and the lowest value of each.
LOWEST = {"trials": 0, "seeds": 1, "most_trials": 1, "distortion_samples": 0, "sampling_seed": 0}


def setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """The tuning budget and shared settings; each field is a flag of ``hf-ft compare``.

    Raises:
        OptionError: if a value is invalid, from :meth:`check`.
    """

    trials: int = setting(
        8,
        "tuning budget per strategy, as the work of this many full fine-tuning runs; 0: no tuning, each strategy runs "
        "once per seed",
    )
    seeds: int = setting(
        5,
        "final runs per strategy with its best setting, or with its defaults if these score higher in the first two",
    )
    metric: str | None = setting(
        None,
        f"metric for tuning and ranking: {', '.join(LOCAL_METRICS)} (default: balanced_accuracy for classes, macro_f1 "
        "for several labels per row, mse for numbers)",
    )
    learning_rates: str | None = setting(
        None,
        "range of learning rates for all strategies, such as 1e-5,1e-1 (default: a factor of 30 around the one that "
        "each strategy recommends for the optimizer)",
    )
    folds: int | None = setting(
        None,
        "parts of the training and validation samples that take turns as validation: a trial is trained once for each, "
        "and each final run uses the next (default: 5 if there are fewer than 200 such samples; otherwise 1, the "
        "validation split as it is)",
    )
    patience: int | None = setting(
        None, "end training after this many epochs without a better validation score (default: never)"
    )
    mixup: float = setting(0.0, "mix the images of a training batch: alpha, such as 0.2")
    cutmix: float = setting(0.0, "paste parts of other images of the batch: alpha, such as 1")
    soup: Literal["none", "uniform", "greedy"] = setting(
        "none",
        "average the final runs of all strategies into one model, in soup/: all of them (uniform), or one at a time "
        "from the best on, keeping each if the validation score does not fall (greedy)",
    )
    soup_of: Literal["runs", "trials"] = setting(
        "runs",
        "what a soup may include: the final runs, or also every trial, whose models are then all kept on disk",
    )
    most_trials: int = setting(4, "strategies with cheap runs get at most this many times the trials")
    batch_norm_momentum: float = setting(
        0.1,
        "momentum of all BatchNorm layers in all strategies, so that statistics adapt within short runs; 0 uses each "
        "strategy's own option",
    )
    distortion_samples: int = setting(256, "samples per test set on which to measure feature distortion; 0 to skip it")
    hours: float | None = setting(
        None, "time limit in hours; strategies run in order, and running the command again continues"
    )
    thumbnails: bool = setting(
        False,
        "show the images, or the beginnings of the texts, of the winner's surest and least sure mistakes in "
        "report.html and results.json; leave it out if you share these files and the data are private",
    )
    retry_failed: bool = setting(False, "repeat training runs that failed in an earlier call")
    storage: str | None = setting(
        None,
        "where to store trials: a file *.db or *.log, or an Optuna URL; processes that share a storage and an "
        "output_dir share the work (default: compare.db in output_dir)",
    )
    study_name: str = setting("compare", "name of the study in the storage")
    sampling_seed: int = setting(0, "seed for sampling the settings to try")

    def check(self) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise ImportError(MISSING)
        for name, least in LOWEST.items():
            if getattr(self, name) < least:
                raise OptionError(f"{name} must be at least {least}, got {getattr(self, name)!r}.")
        if self.folds is not None and self.folds < 1:
            raise OptionError(f"folds must be at least 1, got {self.folds!r}.")
        if self.patience is not None and self.patience < 1:
            raise OptionError(f"patience must be at least 1 epoch, got {self.patience!r}.")
        if self.hours is not None and not (math.isfinite(self.hours) and self.hours > 0):
            raise OptionError(f"hours must be positive, got {self.hours!r}.")
        if self.soup not in ("none", "uniform", "greedy"):
            raise OptionError(f"soup={self.soup!r} is unknown: choose none, uniform or greedy.")
        if self.soup_of not in ("runs", "trials"):
            raise OptionError(f"soup_of={self.soup_of!r} is unknown: choose runs or trials.")
        if self.soup_of == "trials" and (self.soup == "none" or not self.trials):
            missing = "soup='none'" if self.soup == "none" else "trials=0"
            raise OptionError(
                f"soup_of='trials' averages tuning trials, but {missing}: set soup='greedy' and trials=8."
            )
        if self.metric is not None and self.metric not in LOCAL_METRICS:
            raise OptionError(
                f"metric={self.metric!r} is unknown: choose one of {', '.join(LOCAL_METRICS)}.", arguments=("metric",)
            )
        if not 0 <= self.batch_norm_momentum <= 1:
            raise OptionError(f"batch_norm_momentum={self.batch_norm_momentum!r} lies outside [0, 1]. Default: 0.1.")
        self.rates(1.0)
        self.mixing  # noqa: B018 - raises for an invalid value

    @property
    def keeps_trials(self) -> bool:
        """Whether the models of trials are kept."""
        return self.soup != "none" and self.soup_of == "trials"

    @property
    def confirming_seeds(self) -> int:
        """Seeds that confirm the best trial; none with folds: a trial is then the mean of several runs."""
        return min(CONFIRMED, self.seeds) if self.trials > 1 and (self.folds or 1) == 1 else 0

    @property
    def mixing(self) -> Mixing:
        """How the images of a training batch are mixed."""
        return Mixing(self.mixup, self.cutmix)

    def rates(self, recommended: float) -> LogRange:
        """The range of learning rates of a strategy.

        Raises:
            OptionError: if the user's is not a valid range.
        """
        if self.learning_rates is None:
            low, high = recommended / math.sqrt(WIDTH), recommended * math.sqrt(WIDTH)
            return LogRange(float(f"{low:.2g}"), float(f"{high:.2g}"))
        try:
            low, high = (float(part) for part in self.learning_rates.split(","))
        except ValueError:
            low = high = 0.0
        if not 0 < low < high < math.inf:
            raise OptionError(
                "learning_rates must be two increasing positive numbers, such as 1e-5,1e-1, got "
                f"{self.learning_rates!r}."
            )
        return LogRange(low, high)

    def described(self) -> dict[str, Any]:
        """All settings that determine what is compared."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in LOCAL}


def training_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments shared by all strategies: the user's, with our defaults for the others.

    Args:
        given: arguments set by the user.

    Returns:
        The arguments; without ``optim``, unless the user chose it: then the optimizer is tuned.

    Raises:
        OptionError: if an argument is set by the comparison itself, does not exist, or is invalid.
    """
    reserved = sorted(set(given) & set(OURS))
    if reserved:
        raise OptionError(
            f"{reserved[0]}={given[reserved[0]]!r} cannot be set: the comparison itself sets {', '.join(OURS)}."
        )
    pushing = sorted(name for name in given if name == "push_to_hub" or name.startswith("hub_"))
    if pushing:
        raise OptionError(
            f"{pushing[0]} cannot be set: a comparison pushes nothing to the Hub. Push the winner afterwards with "
            "`hf-ft push --model OUTPUT_DIR/best`."
        )
    values = DEFAULTS | dict(given)
    unknown = sorted(set(values) - {f.name for f in fields(TrainingArguments) if f.init})
    if unknown:
        raise OptionError(f"{unknown[0]}={values[unknown[0]]!r}: TrainingArguments has no such argument.")
    try:
        if "optim" in values:
            values["optim"] = OptimizerNames(values["optim"]).value
        args = TrainingArguments("unused", **values | FIXED | {"metric_for_best_model": "loss"})
    except ValueError as error:
        raise OptionError(f"training arguments: {error}") from error
    check_counts(args)
    if "optim" not in values and "optim_args" in values:
        raise OptionError(f"optim_args={values['optim_args']!r} belongs to an optimizer: choose it with optim.")
    return values


def optimizers(arguments: Mapping[str, Any], task: str) -> tuple[str, ...]:
    """The optimizers that each strategy tries."""
    return (arguments["optim"],) if "optim" in arguments else OPTIMIZERS[task]


def under(
    arguments: Mapping[str, Any], optim: str, recommended: Mapping[str, Recommended] | None = None
) -> dict[str, Any]:
    """The shared training arguments with an optimizer, and what it and the strategies need that the user did not set.

    Args:
        recommended: the arguments that the strategies recommend, of which only the warm-up is used.
    """
    wanted = {name: one for name, one in (recommended or {}).items() if name == WARMUP}
    wanted |= UNDER_SGD if optim == SGD else {}
    return {name: one.value for name, one in wanted.items()} | dict(arguments) | {"optim": optim}
