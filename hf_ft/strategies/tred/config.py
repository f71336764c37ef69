"""TRED: disentangle the target-relevant part of the pretrained features, and keep fine-tuning close to that part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.utils import logging

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    Context,
    Findings,
    FTConfig,
    LogRange,
    OptionError,
    Paper,
    Plan,
    SquaredNorm,
    State,
    Term,
    View,
    advising,
    functional,
    option,
    register,
)
from hf_ft.core.task_loss import are_classes
from hf_ft.core.terms import compared
from hf_ft.engine.frozen.features import RecordedFeatures
from hf_ft.engine.frozen.record import batches_of
from hf_ft.models import last_feature_map, layers_of, stage_outputs
from hf_ft.models.find_layouts import find_layouts
from hf_ft.models.preserve import random_states_kept
from hf_ft.strategies.tred.disentangler import Disentangler, channels_of, check_disentangler, make_disentangler
from hf_ft.strategies.tred.findings import disentangling_findings
from hf_ft.strategies.tred.loss import Weights
from hf_ft.strategies.tred.train import Disentangled, disentangle

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class DistanceFromRelevant:
    """Squared distance per position of the features from the target-relevant part of the reference's features."""

    layer: str
    # Excluded from comparison: the truth value of a tensor is ambiguous.
    disentangler: Disentangler | None = field(compare=False, repr=False)

    def __call__(self, view: View) -> Tensor:
        now, before = compared(view, self.layer)
        mask = view.token_masks.get(self.layer)
        if self.disentangler is not None:
            self._follow(before)
            with torch.no_grad():
                before = self.disentangler(before, mask)[0]
        return functional.feature_distance(now, before, mask=mask)

    def _follow(self, features: Tensor) -> None:
        assert self.disentangler is not None
        if self.disentangler.scale.device != features.device:
            self.disentangler.to(features.device)


