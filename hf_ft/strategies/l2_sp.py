"""L2-SP: weight decay towards the pretrained weights instead of towards zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    DistanceFromStart,
    FTConfig,
    LogRange,
    Needs,
    Paper,
    Plan,
    SquaredNorm,
    State,
    Term,
    advising,
    option,
    register,
)


@register("l2_sp")
@dataclass(frozen=True, kw_only=True)
class L2SPConfig(FTConfig):
    r"""Penalise the distance from the pretrained weights, and the norm of the new head.

    .. math::
        L = \mathrm{CE} + \tfrac{\alpha}{2} \lVert w_S - w_S^0 \rVert^2
            + \tfrac{\beta}{2} \lVert w_{\text{new}} \rVert^2

    The optimizer's own weight decay is disabled for penalised parameters. A weight of 0 removes the penalty.
    """

    paper = Paper(
        "Li, Grandvalet, Davoine",
        "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        "ICML 2018",
        "https://arxiv.org/abs/1802.01483",
    )
    formula = "L = CE + alpha/2 ||w_S - w0_S||^2 + beta/2 ||w_new||^2"
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"alpha": LogRange(1e-3, 1.0)}
    cost = advising.WITH_A_TERM
    advice = {advising.POOR_FEATURES_FEW_SAMPLES: -1, advising.VERY_FEW_SAMPLES: 2}

    alpha: float = option(
        0.01,
        "Weight of the distance from the pretrained weights (0.1 in the authors' code).",
        range="[0, inf)",
        source="code",
    )
    beta: float = option(0.01, "Weight of the squared norm of the new head.", range="[0, inf)", source="code")

    def needs(self) -> Needs:
        return Needs(several_members=True, sharded=True)

    def plan(self, model: nn.Module, state: State) -> Plan:
        anatomy = self.anatomy(model)
        head = anatomy.head.modules
        body = anatomy.rest.modules
        terms = (
            Term(
                "l2_sp",
                DistanceFromStart(body),
                weight=self.alpha,
                anchors=body,
                replaces_decay=body,
                starts_at_zero=True,
            ),
            Term("l2_head", SquaredNorm(head), weight=self.beta, replaces_decay=head),
        )
        return Plan(terms=tuple(term for term in terms if term.weight))
