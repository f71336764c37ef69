"""Train only the normalisation layers and the head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import (
    FittedHead,
    HeadRate,
    LearningRate,
    Needs,
    OptionError,
    Paper,
    Plan,
    Stage,
    State,
    advising,
    head_rates,
    option,
    register,
)
from hf_ft.models.names import covered
from hf_ft.models.norms import norm_layers


@register("norms_only")
@dataclass(frozen=True, kw_only=True)
class NormsOnlyConfig(FittedHead):
    r"""Train the scale and shift of every normalisation layer, and the head; all other weights stay as pretrained.

    .. math:: L = \mathrm{CE}(h(f(x; W^0, \gamma, \beta)), y) \quad \text{over } \gamma, \beta \text{ and } h

    BatchNorm layers also update their statistics, unless ``norm_mode="eval"``.
    """

    paper = Paper(
        "Frankle, Schwab, Morcos",
        "Training BatchNorm and Only BatchNorm: On the Expressive Power of Random Features in CNNs",
        "ICLR 2021",
        "https://arxiv.org/abs/2003.00152",
    )
    formula = "L = CE over the norms' gamma and beta, and the head h; all other weights stay at W0"
    recommended = {"learning_rate": LearningRate(3e-3, sgd=1e-2)}
    cost = advising.EVERYTHING - advising.DEARER  # gradients of activations, but of few weights
    advice = {advising.FEW_SAMPLES_PER_WEIGHT: 1, advising.POOR_FEATURES: -1, advising.SHIFTED_MEANS: 1}

    head_lr: HeadRate = option(
        "auto",
        "Learning rate of the head: 'auto' to fit it to the features, None to use that of the norms.",
        range="(0, inf)",
    )

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        head = self.anatomy(model).head.modules
        norms = [name for name, norm in norm_layers(model) if any(True for _ in norm.parameters())]
        norms = [name for name in norms if not covered(name, set(head))]
        if not norms:
            raise OptionError("norms_only: the model has no trainable normalisation layers outside the head.")
        return Plan(stages=(Stage("norms", trains=(*norms, *head), rates=head_rates(self, head, state)),))
