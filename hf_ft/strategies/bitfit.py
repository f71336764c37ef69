"""BitFit: train only the biases and the head."""

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


@register("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFitConfig(FittedHead):
    r"""Train the bias of every layer, including norms, and the head; all other weights stay as pretrained.

    .. math:: L = \mathrm{CE}(h(f(x; W^0, b)), y) \quad \text{over } b \text{ and } h
    """

    paper = Paper(
        "Ben Zaken, Goldberg, Ravfogel",
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        "ACL 2022",
        "https://arxiv.org/abs/2106.10199",
    )
    formula = "L = CE over the biases b and the head h; all other weights stay at W0"
    recommended = {"learning_rate": LearningRate(1e-2, sgd=3e-2)}
    cost = advising.EVERYTHING - advising.DEARER  # gradients of activations, but of few weights
    advice = {advising.FEW_SAMPLES_PER_WEIGHT: 1, advising.POOR_FEATURES: -1}

    head_lr: HeadRate = option(
        "auto",
        "Learning rate of the head: 'auto' to fit it to the features, None to use that of the biases.",
        range="(0, inf)",
    )

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        head = self.anatomy(model).head.modules
        biases = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
        biases = [name for name in biases if not covered(name, set(head))]
        if not biases:
            raise OptionError("bitfit: the model has no biases outside the head: use NormsOnlyConfig, or LoRA (PEFT).")
        return Plan(stages=(Stage("biases", trains=(*biases, *head), rates=head_rates(self, head, state)),))
