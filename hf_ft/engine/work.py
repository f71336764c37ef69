"""Work: counted floating-point operations, and those of a training run, estimated from one batch of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hf_ft.core.context import Recipe
from hf_ft.engine.run import Run
from hf_ft.engine.short_training import Batches
from hf_ft.models.preserve import random_states_kept


class Work(TorchDispatchMode):
    """Context manager that counts the floating-point operations of matrix products and convolutions.

    Unlike seconds, they are the same on every machine, whatever else it does. The formulas are those of
    ``torch.utils.flop_counter``, whose own counter also attributes them to modules, at more than twice the overhead.

    Attributes:
        total: all operations so far.
        measured: operations of the strategies' measurements, before training.
        trained: operations of training, without evaluations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.measured = self.trained = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


def training_work(run: Run, recipe: Recipe, batches: Batches, rows: Sequence[int]) -> float:
    """The work of a training step per sample, as the mean over the run: one step of these rows in each stage.

    Frozen prefixes whose activations ``batches`` holds are left out. Changes the run's model, as training does.
    """
    objective, mean = run.objective(recipe.task_loss), 0.0
    with random_states_kept(0):
        for stage in run.plan.stages:
            objective.enter(stage)
            batches.follow(objective)
            objective.train()
            batch = batches.take(rows)
            with Work() as work:
                with recipe.computing():
                    loss = objective(**batch)["loss"]
                loss.backward()
            mean += stage.duration * work.total / len(rows)
            objective.zero_grad()
    run.unfreeze()
    return mean
