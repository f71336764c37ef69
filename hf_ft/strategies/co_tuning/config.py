"""Co-Tuning: train the pretrained head as well, on each target class's distribution over source classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    Context,
    FTConfig,
    LogRange,
    Needs,
    OptionError,
    Paper,
    Plan,
    State,
    Term,
    View,
    advising,
    check_tensor,
    option,
    register,
)
from hf_ft.data.source_labels import LABEL_MAP_HELP, LabelMap, SourceLabels, as_json, head_names
from hf_ft.engine.frozen.features import RecordedFeatures
from hf_ft.engine.frozen.record import batches_of
from hf_ft.models import SOURCE_LOGITS, SourceHead, require_source_head
from hf_ft.models.source_head import pretrained_logits, source_head
from hf_ft.strategies.co_tuning.relationship import (
    direct_relationship,
    fit_temperature,
    relationship_loss,
    reverse_relationship,
)

RELATIONSHIP = "relationship"
CALIBRATED_ON = 2000  # maximum number of source samples


class RelationshipLoss(nn.Module):
    """Cross-entropy of the source head on the target batch, with the source classes related to its labels."""

    relationship: Tensor

    def __init__(self, head: SourceHead, relationship: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("relationship", relationship.clone())

    def forward(self, view: View) -> Tensor:
        labels = view.batch["labels"]
        mixed = labels.dim() == 2  # shares of the classes, of mixed images
        targets = labels.to(self.relationship) @ self.relationship if mixed else self.relationship[labels]
        return relationship_loss(view.source_logits(self.head), targets)


FEW_SAMPLES_AND_HEAD = advising.Rule(
    (("class_median", "<", advising.VERY_FEW), ("source_head", ">=", 1)),
    "{class_median:.0f} samples per class are very few, which is where the pretrained head helps most",
    advising.YOU,
)


@register("co_tuning")
@dataclass(frozen=True, kw_only=True)
class CoTuningConfig(FTConfig):
    r"""Fine-tune the pretrained head as well, on soft source labels.

    .. math::
        L = \mathrm{CE}(h_T(f(x)), y)
            - \lambda \sum_s p(y_s = s \mid y_t = y) \, \log \, \operatorname{softmax}(h_S(f(x)))_s

    :math:`\lambda` is ``weight``; 0 is plain fine-tuning. :math:`p(y_s \mid y_t)` is learned before training from the
    pretrained network's predictions on the training samples. The pretrained head is removed after training.
    """

    paper = Paper(
        "You, Kou, Long, Wang",
        "Co-Tuning for Transfer Learning",
        "NeurIPS 2020",
        "https://proceedings.neurips.cc/paper/2020/hash/c8067ad1937f728f51288b3eb986afaa-Abstract.html",
    )
    formula = "L = CE(h_T(f(x)), y) + weight CE(h_S(f(x)), p(y_s | y))"
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"weight": LogRange(0.3, 6.0)}
    cost = advising.WITH_A_PASS_BEFORE + advising.DEARER  # and a second head
    advice = {advising.RELATED_SOURCE: 2, FEW_SAMPLES_AND_HEAD: 1, advising.UNRELATED_SOURCE: -1}

    weight: float = option(2.3, "Weight of the source head's loss.", range="[0, inf)", source="code")
    relationship: Literal["direct", "reverse"] = option(
        "direct",
        "'direct' averages the source head's predictions over each class; 'reverse' fits a calibrated logistic "
        "regression from these predictions to the target class and inverts it by Bayes' rule: sharper, but noisy with "
        "few samples.",
    )
    temperature: float | Literal["auto"] = option(
        "auto",
        "Temperature of the source head's predictions. 'auto' calibrates it on source data if there are any, and is 1 "
        "otherwise.",
        range="(0, inf)",
    )
    source_label_map: LabelMap = option(None, LABEL_MAP_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "source_label_map", as_json(self.source_label_map))

    def needs(self) -> Needs:
        return Needs(source_head=self.weight > 0, source_data="optional")

    def check_model(self, model: nn.Module) -> None:
        if self.weight:
            require_source_head(model)
            kind = getattr(getattr(model, "config", None), "problem_type", None)
            if kind in ("regression", "multi_label_classification"):
                raise OptionError(f"co_tuning needs one class per sample, but the model's problem_type is {kind!r}.")

    def measures(self) -> bool:
        return self.weight > 0

    def measure(self, model: nn.Module, context: Context) -> State:
        head = source_head(model)
        temperature = self._calibrate(model, head, context)  # first: it may reject the source labels
        recorded = RecordedFeatures(model, SOURCE_LOGITS, context)
        read = [recorded(rows)[:2] for rows in batches_of(recorded.count)]
        logits, labels = ([part[i].cpu() for part in read] for i in range(2))
        config: Any = model.config
        known = torch.cat(logits), torch.cat(labels), config.num_labels, temperature
        if self.relationship == "reverse":
            relationship = reverse_relationship(*known, groups=context.groups)
        else:
            relationship = direct_relationship(*known)
        names = {str(place): name for place, name in head.names.items()}
        return State({RELATIONSHIP: relationship}, {"temperature": temperature, "names": names})

    def check_state(self, model: nn.Module, state: State) -> None:
        super().check_state(model, state)
        if self.weight and RELATIONSHIP in state.tensors:
            classes: Any = model.config
            shape = classes.num_labels, source_head(model).classes
            check_tensor(RELATIONSHIP, state.tensors[RELATIONSHIP], shape, least=0, most=1)

    def plan(self, model: nn.Module, state: State) -> Plan:
        if not self.weight:
            return Plan()
        if RELATIONSHIP not in state.tensors:
            raise OptionError("co_tuning: no relationship was measured: pass a context to set_up, or use FTTrainer.")
        loss = RelationshipLoss(source_head(model), state.tensors[RELATIONSHIP])
        term = Term("co_tuning", loss, weight=self.weight, needs=frozenset({"inputs"}), layers=(SOURCE_LOGITS,))
        return Plan(terms=(term,))

    def learned(self, state: State) -> str:
        if RELATIONSHIP not in state.tensors:
            return ""
        relationship, names = state.tensors[RELATIONSHIP], state.info["names"]
        tops = ", ".join(
            f"`{names.get(str(int(row.argmax())), int(row.argmax()))}` for {label} ({float(row.max()):.2f})"
            for label, row in enumerate(relationship[:10])
        )
        return f"Most similar source class of each target class (temperature {state.info['temperature']:.2f}): {tops}."

    def _calibrate(self, model: nn.Module, head: SourceHead, context: Context) -> float:
        if not isinstance(self.temperature, str):
            return float(self.temperature)
        if context.source is None:
            return 1.0
        prepare = SourceLabels(head.classes, head_names(head.names), self.source_label_map)(context.source.dataset)
        logits, labels = [], []
        with context.recipe.computing():
            for batch in context.source.batches(CALIBRATED_ON):
                logits.append(pretrained_logits(model, batch).cpu())
                labels.append(prepare(batch)["labels"].cpu())
        return fit_temperature(torch.cat(logits), torch.cat(labels))
