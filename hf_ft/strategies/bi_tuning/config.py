"""Bi-tuning: contrastive losses on the classifier and on a projector, in addition to the cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import TrainingArguments

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    FTConfig,
    LogRange,
    Names,
    Needs,
    OptionError,
    Paper,
    Plan,
    State,
    Term,
    advising,
    option,
    register,
)
from hf_ft.strategies.bi_tuning.encoder import BiTuningLoss, classifier_of


@register("bi_tuning")
@dataclass(frozen=True, kw_only=True)
class BiTuningConfig(FTConfig):
    r"""Contrast each sample with those of other classes, both in the classifier and in a projector.

    .. math::
        L = \mathrm{CE} + \lambda \, (L_\mathrm{CCE} + L_\mathrm{CCL}), \qquad
        L_\bullet = \frac1B \sum_i \mathrm{KL}(u_i \,\|\, \operatorname{softmax}(s_i / T))

    :math:`s_i` holds a similarity :math:`s_{i0}` for the sample itself, and one, :math:`s_{ick}`, for each of the last
    :math:`K` keys (``queue_size``) of each class; :math:`u_i` is :math:`1 / (K + 1)` for the sample itself and the keys
    of its class, 0 for those of others. Keys come from an average of the network over the steps, which sees a second
    view of each sample. With the input :math:`h` of the classifier, the weights :math:`w_c` and bias :math:`b_c` of
    class :math:`c`, a linear projector :math:`P`, :math:`\bar v = v / \lVert v \rVert`, and a prime for keys,
    :math:`(s_{i0}, s_{ick})` are

    .. math::
        \text{CCE:} \quad \overline{(w_{y_i}, b_{y_i})} \cdot \overline{(h_i, 1)}, \quad
            \overline{(w_{y_i}, b_{y_i})} \cdot \overline{(h'_{ck}, 1)}; \qquad
        \text{CCL:} \quad \overline{P h_i} \cdot \overline{P' h'_i}, \quad
            \overline{P h_i} \cdot \overline{P' h'_{ck}}
    """

    paper = Paper(
        "Zhong, Wang, Kou, Wang, Long",
        "Bi-tuning of Pre-trained Representations",
        "arXiv 2020",
        "https://arxiv.org/abs/2011.06182",
    )
    formula = "L = CE + weight (CCE + CCL);  each KL(equal shares for the sample's class || softmax(similarities / T))"
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"weight": LogRange(0.1, 3.0)}
    cost = advising.WITH_A_FROZEN_COPY + advising.DEARER  # a second network that runs in every step

    weight: float = option(
        1.0, "Weight of both contrastive losses; 0 is plain fine-tuning.", range="[0, inf)", source="code"
    )
    queue_size: int = option(40, "Number of keys kept per class.", range="[1, inf)", source="code")
    momentum: float = option(
        0.999, "Share of the averaged weights that remains after each optimizer step.", range="[0, 1]", source="code"
    )
    temperature: float = option(0.07, "Temperature of both softmaxes.", range="(0, inf)", source="code")
    projection_dim: int = option(128, "Dimension of the projector's output.", range="[1, inf)", source="code")

    def needs(self) -> Needs:
        return Needs(hard_labels=self.weight > 0)

    def check_arguments(self, args: TrainingArguments) -> None:
        if self.weight and args.world_size > 1 and not getattr(args.accelerator_config, "even_batches", True):
            raise OptionError(
                "accelerator_config.even_batches=False with bi_tuning: the processes exchange keys, so their batches "
                "must have the same size. Set it to True."
            )

    def check_model(self, model: nn.Module) -> None:
        if not self.weight:
            return
        kind = getattr(getattr(model, "config", None), "problem_type", None)
        if kind in ("regression", "multi_label_classification"):
            raise OptionError(
                f"bi_tuning needs one class per sample, but the model's problem_type is {kind!r}: use BSSConfig, which "
                "needs no labels."
            )
        classifier_of(model, self._head(model))

    def plan(self, model: nn.Module, state: State) -> Plan:
        if not self.weight:
            return Plan()
        loss = BiTuningLoss(self._head, self.projection_dim, self.queue_size, self.momentum, self.temperature)
        term = Term(
            "bi_tuning",
            loss,
            weight=self.weight,
            needs=frozenset({"inputs", "second_view", "logit_inputs"}),
            couples_batch=True,
        )
        return Plan(terms=(term,))

    def _head(self, model: nn.Module) -> Names:
        return self.anatomy(model).head.modules
