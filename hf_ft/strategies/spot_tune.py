"""SpotTune: for each sample, a policy network decides which blocks are the fine-tuned ones and which the pretrained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import LogRange, Paper, option, register
from hf_ft.core.gated import GatedStrategy
from hf_ft.models.border import has_parameters
from hf_ft.models.gated.per_sample import PerSample
from hf_ft.models.head_layers import logit_layers


@register("spot_tune")
@dataclass(frozen=True, kw_only=True)
class SpotTuneConfig(GatedStrategy):
    r"""Decide for each sample and block whether the fine-tuned or the pretrained block computes it.

    Block :math:`l` has its pretrained weights :math:`F_l`, which stay fixed, and a copy :math:`\tilde F_l`, which
    trains:

    .. math::
        x_l = I_l(x) \, \tilde F_l(x_{l-1}) + (1 - I_l(x)) \, F_l(x_{l-1}), \qquad
        I_l(x) = \arg\max_k (z_{lk}(x) + g_{lk}) \in \{0, 1\}

    with the logits :math:`z` of a policy network and Gumbel noise :math:`g` in training, none in evaluation. Its
    gradient is that of :math:`\mathrm{softmax}((z + g) / \tau)`.
    """

    paper = Paper(
        "Guo, Shi, Kumar, Grauman, Rosing, Feris",
        "SpotTune: Transfer Learning through Adaptive Fine-tuning",
        "CVPR 2019",
        "https://arxiv.org/abs/1811.08737",
    )
    formula = "x_l = I_l(x) F~_l(x_{l-1}) + (1 - I_l(x)) F_l(x_{l-1}), I_l in {0, 1} by a policy"
    tuned = {"policy_lr": LogRange(1e-4, 1e-2)}

    temperature: float = option(
        5.0, "Temperature of the Gumbel softmax, which gives decisions their gradient.", range="(0, inf)", source="code"
    )
    policy_lr: float = option(0.01, "Learning rate of the policy network.", range="(0, inf)", source="code")
    policy_width: int = option(128, "Number of hidden units of the policy network.", range="[1, inf)")
    noise: bool = option(
        True,
        "Whether to sample decisions in training, by Gumbel noise, or to take the more likely one, as in evaluation.",
        source="code",
    )
    head_lr: float | None = option(
        None, "Learning rate of the head; None to use that of the backbone, args.learning_rate.", range="(0, inf)"
    )

    def gate_rate(self) -> float | None:
        return self.policy_lr

    def draws(self) -> bool:
        return self.noise

    def gate(self, model: nn.Module) -> PerSample:
        anatomy = self.anatomy(model)
        return PerSample(
            blocks=tuple(block.modules for block in anatomy.blocks),
            head=tuple(name for name in anatomy.head.modules if has_parameters(model, name)),
            logits=logit_layers(model, anatomy.head.modules, trainable=False),
            width=self.policy_width,
            temperature=self.temperature,
            noise=self.noise,
        )
