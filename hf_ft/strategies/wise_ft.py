"""WiSE-FT: the final weights lie on the line between the pretrained and the fine-tuned ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from hf_ft.core import (
    EVERYTHING,
    NORM_MODES,
    USUAL_RATE,
    Findings,
    FTConfig,
    Needs,
    Paper,
    Plan,
    Selection,
    State,
    advising,
    option,
    register,
)
from hf_ft.core.findings import Table
from hf_ft.functional import interpolated


@register("wise_ft")
@dataclass(frozen=True, kw_only=True)
class WiSEFTConfig(FTConfig):
    r"""Average the fine-tuned weights with the pretrained ones after training.

    .. math::
        w_\alpha = (1 - \alpha) w^0 + \alpha w, \qquad
        \alpha = \arg\max_{a \in \{0, 1/n, \dots, 1\}} \text{validation score of } w_a

    where :math:`n` is ``steps``. BatchNorm statistics are measured again for each candidate. Training itself is
    unchanged: it is full fine-tuning, or whatever the strategies combined with this one do.
    """

    paper = Paper(
        "Wortsman, Ilharco, Kim, Li, Kornblith, Roelofs, Gontijo-Lopes, Hajishirzi, Farhadi, Namkoong, Schmidt",
        "Robust Fine-Tuning of Zero-Shot Models",
        "CVPR 2022",
        "https://arxiv.org/abs/2109.01903",
    )
    formula = "w_a = (1 - a) w0 + a w after training; a in {0, 1/n, ..., 1} by validation"
    recommended = USUAL_RATE
    tuned = NORM_MODES
    averages = True
    cost = advising.EVERYTHING + advising.DEARER / 2
    advice = {advising.GOOD_FEATURES_FEW_SAMPLES: 1, advising.POOR_FEATURES: -1}

    alpha: float | Literal["auto"] = option(
        "auto",
        "Share of the fine-tuned weights in the final ones, or 'auto' to choose it on validation data.",
        range="[0, 1]",
    )
    steps: int = option(10, "'auto' chooses among 0, 1/steps, 2/steps, ..., 1.", range="[1, inf)", source="code")
    average_head: bool = option(
        False,
        "Average the head as well. Only for a head that is trained before the start, such as LPFTConfig's with "
        "probe_solver='lbfgs'; a new one starts from random weights.",
    )

    def needs(self) -> Needs:
        return Needs(
            several_members=True,
            sharded=True,
            evaluation_data=self.alpha == "auto",
            without_evaluation_data=", or set wise_ft.alpha to a number, such as 0.5",
        )

    def learned(self, state: State) -> str:
        choice = state.info.get("choice")
        if choice is None:
            return ""
        sentence = (
            f"The final weights are {choice['value']:.4g} of the fine-tuned and {1 - choice['value']:.4g} of the "
        )
        sentence += "pretrained ones."
        if len(choice["scores"]) > 1:
            sentence += f" The share was chosen by {choice['metric']} on validation data."
        return sentence

    def findings(self, state: State) -> Findings:
        choice = state.info.get("choice")
        if choice is None or len(choice["scores"]) < 2:
            return Findings(summary=self.learned(state))
        rows = tuple(
            (f"{alpha:.4g}", "not finite" if score is None else f"{score:.4f}") for alpha, score in choice["scores"]
        )
        chosen = [alpha for alpha, _ in choice["scores"]].index(choice["value"])
        table = Table("Scores of the candidates", ("alpha", choice["metric"]), rows, frozenset({chosen}))
        return Findings(summary=self.learned(state), blocks=(table,), short=(table,))

    def plan(self, model: nn.Module, state: State) -> Plan:
        anchors = EVERYTHING if self.average_head else self.anatomy(model).rest.modules
        grid = tuple((self.steps - k) / self.steps for k in range(self.steps + 1))  # ties: the fine-tuned end
        candidates = grid if self.alpha == "auto" else (self.alpha,)
        return Plan(select=(Selection(self.ft_type, candidates, interpolated, anchors),))
