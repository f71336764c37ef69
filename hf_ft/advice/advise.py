"""``advise``: which strategies to try first on a model and a data set, with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hf_ft.advice.measure import Collate, measure_signals
from hf_ft.advice.rules import Reason, Recommendation, recommend
from hf_ft.advice.signals import Signals
from hf_ft.errors import OptionError

__all__ = ["Advice", "advise"]


@dataclass(frozen=True)
class Advice:
    """What was measured, and what follows from it.

    Attributes:
        signals: the figures.
        recommendations: every registered strategy, what to try first in front.
    """

    signals: Signals
    recommendations: tuple[Recommendation, ...]

    @property
    def order(self) -> tuple[str, ...]:
        """The names of all strategies, what to try first in front."""
        return tuple(found.strategy for found in self.recommendations)

    @property
    def usable(self) -> tuple[str, ...]:
        """The same, without those that cannot run on what is at hand."""
        return tuple(found.strategy for found in self.recommendations if found.usable)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        found = [asdict(one) | {"reasons": [asdict(r) for r in one.reasons]} for one in self.recommendations]
        return {"order": list(self.order), "signals": self.signals.to_dict(), "recommendations": found}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Advice:
        """What :meth:`to_dict` wrote.

        Raises:
            OptionError: something is missing; the message names it.
        """
        try:
            found = tuple(
                Recommendation(**{**one, "reasons": tuple(Reason(**reason) for reason in one["reasons"])})
                for one in content["recommendations"]
            )
            return cls(Signals.from_dict(content["signals"]), found)
        except (KeyError, TypeError) as error:
            raise OptionError(f"this is no advice ({error}): pass what Advice.to_dict wrote.") from error


def advise(
    model: nn.Module,
    train_dataset: Any,
    collate: Collate,
    *,
    source_head: bool = False,
    source_data: bool = False,
    members: int = 1,
    seed: int = 0,
    head: str | None = None,
    blocks: str | None = None,
) -> Advice:
    """Measure a few cheap figures, and order the strategies by what they say.

    One pass over the training data without a gradient and four batches with one, where the model is; the model, its
    modes and random states are as before afterwards. Only training samples are looked at.

    Args:
        model: a pretrained classifier; its own head does not matter.
        train_dataset: map-style, samples as dictionaries of the model's keyword arguments and ``labels``, without
            augmentation. Of more than 5,000 samples, so many are drawn.
        collate: makes a batch of a list of samples.
        source_head: whether strategies can have the pretrained head. Where the model carries it
            (:func:`hf_ft.from_pretrained`), how related the tasks are is measured, too.
        source_data: whether data of the pretraining can be given.
        members: how many source models are at hand.
        seed: of the samples' order and of the folds.
        head: as for :func:`hf_ft.models.anatomy`.
        blocks: as for :func:`hf_ft.models.anatomy`.

    Raises:
        OptionError: a model of several members, a data set without a length, labels that are not one class per sample,
            fewer than two classes, or features that are not finite.
    """
    signals = measure_signals(
        model,
        train_dataset,
        collate,
        source_head=source_head,
        source_data=source_data,
        members=members,
        seed=seed,
        head=head,
        blocks=blocks,
    )
    return Advice(signals, recommend(signals))
