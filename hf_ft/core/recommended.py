"""The training arguments that a strategy recommends; a learning rate depends on the optimizer and the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SGD, ADAM = "sgd", "adamw_torch"
FITTED = "fitted"  # a recommended learning rate that is fitted to the features of the head
CHOSEN = "chosen"  # one that the strategy chooses together with what it trains; a comparison leaves it to the strategy


@dataclass(frozen=True)
class Recommended:
    """A recommended training argument, its source (code, paper, ours), and the reason if it is not obvious."""

    value: Any
    source: str = "ours"
    why: str = field(default="", repr=False)

    @property
    def found(self) -> bool:
        """Whether the strategy finds the value itself, if the user sets none."""
        return self.value in (FITTED, CHOSEN)

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class LearningRate(Recommended):
    """A recommended learning rate.

    Attributes:
        value: the rate for the recommended optimizer, which is AdamW unless the strategy says otherwise; or
            :data:`FITTED` or :data:`CHOSEN`.
        sgd: the rate under SGD with momentum, if that is not the recommended optimizer.
        adam: the rate under AdamW, if that is not the recommended optimizer.
        without_batch_norm: factor for networks without BatchNorm, such as transformers: if all weights train, they need
            lower rates.
        kept: the rate under AdamW if BatchNorm keeps its statistics (``norm_mode="eval"``), for all families.
        kept_sgd: the same under SGD.
        families: other rates under AdamW, by family of networks (``config.model_type``).
        warm_up: whether a warm-up goes with it under AdamW whatever the network; otherwise, only where
            ``without_batch_norm`` or ``kept`` changes the rate.
    """

    sgd: float | None = None
    adam: float | None = None
    without_batch_norm: float = 1.0
    kept: float | None = None
    kept_sgd: float | None = None
    families: Mapping[str, float] = field(default_factory=dict)
    warm_up: bool = False

    def __str__(self) -> str:
        """For display: the value, those for other optimizers, networks and modes, and where a warm-up goes with it."""
        others = [
            f"{rate:g} under {name}" for name, rate in (("SGD", self.sgd), ("Adam", self.adam)) if rate is not None
        ]
        others += [f"{rate:g} for {name}" for name, rate in self.families.items()]
        warmed_up = []
        if self.without_batch_norm != 1:
            warmed_up.append("without BatchNorm")
            others += [] if isinstance(self.value, str) else [f"times {self.without_batch_norm:.2g} without BatchNorm"]
        if self.kept is not None:
            warmed_up.append("if norm_mode='eval'")
            others.append(f"{self.kept:g} (SGD: {self.kept_sgd:g}) if norm_mode='eval'")
        shown = ", ".join([str(self.value), *others])
        if self.warm_up:
            return f"{shown}; under Adam, warmup_steps=0.1"
        return f"{shown}; under Adam, warmup_steps=0.1 {' or '.join(warmed_up)}" if warmed_up else shown

    def warms_up(self, batch_norm: bool, kept: bool) -> bool:
        """Whether a warm-up goes with the rate under AdamW; see :meth:`under` for the arguments."""
        return self.warm_up or kept or (not batch_norm and self.without_batch_norm != 1)

    def under(self, optim: str, batch_norm: bool = True, kept: bool = False, family: str = "") -> Recommended:
        """The rate for an optimizer and a network.

        Args:
            batch_norm: whether the network has BatchNorm.
            kept: whether BatchNorm keeps its statistics.
            family: the network's ``config.model_type``.
        """
        other = self.sgd if optim == SGD else self.families.get(family, self.adam)
        if kept and batch_norm and self.kept is not None:
            other = self.kept_sgd if optim == SGD else self.kept
        found = Recommended(self.value, self.source, self.why) if other is None else Recommended(other, why=self.why)
        if batch_norm or self.without_batch_norm == 1 or isinstance(found.value, str):
            return found
        return Recommended(float(f"{self.without_batch_norm * found.value:.3g}"), why=self.why)  # as one would write it


# For pretrained weights that all train: measured, see docs/rates.md.
USUAL_RATE = {
    "learning_rate": LearningRate(
        3e-4, sgd=3e-3, without_batch_norm=0.1, kept=2e-4, kept_sgd=3e-4, families={"efficientnet": 1e-3}
    )
}
