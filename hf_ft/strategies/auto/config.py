"""One strategy that chooses among the others, within a budget."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from hf_ft.core import (
    CHOSEN,
    Context,
    Findings,
    FTConfig,
    LearningRate,
    OptionError,
    Paper,
    Plan,
    Recommended,
    Selection,
    Stage,
    State,
    advising,
    config_class,
    option,
    register,
)
from hf_ft.core.config import configured_from
from hf_ft.core.plan import trained_by
from hf_ft.engine.adapters import AddAdapters
from hf_ft.errors import AnatomyError
from hf_ft.functional import interpolated
from hf_ft.models.names import covered
from hf_ft.strategies.auto.choose import STORAGE, Chooser
from hf_ft.strategies.auto.findings import choice_findings, describe_average, reasons
from hf_ft.strategies.auto.result import Choice

RANGE = "[1, inf)"
SHARES = (1.0, 0.8, 0.6)  # of the trained weights; ties go to the first


@register("auto")
@dataclass(frozen=True, kw_only=True)
class AutoStrategyConfig(FTConfig):
    r"""Choose a strategy: train the most promising ones briefly, then the best of them to the end.

    .. math:: s^* = \arg\min_s \; \min_T \; \mathrm{CE}(z_s / T, \, y) \quad \text{on held-out training samples}

    :math:`z_s` are the logits after a brief training run with strategy :math:`s`. The strategy with the
    highest expected gain, according to earlier comparisons, is replaced only if the loss of another is lower by more
    than the standard error of the difference. The run then trains :math:`s^*` as if it had been asked for, at the
    learning rate it recommends unless one was set.
    """

    paper = Paper(
        "Jamieson, Talwalkar",
        "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
        "AISTATS 2016",
        "https://arxiv.org/abs/1502.07943",
        note="successive halving; here over folds of the training samples",
    )
    formula = "s* = argmin_s min_T CE(z_s / T, y) on held-out training samples, z_s after a brief training run with s"
    recommended = {
        "learning_rate": LearningRate(CHOSEN, without_batch_norm=0.1),  # what it chooses among
        "lr_scheduler_type": Recommended("cosine", "ours"),
        "weight_decay": Recommended(0.0, "ours"),
    }
    cost = advising.WITH_A_SEARCH + advising.DEARER
    kept = (STORAGE,)

    budget: float | str = option(
        "2x",
        "Limit on the cost of the whole run, choosing and training, as a multiple of a full fine-tuning of the same "
        "length, such as '3x' or 3.",
        range=RANGE,
    )
    choose_from: tuple[str, ...] = option(
        (), "Names of the strategies to choose from, besides full fine-tuning; empty for all."
    )
    most: int = option(6, "Maximum number of strategies to train briefly.", range="[2, inf)")
    share: float = option(0.25, "Length of a brief training run, as a fraction of the whole run.", range="(0, 1]")
    folds: int = option(
        4,
        "Number of folds of the training samples; they take turns being held out, while the budget lasts.",
        range="[2, inf)",
    )
    average: bool = option(
        True,
        "Average the final weights, except the head's, with the pretrained ones if that scores higher on the "
        "validation data; without such data, they stay as trained. Shares of the final weights: 1, 0.8, 0.6.",
    )
    storage: str | None = option(
        None,
        "Where to store the trials: a file *.db (SQLite) or *.log, an Optuna URL, or 'memory'; None for auto.db in the "
        "output folder. Processes that share a storage share the training runs.",
        local=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trainings()

    def trainings(self) -> float:
        """The budget as a number of full fine-tunings.

        Raises:
            OptionError: if it is not one.
        """
        try:
            value = float(str(self.budget).strip().lower().removesuffix("x"))
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 1):
            raise OptionError(f"{type(self).__name__}.budget={self.budget!r} lies outside {RANGE}. Default: '2x'.")
        return value

    def check_beside(self, others: tuple[FTConfig, ...]) -> None:
        names = ", ".join(other.ft_type for other in others if not other.averages)
        if names:
            raise OptionError(
                f"{self.ft_type} chooses the strategy itself, so it cannot be composed with {names}: use one or the "
                f"other, or set {self.ft_type}.choose_from to limit the choice."
            )

    def check_arguments(self, args: TrainingArguments) -> None:
        for name in self.choose_from:
            config_class(name)  # raises if there is none

    def measure(self, model: nn.Module, context: Context) -> State:
        recipe, state, choice = Chooser(model, self, self.trainings(), context).run()
        found = {"search": choice.to_dict(), "config": recipe.config.shareable(), "state": dict(state.info)}
        return State(state.tensors, found)

    def chosen(self, state: State) -> tuple[FTConfig, State]:
        """The chosen strategy, and what it measured.

        Raises:
            OptionError: if nothing was chosen yet, or the state is damaged.
        """
        if not state.info:
            raise OptionError(f"{self.ft_type} has not chosen a strategy yet: pass a context, or states.")
        config, inner = state.info.get("config"), state.info.get("state")
        if not isinstance(config, dict) or not isinstance(inner, dict) or config.get("ft_type") == self.ft_type:
            raise OptionError(f"'config' and 'state' hold no strategy that {self.ft_type} can choose.")
        return configured_from(config), State(state.tensors, inner)

    def choice(self, state: State) -> Choice:
        """How it was chosen.

        Raises:
            CheckpointError: if the state is damaged.
        """
        return Choice.from_dict(state.info["search"])

    def check_state(self, model: nn.Module, state: State) -> None:
        super().check_state(model, state)
        if not state.info:
            return
        config, inner = self.chosen(state)
        config.check_state(model, inner)
        rate = self.choice(state).rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise OptionError(f"'rate' is {rate!r}, outside (0, inf).")

    def plan(self, model: nn.Module, state: State) -> Plan:
        config, inner = self.chosen(state)
        plan = dataclasses.replace(config.plan(model, inner), learning_rate=self.choice(state).rate)
        selection = self._averaging(model, plan) if self.average and not plan.select else None
        return plan if selection is None else dataclasses.replace(plan, select=(selection,))

    def _averaging(self, model: nn.Module, plan: Plan) -> Selection | None:
        """The choice of a share of the trained weights; None if there is nothing to average, or it is unknown."""
        if isinstance(model, PeftModel) or any(isinstance(step, AddAdapters) for step in plan.surgery):
            return None  # an adapter's weights are factors of a product
        try:
            rest = self.anatomy(model).rest.modules
        except AnatomyError:
            return None
        trained = {name for stage in plan.stages or (Stage("train"),) for name in _trained(stage, model)}
        if not any(covered(name, set(rest)) for name in trained):
            return None
        return Selection(self.ft_type, SHARES, interpolated, rest, optional=True)

    def learned(self, state: State) -> str:
        if not state.info:
            return ""
        config, inner = self.chosen(state)
        averaged = describe_average(state.info.get("choice"))
        return " ".join(filter(None, (reasons(self.choice(state)), config.learned(inner), averaged)))

    def findings(self, state: State) -> Findings:
        if not state.info:
            return Findings()
        config, inner = self.chosen(state)
        return choice_findings(self.choice(state), self.learned(state), config.findings(inner))


def _trained(stage: Stage, model: nn.Module) -> list[str]:
    return trained_by(stage, model, [name for name, p in model.named_parameters() if p.requires_grad])
