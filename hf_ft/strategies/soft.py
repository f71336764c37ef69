"""Soft fine-tuning: keep training on the source task, and phase out its loss gradually."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    Choice,
    Decay,
    FTConfig,
    LogRange,
    Needs,
    NormMode,
    OptionError,
    Paper,
    Plan,
    State,
    Stream,
    Term,
    View,
    advising,
    functional,
    option,
    register,
)
from hf_ft.core.schedules import Schedule
from hf_ft.data.source_labels import LABEL_MAP_HELP, LabelMap, SourceLabels, as_json, head_names
from hf_ft.models import SOURCE_LOGITS, SourceHead, require_source_head
from hf_ft.models.source_head import attached_source_head, source_head


class SourceLoss(nn.Module):
    """The cross-entropy of the source head on a batch of source data."""

    def __init__(self, head: SourceHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, view: View) -> Tensor:
        source = view.streams["source"]
        return nn.functional.cross_entropy(source.source_logits(self.head), source.batch["labels"])


class SourceDistillation(nn.Module):
    """Divergence of the source head's predictions on the target batch from those before training.

    Args:
        teacher: the reference model's head. It is part of the term so that checkpoints contain it.
        trains: whether the source head trains or, like the teacher, stays as pretrained.
    """

    def __init__(self, head: SourceHead, teacher: SourceHead, temperature: float, trains: bool) -> None:
        super().__init__()
        self.head, self.temperature = head.requires_grad_(trains), temperature
        self.teacher = teacher.requires_grad_(False)

    def forward(self, view: View) -> Tensor:
        wanted = view.reference[SOURCE_LOGITS]
        return functional.distillation_loss(view.source_logits(self.head), wanted, self.temperature)


SOURCE_DATA = advising.Rule(
    (("source_data", ">=", 1),), "pretraining data is available ({source_data:.0f} data set)", "Zhao et al., 2019"
)
RELATED_SOURCE_DATA = advising.Rule(
    (("source_data", ">=", 1), ("source_skill", ">=", 0.5)),
    "source data is available ({source_data:.0f} data set), and the pretrained classes predict the target's with skill "
    "{source_skill:.2f}: the tasks are related",
    "Zhao et al., 2019",
)


@register("soft")
@dataclass(frozen=True, kw_only=True)
class SoftConfig(FTConfig):
    r"""Keep the source loss alongside the target's, and phase it out gradually.

    .. math::
        L(t) = \mathrm{CE}(h_T(f(x_T)), y_T) + \lambda(t) \, \mathrm{CE}(h_S(f(x_S)), y_S), \qquad
        \lambda(t) = \lambda_0 \, s(t / t_0)

    :math:`\lambda_0` is ``weight``, :math:`t_0` is ``until``; :math:`s` falls from 1 to 0
    (:func:`hf_ft.core.schedules.decay`).
    :math:`h_S` is the pretrained head, which trains while :math:`\lambda > 0` and is removed afterwards. Without source
    data (``source="head"``), the second loss is
    :math:`4 \, \mathrm{KL}(h_S^0(f^0(x_T)) \,\|\, h_S(f(x_T)))` at temperature 3, which keeps the pretrained network's
    predictions on the target images.
    """

    paper = Paper(
        "Zhao, Zhang, Jiang, Xu, Li, Ma",
        "Effective Domain Knowledge Transfer with Soft Fine-tuning",
        "arXiv 2019",
        "https://arxiv.org/abs/1909.02236",
    )
    formula = (
        "L(t) = CE(h_T(f(x_T)), y_T) + lambda(t) CE(h_S(f(x_S)), y_S);  lambda(t) = weight s(t / until), s from 1 to 0"
    )
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"until": Choice((0.25, 0.5, 1.0))}
    cost = advising.TWICE_THE_SAMPLES
    advice = {SOURCE_DATA: 1, RELATED_SOURCE_DATA: 2, advising.UNRELATED_SOURCE: -1}

    schedule: Schedule = option(
        "linear",
        "Decay of the source loss: 'step' drops it abruptly, 'constant' keeps it (joint training).",
    )
    weight: float = option(1.0, "Initial weight of the source loss; 0 is plain fine-tuning.", range="[0, inf)")
    norm_mode: NormMode = option(
        "eval",
        "Mode of the normalisation layers: 'eval' keeps their pretrained statistics (unless it is combined with a "
        "strategy that has stages or, like daft, needs batch statistics), 'auto' updates those of layers that train, "
        "'train' those of all.",
        formerly="auto",
    )
    until: float = option(
        0.5, "Fraction of the run after which the weight is 0; ignored by 'constant'.", range="(0, 1]"
    )
    source_ratio: float = option(1.0, "Source samples per target sample in a batch.", range="(0, inf)")
    source_forward: Literal["joint", "separate"] = option(
        "joint",
        "'joint': one forward pass for both batches, so that normalisation layers see both domains at once; "
        "'separate': one pass each.",
    )
    source: Literal["data", "head"] = option(
        "data",
        "'data': train on a source data set. 'head': without source data, preserve the pretrained head's "
        "predictions on the target samples.",
    )
    source_label_map: LabelMap = option(None, LABEL_MAP_HELP)
    distillation_weight: float = option(
        4.0, "With source='head': weight of the distillation loss.", range="(0, inf)", source="code"
    )
    temperature: float = option(
        3.0, "With source='head': temperature of the distillation.", range="(0, inf)", source="code"
    )
    train_source_head: bool = option(
        True,
        "With source='head': whether the source head trains too; in the library TLLib it does not.",
        formerly=True,
    )

    def __post_init__(self) -> None:
        if isinstance(self.until, (int, float)) and self.until > 1:
            raise OptionError(
                f"SoftConfig.until={self.until!r} lies outside (0, 1]: the run would end before the source loss has "
                "decayed. Default: 0.5. To keep the source loss, set schedule='constant'."
            )
        super().__post_init__()
        object.__setattr__(self, "source_label_map", as_json(self.source_label_map))

    def source_free(self) -> SoftConfig:
        return dataclasses.replace(self, source="head")

    def needs(self) -> Needs:
        required = self.weight > 0 and self.source == "data"
        return Needs(
            source_head=self.weight > 0,
            source_data="required" if required else "optional",
            without_source_data=", or set source='head', which needs none",
        )

    def check_model(self, model: nn.Module) -> None:
        if self.weight:
            require_source_head(model)

    def plan(self, model: nn.Module, state: State) -> Plan:
        if not self.weight:
            return Plan()
        head = source_head(model)
        term = self._from_data(head) if self.source == "data" else self._from_head(head, attached_source_head(model))
        schedule = None if self.schedule == "constant" else Decay(self.schedule, self.until)
        return Plan(
            terms=(dataclasses.replace(term, schedule=schedule),),
            streams=(self._stream(head),) if self.source == "data" else (),
        )

    def _from_data(self, head: SourceHead) -> Term:
        return Term("source", SourceLoss(head), weight=self.weight, layers=(SOURCE_LOGITS,), stream="source")

    def _from_head(self, head: SourceHead, teacher: SourceHead) -> Term:
        return Term(
            "distillation",
            SourceDistillation(head, teacher, self.temperature, self.train_source_head),
            weight=self.weight * self.distillation_weight,
            needs=frozenset({"reference"}),
            layers=(SOURCE_LOGITS,),
            starts_at_zero=True,
        )

    def _stream(self, head: SourceHead) -> Stream:
        labels = SourceLabels(head.classes, head_names(head.names), self.source_label_map)
        return Stream("source", self.source_ratio, self.source_forward, labels)


@register("lwf")
@dataclass(frozen=True, kw_only=True)
class LwFConfig(FTConfig):
    r"""Learning without Forgetting: preserve the pretrained head's predictions on the target's samples.

    .. math::
        L = \mathrm{CE}(h_T(f(x)), y)
            + \lambda \, \mathrm{KL}(\sigma(h_S^0(f^0(x)) / T) \,\|\, \sigma(h_S(f(x)) / T)), \qquad
        \sigma = \operatorname{softmax}

    :math:`\lambda` is ``weight``. This is :class:`SoftConfig` with ``source="head"``, a constant weight
    and a source head that stays as pretrained.
    """

    paper = Paper(
        "Li, Hoiem",
        "Learning without Forgetting",
        "ECCV 2016",
        "https://arxiv.org/abs/1606.09282",
    )
    formula = "L = CE(h_T(f(x)), y) + weight KL(softmax(h0_S(f0(x)) / T) || softmax(h_S(f(x)) / T))"
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"weight": LogRange(0.3, 10.0)}
    cost = advising.WITH_A_FROZEN_COPY
    advice = {advising.RELATED_SOURCE: 1, advising.UNRELATED_SOURCE: -1}

    weight: float = option(4.0, "Weight of the distillation loss.", range="[0, inf)", source="code")
    temperature: float = option(3.0, "Temperature of the distillation.", range="(0, inf)", source="code")
    train_source_head: bool = option(
        False,
        "Whether the source head trains too, as in the paper; in the library TLLib it does not.",
        source="code",
        formerly=True,
    )

    def needs(self) -> Needs:
        return Needs(source_head=self.weight > 0)

    def check_model(self, model: nn.Module) -> None:
        self._soft().check_model(model)

    def plan(self, model: nn.Module, state: State) -> Plan:
        return self._soft().plan(model, state)

    def _soft(self) -> SoftConfig:
        return SoftConfig(
            source="head",
            schedule="constant",
            weight=self.weight,
            distillation_weight=1.0,
            temperature=self.temperature,
            train_source_head=self.train_source_head,
            head=self.head,
            blocks=self.blocks,
        )
