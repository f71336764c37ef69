r"""The learning rate of a head, fitted to the features that it sees: the value ``"auto"`` of an option ``head_lr``.

Under SGD with momentum m, a linear head diverges above :math:`\eta_{\max} = 2 (1 + m) / (c \lambda)`, where
:math:`\lambda` is the largest eigenvalue of the features' second moment and c depends on the loss (see
:func:`hf_ft.functional.head_curvature`). Features of different networks and data differ in :math:`\lambda` by a
factor of more than ten, so no single rate suits all of them; :math:`\eta_{\max}` does, since c is a bound that is
rarely reached.

Under Adam and its variants, a step changes each weight by about the rate, hence a logit by up to the rate times
:math:`\lVert f \rVert_1`. What all samples have in common changes all their logits alike, as a bias does, and in some
networks it is most of the norm (two thirds in DINOv2). So the fitted rate makes the rate times
:math:`\lVert f - \bar f \rVert_1` a fixed number.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_ft.core.context import Context, Samples, State
from hf_ft.core.plan import Rate
from hf_ft.errors import OptionError
from hf_ft.functional import feature_spread, head_curvature, stable_rate
from hf_ft.models.feature_hooks import INPUT, activations
from hf_ft.models.head_layers import adapter_around, logit_layers
from hf_ft.models.names import Names
from hf_ft.models.parts import Anatomy
from hf_ft.models.preserve import random_states_kept

HeadRate = float | Literal["auto"] | None
LOOKED_AT = 256  # samples
READ = 64  # of them at a time
# The largest change of a sample's logit in a step of Adam, relative to those of others; measured in docs/rates.md.
STEP = 2.0
LEAST, MOST = 1e-6, 1.0  # whatever the features, zeros included
HEAD_LR = "head_lr"
UNSET_RATE = 5e-5  # learning_rate of TrainingArguments if the user does not set it
logger = logging.get_logger(__name__)


class WithHeadRate(Protocol):
    """A strategy with a learning rate for the head."""

    ft_type: ClassVar[str]

    @property
    def head_lr(self) -> HeadRate: ...

    def anatomy(self, model: nn.Module) -> Anatomy: ...


@dataclass(frozen=True)
class HeadFit:
    """The quantities that determine the learning rate of a head.

    Attributes:
        curvature: the largest eigenvalue of the features' second moment.
        feature_spread: their mean L1 distance from their mean.
        loss_curvature: the largest second derivative of the loss in the logits.
    """

    curvature: float
    feature_spread: float
    loss_curvature: float = 0.5

    def rate(self, optim: str, momentum: float = 0.9) -> float:
        """The fitted rate with ``sgd``, or with an optimizer that scales its steps, as Adam and its variants do.

        It is rounded to two digits, so that it is the same on every machine.
        """
        stable = stable_rate(self.loss_curvature * self.curvature, momentum)
        # Features of a single sample have no spread.
        rate = stable if optim == "sgd" else STEP / max(self.feature_spread, STEP / MOST)
        return float(f"{min(max(rate, LEAST), MOST):.2g}")


def fit_head(model: nn.Module, parts: Anatomy, samples: Samples, computing: Any = nullcontext) -> HeadFit:
    """Measure the features that the head of a model sees on this data.

    Args:
        parts: the model's parts. In an ensemble, the member with the lowest stable rate decides.
        samples: up to 256 of them, spread over the data, pass through the model in eval mode; it is left unchanged.
        computing: context manager for the model's computations, such as autocast.
    """
    heads = [member.head.modules for _, member in parts.members] or [parts.head.modules]
    layers = [layer for head in heads for layer in logit_layers(model, head) or logit_layers(model, head, False)]
    features = _features(model, tuple(adapter_around(model, layer) or layer for layer in layers), samples, computing)
    return HeadFit(
        max(float(head_curvature(values)) for values in features),
        max(float(feature_spread(values)) for values in features),
        loss_curvature(model),
    )


def loss_curvature(model: Any) -> float:
    """The largest second derivative of the model's loss in its logits; see :func:`hf_ft.functional.head_curvature`."""
    config = getattr(model, "config", None)
    kind, outputs = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if kind == "multi_label_classification":
        return 1 / (4 * outputs)
    return 2 / outputs if kind == "regression" or outputs == 1 else 1 / 2


