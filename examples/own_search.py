"""Your own strategy with its own search, whose findings are shown like those of the built-in strategies.

It trains copies of the model briefly, each with a different backbone learning rate, and continues with the best.

    python examples/own_search.py train --strategy backbone_rate --model microsoft/resnet-18 --dataset photos/
    python examples/own_search.py compare --strategies backbone_rate --model microsoft/resnet-18 --dataset photos/

`hf-ft train` prints its table; the model card and the comparison's report also show it, each with a plot.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hf_ft.cli import main
from hf_ft.core import Context, FTConfig, Plan, Rate, Stage, State, option, register
from hf_ft.core.findings import Figure, Findings, Table, Text
from hf_ft.documents.chart import Row, Rows, linear_axis
from hf_ft.documents.figure import new_figure
from hf_ft.engine.set_up import start
from hf_ft.search.evaluate import ShortTrainings

Score = dict[str, Any]


@register("backbone_rate")
@dataclass(frozen=True, kw_only=True)
class BackboneRateConfig(FTConfig):
    """Search for the backbone's learning rate, as a factor of the head's."""

    factors: tuple[float, ...] = option((0.01, 0.1, 1.0), "Factors to try.")
    search_epochs: int = option(1, "Epochs of each trial.", range="[1, inf)")

    def measure(self, model: nn.Module, context: Context) -> State:
        trainings = ShortTrainings(model, context, "accuracy", validation=0.25, epochs=self.search_epochs)
        scores: list[Score] = []
        for factor in self.factors:
            tried = copy.deepcopy(model)
            run = start((self,), tried, self._plan(tried, factor), {})
            scores.append({"factor": factor, "accuracy": max(trainings.train(run, seed=0))})
        return State(info={"scores": scores, "best": max(scores, key=lambda score: score["accuracy"])["factor"]})

    def plan(self, model: nn.Module, state: State) -> Plan:
        return self._plan(model, state.info["best"])

    def _plan(self, model: nn.Module, factor: float) -> Plan:
        rates = (Rate(("",), scale=factor), Rate(self.anatomy(model).head.modules))
        return Plan(stages=(Stage("backbone_rate", rates=rates),))

    def findings(self, state: State) -> Findings:
        """Describe the search for report, card and terminal; without a measurement, nothing."""
        if "scores" not in state.info:
            return Findings()
        scores: Sequence[Score] = state.info["scores"]
        cells = tuple((f"{score['factor']:g}", f"{score['accuracy']:.3f}") for score in scores)
        table = Table("accuracy on held-out training samples", ("backbone's rate", "accuracy"), cells)
        summary = f"The backbone trains with {state.info['best']:g} times the head's learning rate."
        return Findings(
            summary,
            blocks=(Figure("Accuracy by the backbone's rate.", (chart(scores, summary),), table),),
            short=(table, Text(summary)),
            files={"backbone_rate.json": list(scores)},
            plots={"backbone_rate.png": partial(draw, scores)},
        )


def chart(scores: Sequence[Score], about: str) -> Rows:
    """Build the report's bar chart, which is styled by the page."""
    rows = tuple(Row(f"{s['factor']:g}", s["accuracy"], f"{s['accuracy']:.3f}") for s in scores)
    axis = linear_axis([s["accuracy"] for s in scores], "accuracy", include=[0.0])
    return Rows("Accuracy by rate", about, rows, axis, bars=True)


def draw(scores: Sequence[Score], file: Path) -> None:
    """Draw the plot for the model card, saved next to it."""
    figure = new_figure("own_search", 5, 3)
    axes = figure.subplots()
    axes.bar([f"{score['factor']:g}" for score in scores], [score["accuracy"] for score in scores])
    axes.set(xlabel="backbone's learning rate, as a factor of the head's", ylabel="accuracy")
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())  # the command hf-ft with one more strategy
