"""BSS: batch spectral shrinkage, a penalty on feature components that transfer badly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import TrainingArguments

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
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
    functional,
    option,
    register,
)


@dataclass(frozen=True)
class SmallestSingularValues:
    """Sum of the k smallest squared singular values of the batch's features."""

    k: int

    def __call__(self, view: View) -> Tensor:
        features = view.features
        if features is None or features.dim() != 2:
            shape = None if features is None else tuple(features.shape)
            raise OptionError(
                f"bss: the head's input is {shape}, not one vector per sample (B, d), nor can it be pooled as the "
                "logits are, because the model does not return one row of logits per sample. Name a module with such "
                "an input with head=..., or use L2SPConfig."
            )
        return functional.batch_spectral_shrinkage(features, self.k)


@register("bss")
@dataclass(frozen=True, kw_only=True)
class BSSConfig(FTConfig):
    r"""Shrink the smallest singular values of each batch's features, which transfer badly.

    .. math:: L = \mathrm{CE} + \eta \sum_{i=1}^{k} \sigma_{-i}^2(F)

    :math:`F` is the (B, d) matrix of the head's input features, :math:`\sigma_{-i}` its i-th smallest singular value.
    """

    paper = Paper(
        "Chen, Wang, Fu, Long, Wang",
        "Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe Transfer Learning",
        "NeurIPS 2019",
        "https://papers.nips.cc/paper/2019/hash/c6bff625bdb0393992c9d4db0c6bbe45-Abstract.html",
    )
    formula = "L = CE + eta * sum of the k smallest squared singular values of the (B, d) features"
    recommended = USUAL_RATE
    tuned = NORM_MODES | {"eta": LogRange(1e-4, 1e-2)}
    cost = advising.WITH_A_TERM + advising.DEARER  # a singular value decomposition in each step
    advice = {advising.POOR_FEATURES_FEW_SAMPLES: 2, advising.VERY_FEW_SAMPLES: 1}

    eta: float = option(0.001, "Weight of the penalty.", range="[0, inf)", source="code")
    k: int = option(1, "Number of singular values to shrink.", range="[1, inf)", source="code")

    def needs(self) -> Needs:
        return Needs(sharded=True)

    def check_arguments(self, args: TrainingArguments) -> None:
        size = args.per_device_train_batch_size
        if self.eta and size <= self.k:
            raise OptionError(
                f"per_device_train_batch_size={size} with bss.k={self.k}: a batch has at most {size} singular values, "
                "so all of them, and thus the features themselves, would be shrunk. Use larger batches or a smaller k."
            )

    def plan(self, model: nn.Module, state: State) -> Plan:
        term = Term(
            "bss",
            SmallestSingularValues(self.k),
            weight=self.eta,
            needs=frozenset({"features"}),
            couples_batch=True,
            zero_means="features have fewer dimensions than a batch has distinct samples, or batches of one sample",
        )
        return Plan(terms=(term,) if self.eta else ())
