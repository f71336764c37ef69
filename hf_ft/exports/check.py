"""How the outputs of an exported model differ from those of the model itself, on the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_ft.data.columns import ProblemType
from hf_ft.errors import OptionError
from hf_ft.exports.graph import reason
from hf_ft.exports.runtimes import Run
from hf_ft.inference.batches import Batch
from hf_ft.inference.checkpoint import Trained
from hf_ft.inference.predictor import Prediction, activated
from hf_ft.inference.scores import Scorer
from hf_ft.metrics import Scores

MODEL = "model"  # the name of the model itself among the runs


@dataclass
class Difference:
    r"""The largest difference between two sets of logits, and how often their predictions agree.

    .. math:: \max_{n, c} \frac{|z_{nc} - z'_{nc}|}{\max(1, |z_{nc}|)}

    Attributes:
        largest: infinite if one of them is not finite.
        samples: number of samples.
        same: number of samples with the same prediction.
        batch_sizes: the batch sizes that were run.
    """

    largest: float = 0.0
    samples: int = 0
    same: int = 0
    batch_sizes: set[int] = field(default_factory=set)

    def see(self, wanted: Tensor, found: Tensor, kind: ProblemType) -> None:
        """Add a batch: logits (B, C) of the model and of its export."""
        gap = (wanted - found).abs() / wanted.abs().clamp(min=1)
        largest = float(gap.max()) if bool(gap.isfinite().all()) else math.inf
        self.largest = max(self.largest, largest)
        self.samples += len(wanted)
        self.same += int(_same(wanted, found, kind).sum())
        self.batch_sizes.add(len(wanted))

    @property
    def agreement(self) -> float:
        """The share of samples with the same prediction."""
        return self.same / max(1, self.samples)


def _same(wanted: Tensor, found: Tensor, kind: ProblemType) -> Tensor:
    """Whether (B,) the same class is predicted, or the same labels are; for regression, whether values are close."""
    if kind == "regression":
        return ((wanted - found).abs() <= 1e-2 * wanted.abs().clamp(min=1)).all(dim=1)
    if kind == "multi_label_classification":
        return ((wanted > 0) == (found > 0)).all(dim=1)
    return wanted.argmax(dim=1) == found.argmax(dim=1)


@dataclass
class Comparison:
    """A model and its exports, run on the same batches.

    Attributes:
        kind: what is predicted.
        differences: the difference of each run from the model's.
        scorers: the scores of each run, if there are labels.
        unreadable: why samples could not be read, by their number.
    """

    kind: ProblemType
    differences: dict[str, Difference]
    scorers: dict[str, Scorer]
    unreadable: dict[int, str] = field(default_factory=dict)

    def see(
        self, trained: Trained, numbers: Iterable[int], outputs: Mapping[str, Tensor], labels: list[Any] | None
    ) -> None:
        """Add the logits (B, C) of each run."""
        for name, difference in self.differences.items():
            difference.see(outputs[MODEL], outputs[name], self.kind)
        for name, scorer in self.scorers.items():
            answers = activated(outputs[name].double() / trained.temperature, self.kind).numpy()
            for row, answer in zip(numbers, answers, strict=True):
                scorer.see(Prediction(row, None, answer, labels and labels[row]))

    def scores(self, name: str) -> Scores:
        """The scores of a run; empty without labels."""
        return self.scorers[name].scores() if name in self.scorers else {}


def compare(
    trained: Trained, runs: Mapping[str, Run], batches: Iterable[Batch], labels: list[Any] | None = None
) -> Comparison:
    """Run a model and its exports on the same batches.

    Args:
        runs: the runs by name; the model's is :data:`MODEL`.
        labels: labels of all samples, by their number.

    Raises:
        OptionError: if a run fails but the model does not.
    """
    kind = trained.wanted.problem_type
    scorers = {} if labels is None else {name: Scorer(trained.wanted) for name in runs}
    found = Comparison(kind, {name: Difference() for name in runs if name != MODEL}, scorers)
    for batch in batches:
        found.unreadable |= batch.errors
        for numbers, view in batch.views[0]:
            found.see(trained, numbers, {name: _ran(name, run, view) for name, run in runs.items()}, labels)
    return found


def _ran(name: str, run: Run, view: Mapping[str, Tensor]) -> Tensor:
    try:
        return run(view)
    except Exception as error:
        if name == MODEL:
            raise
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in view.items())
        raise OptionError(
            f"the model was exported, but {name} does not run on {shapes} ({reason(error)}), so nothing is written."
        ) from error
