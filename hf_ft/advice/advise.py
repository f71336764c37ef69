"""``advise``: which strategies to try first on a model and a data set, with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hf_ft.advice.measure import Collate, measure_signals
from hf_ft.advice.rules import Recommendation, recommend
from hf_ft.advice.signals import Signals
from hf_ft.records import restored

__all__ = ["Advice", "advise"]


@dataclass(frozen=True)
class Advice:
    """The measured signals and the recommendations based on them.

    Attributes:
        signals: the measured figures.
        recommendations: every registered strategy, most promising first.
    """

    signals: Signals
    recommendations: tuple[Recommendation, ...]

    @property
    def order(self) -> tuple[str, ...]:
        """Names of all strategies, most promising first."""
        return tuple(one.strategy for one in self.recommendations)

    @property
    def usable(self) -> tuple[str, ...]:
        """The same order, without strategies that cannot run with what is available."""
        return tuple(one.strategy for one in self.recommendations if one.usable)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serializable dictionary."""
        found = [asdict(one) | {"reasons": [asdict(r) for r in one.reasons]} for one in self.recommendations]
        return {"order": list(self.order), "signals": self.signals.to_dict(), "recommendations": found}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Advice:
        """Read the output of :meth:`to_dict`.

        Raises:
            CheckpointError: if a field is missing or of another type; the message names it.
        """
        return restored(cls, content, "the signals and recommendations of an advice")


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
    groups: Any = None,
) -> Advice:
    """Measure a few cheap signals and rank the strategies by them.

    Runs one pass over the training data without gradients and four batches with gradients, on the model's device.
    The model, its train/eval modes and the random states are left unchanged. Only training samples are used.

    Args:
        model: a pretrained classifier; its own head does not matter.
        train_dataset: map-style; samples are dictionaries of the model's keyword arguments and ``labels``, without
            augmentation. If there are more than 5,000 samples, a random subset of 5,000 is used.
        collate: turns a list of samples into a batch.
        source_head: whether the pretrained head is available to strategies. If the model carries it
            (:func:`hf_ft.from_pretrained`), the relation between the two tasks is also measured.
        source_data: whether pretraining data are available.
        members: number of source models available.
        seed: seed of the sample order and the folds.
        head: as for :func:`hf_ft.models.anatomy`.
        blocks: as for :func:`hf_ft.models.anatomy`.
        groups: a value for each training sample, the same within a group, such as patients: the probe is judged on
            groups that it has not seen.

    Raises:
        OptionError: if the model has several members, the data set has no length, labels are not one class per
            sample, there are fewer than two classes, or features are not finite.
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
        groups=groups,
    )
    return Advice(signals, recommend(signals))