def measure_head_rate(strategy: WithHeadRate, model: nn.Module, context: Context) -> dict[str, float]:
    """For ``measure``: the entries of the state's ``info``; empty unless ``head_lr="auto"``."""
    if strategy.head_lr != "auto":
        return {}
    if not context.samples.count:
        logger.warning(
            f"{strategy.ft_type}.head_lr='auto' uses learning_rate={context.recipe.learning_rate:g}: a stream of "
            "samples is not read before training. Set a number, let it be read with measure_samples=256, or pass "
            "a map-style train_dataset."
        )
        return {}
    fit = fit_head(model, strategy.anatomy(model), context.samples, context.recipe.computing)
    optimizer = context.recipe.optimizer([{"params": [torch.zeros(1, requires_grad=True)]}])
    sgd = isinstance(optimizer, torch.optim.SGD)
    rate = fit.rate("sgd", optimizer.defaults["momentum"]) if sgd else fit.rate("adam")
    found = {HEAD_LR: rate, "curvature": fit.curvature, "feature_spread": fit.feature_spread}
    logger.info(f"{strategy.ft_type}: {describe_head_rate(State(info=found))}")
    return found


def head_rates(strategy: WithHeadRate, head: Names, state: State) -> tuple[Rate, ...]:
    """For ``plan``: the rate of the head, if it differs from that of everything else.

    Without a measurement, "auto" means ``args.learning_rate``.
    """
    rate = state.info.get(HEAD_LR) if strategy.head_lr == "auto" else strategy.head_lr
    return () if rate is None else (Rate(head, lr=rate),)


def check_head_rate(state: State) -> None:
    """For ``check_state``: reject a rate that :meth:`HeadFit.rate` never gives.

    Raises:
        OptionError: if the state has one.
    """
    rate = state.info.get(HEAD_LR, LEAST)
    if not isinstance(rate, int | float) or not LEAST <= rate <= MOST:
        raise OptionError(f"{HEAD_LR!r} is {rate!r}, outside [{LEAST:g}, {MOST:g}].")


def describe_head_rate(state: State) -> str:
    """The fitted rate as a sentence; empty if none was fitted."""
    if HEAD_LR not in state.info:
        return ""
    info: Mapping[str, float] = state.info
    # Earlier versions recorded another norm.
    spread = f"; mean L1 distance from their mean: {info['feature_spread']:.3g}" if "feature_spread" in info else ""
    return (
        f"The learning rate of the head, {info[HEAD_LR]:g}, was fitted to its features (largest eigenvalue of their "
        f"second moment: {info['curvature']:.3g}{spread})."
    )


def _features(model: nn.Module, layers: Names, samples: Samples, computing: Any) -> list[Tensor]:
    """The inputs of the layers, each (N, d), in eval mode."""
    parts: list[list[Tensor]] = [[] for _ in layers]
    taps = [INPUT + layer for layer in layers]
    rows = torch.linspace(0, samples.count - 1, min(LOOKED_AT, samples.count)).round().int().tolist()
    with random_states_kept(), computing():
        for start in range(0, len(rows), READ):
            found = activations(model, taps, samples.read(rows[start : start + READ]))
            for part, tap in zip(parts, taps, strict=True):
                part.append(found[tap].flatten(0, -2) if found[tap].dim() < 4 else found[tap].flatten(1))
    features = [torch.cat(part) for part in parts]
    for layer, values in zip(layers, features, strict=True):
        if not bool(values.isfinite().all()):
            raise OptionError(
                f"the input of the head's layer {layer!r} is not finite on the training data: check the inputs for NaN "
                "or infinite values."
            )
    return features