@register("tred")
@dataclass(frozen=True, kw_only=True)
class TREDConfig(FTConfig):
    r"""Disentangle the target-relevant part of the pretrained features, and keep the features close to it.

    First, a disentangler learns to split the frozen network's last feature map :math:`F` into :math:`P` and :math:`N`:

    .. math::
        L_1 = \mathrm{CE}(c(\bar P), y) + \lambda_r \overline{(P + N - F)^2} - \lambda_m \mathrm{MMD}^2(\bar P, \bar N)
            + \lambda_i I(\bar P; \bar N) + \lambda_b B

    Then, with the disentangler frozen, the network is fine-tuned:

    .. math::
        L_2 = \mathrm{CE} + \alpha \frac{\lVert F(x; w) - P(x) \rVert^2}{hw}
            + \frac{\beta}{2} \lVert w_{\text{head}} \rVert^2
    """

    paper = Paper(
        "Li, Hu, Li, Xiong, Xu, Dou",
        "Towards Accurate Knowledge Transfer via Target-awareness Representation Disentanglement",
        "Machine Learning 113(2), 699-723, 2024",
        "https://doi.org/10.1007/s10994-023-06381-2",
        note="preprint: https://arxiv.org/abs/2010.08532",
    )
    formula = (
        "first: L1 = CE(c(P), y) + lambda_r (P + N - F)^2 - lambda_m MMD2(P, N) + lambda_i I(P; N) + lambda_b B;  "
        "then: L2 = CE + alpha ||F(x; w) - P(x)||^2 / (h w) + beta/2 ||w_head||^2"
    )
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"alpha": LogRange(1e-3, 1e-1)}
    cost = advising.WITH_A_TRAINING_BEFORE + advising.DEARER  # trains a disentangler first
    advice = {advising.POOR_FEATURES_FEW_SAMPLES: 1, advising.VERY_FEW_SAMPLES: 1}

    criterion: Literal["max_mmd", "min_mi", "both", "none"] = option(
        "both",
        "What separates P from N: a large MMD, low mutual information, or both. 'none': no disentangling; the features "
        "are kept close to all of F (plain feature regularisation).",
        source="paper",
    )
    disentangler: Literal["branches", "mask"] = option(
        "mask",
        "'mask': one gate per channel, P = m F and N = (1 - m) F. 'branches': P and N by a 1x1 convolution, BatchNorm "
        "and ReLU each, which can also separate what is mixed across channels, but needs more images.",
    )
    alpha: float = option(
        0.001, "Weight of the distance from P; the paper tries 0.001, 0.01, 0.1.", range="[0, inf)", source="paper"
    )
    beta: float = option(0.01, "Weight of the squared norm of the head.", range="[0, inf)")
    reconstruction: float = option(10.0, "lambda_r, weight of the reconstruction of F by P + N.", range="[0, inf)")
    mmd: float = option(0.1, "lambda_m, weight of the MMD between P and N.", range="[0, inf)")
    information: float = option(0.1, "lambda_i, weight of the mutual information between P and N.", range="[0, inf)")
    bottleneck: float = option(
        1.0,
        "lambda_b, weight of the bottleneck, which removes from P what is unrelated to the label, and the label from "
        "N; 0 for the paper's terms alone, which leave P = F as an optimum.",
        range="[0, inf)",
    )
    epochs: int = option(20, "Epochs of disentangling.", range="[1, inf)")
    lr: float = option(0.3, "Learning rate of the disentangling (Adam).", range="(0, inf)")
    layer: str | None = option(None, "Name of the module whose output is F; None for the last feature map.")

    def check_arguments(self, args: TrainingArguments) -> None:
        size = args.per_device_train_batch_size
        if self.criterion != "none" and self.alpha and size < 2:
            raise OptionError(
                f"per_device_train_batch_size={size}: tred.criterion={self.criterion!r} compares the samples of a "
                "batch with each other. Use 2 or more, such as 32, or criterion='none'."
            )

    def check_model(self, model: nn.Module) -> None:
        self._named(model)

    def measures(self) -> bool:
        return self.alpha > 0

    def measure(self, model: nn.Module, context: Context) -> State:
        config = getattr(model, "config", None)
        classes = getattr(config, "num_labels", None)
        if classes is None or not are_classes(context.samples.read([0]).get("labels"), config):
            raise OptionError(
                "tred: class labels (B,) are needed to find the target-relevant features, and this task has none. Use "
                "DELTAConfig."
            )
        with random_states_kept(), context.recipe.computing():
            some = context.samples.read(list(range(min(2, context.samples.count))))
            del some["labels"]  # may be -100, no label
            layer = self._named(model) or last_feature_map(model, self.anatomy(model), some)
            layout = find_layouts(model, [layer], some)[layer]
        if self.criterion == "none":
            return State(info={"layer": layer})
        result = self._disentangle(RecordedFeatures(model, layer, context, layout), classes, context)
        if not all(math.isfinite(value) for value in result.figures.values()):
            raise OptionError(f"tred.lr={self.lr!r}: {result.verdict}")
        for epoch, terms in enumerate(result.history):
            logger.info(f"tred: disentangling, epoch {epoch + 1}: {_in_words(terms)}")
        logger.info(f"tred: disentangled {layer}: {_in_words(result.figures)}")
        if result.verdict:
            logger.warning(f"tred: the disentangling of {layer} went wrong: {result.verdict}")
        info: dict[str, Any] = {
            "layer": layer,
            "figures": result.figures,
            "history": result.history,
            "verdict": result.verdict,
            "non_negative": result.module.non_negative,
        }
        return State(tensors={name: t.cpu() for name, t in result.module.state_dict().items()}, info=info)

    def check_state(self, model: nn.Module, state: State) -> None:
        """As for any state, except that gates may be closed, with a logit of minus infinity."""
        if self.alpha and "layer" in state.info:
            layers_of(model, (state.info["layer"],), lambda: stage_outputs(self.anatomy(model))[-1:])
        if self.alpha and self.criterion != "none" and state.tensors:
            check_disentangler(self.disentangler, state.tensors)

    def plan(self, model: nn.Module, state: State) -> Plan:
        head = self.anatomy(model).head.modules
        terms = [Term("tred_head", SquaredNorm(head), weight=self.beta, replaces_decay=head)] if self.beta else []
        if self.alpha:
            layer = state.info.get("layer")
            if layer is None:
                raise OptionError("tred measures the data before planning: pass a context to set_up, or states.")
            terms.append(
                Term(
                    "tred",
                    DistanceFromRelevant(layer, self._module(state)),
                    weight=self.alpha,
                    needs=frozenset({"reference"}),
                    layers=(layer,),
                    starts_at_zero=self.criterion == "none",
                )
            )
        return Plan(terms=tuple(terms))

    def learned(self, state: State) -> str:
        """A sentence on the disentanglement, for the model card."""
        if "figures" not in state.info:
            return ""
        figures, layer = state.info["figures"], state.info["layer"]
        text = f"Disentangled the output of `{layer}`: {_in_words(figures)}."
        return f"{text} It went wrong: {state.info['verdict']}" if state.info["verdict"] else text

    def findings(self, state: State) -> Findings:
        return disentangling_findings(state.info, self.learned(state))

    def _named(self, model: nn.Module) -> str | None:
        """The layer given in the options, if any."""
        if self.layer is None:
            return None
        return layers_of(model, (self.layer,), lambda: stage_outputs(self.anatomy(model))[-1:])[0]

    def _disentangle(self, read: RecordedFeatures, classes: int, context: Context) -> Disentangled:
        weights = Weights(
            reconstruction=self.reconstruction,
            mmd=self.mmd if self.criterion in ("max_mmd", "both") else 0.0,
            information=self.information if self.criterion in ("min_mi", "both") else 0.0,
            bottleneck=self.bottleneck,
        )
        with tqdm(total=self.epochs, desc="Disentangling", leave=False, disable=not context.progress) as bar:

            def advance(terms: dict[str, float]) -> None:
                bar.set_postfix_str(_in_words(terms))
                bar.update()

            rows = _labelled(read, classes, context)
            return disentangle(
                lambda chosen: read([rows[row] for row in chosen]),
                len(rows),
                classes,
                self.disentangler,
                weights,
                epochs=self.epochs,
                batch_size=context.recipe.batch_size * context.ranks,  # the same for any number of processes
                lr=self.lr,
                generator=context.generator,
                advance=advance,
            )

    def _module(self, state: State) -> Disentangler | None:
        """The frozen disentangler stored in a state."""
        if self.criterion == "none":
            return None
        channels = channels_of(state.tensors)
        if not channels:
            raise OptionError("tred: the state holds no disentangler. Measure first (pass a context to set_up).")
        module = make_disentangler(self.disentangler, channels, state.info["non_negative"])
        module.load_state_dict(dict(state.tensors))
        return module.eval().requires_grad_(False)


def _labelled(read: RecordedFeatures, classes: int, context: Context) -> list[int]:
    """Indices of the labelled samples; -100 means no label, as in cross-entropy.

    Raises:
        OptionError: if a label is not one of the model's classes.
    """
    if context.labels is not None:
        labels = torch.from_numpy(context.labels)
    else:
        labels = torch.cat([read(rows)[1].cpu() for rows in batches_of(read.count)])
    bad = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
    if len(bad):
        raise OptionError(f"train_dataset: label {int(bad[0])} lies outside [0, {classes}), the model's num_labels.")
    return torch.nonzero(labels != -100).flatten().tolist()


def _in_words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())
