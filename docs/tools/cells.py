"""One cell of the matrix in docs/models.md: whether a strategy works on a tiny model of one class.

A cell trains for a few steps, and compares: the saved and reloaded model with the trained one; a run that computes the
frozen part once with one that computes it in every step; in some cells, a resumed run with an uninterrupted one;
``full`` with the stock Trainer, bit for bit; a linear probe's frozen features in training with those in eval mode.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from docs.tools.subjects import ROUNDING, TOLERANCE, Subject, arguments, gap_of, losses, told
from hf_ft.core.config import BASELINE, FTConfig, config_class
from hf_ft.core.plan import stage_borders
from hf_ft.errors import Error, OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.testing.training import snapshot
from hf_ft.trainer.trainer import FTTrainer

RESUMED = 8  # one cell in this many
# Searches and measurements of the default length would take most of the time, and show no more.
OPTIONS: dict[str, dict[str, Any]] = {
    "blockwise": {"block": "last_quarter"},
    "amcf": {"frozen": (1,)},
    "tred": {"epochs": 3},
    "delta": {"head_epochs": 1, "batches": 2},
}
MOST_STEPS = 40


class Wrong(Exception):
    """A strategy does not do what it promises on this model."""


def cell(subject: Subject, strategy: str) -> dict[str, Any]:
    """The outcome of a strategy on a model, and the reason if it does not work."""
    row = {"model": subject.name, "strategy": strategy}
    if subject.fault:
        return row | {"outcome": "transformers", "reason": subject.fault}
    seen: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
            Cell(subject, strategy, Path(folder), seen).run()
    except Error as error:
        if seen.get("steps"):
            return row | {"outcome": "wrong", "reason": f"refused after step {seen['steps']}: {told(error)}"}
        return row | {"outcome": "refused", "reason": told(error)}
    except Wrong as error:
        return row | {"outcome": "wrong", "reason": str(error)}
    except Exception as error:  # the report covers all cells
        return row | {"outcome": "wrong", "reason": f"{type(error).__name__}: {told(error)}"}
    return row | {"outcome": "works"} | ({"cached": True} if seen.get("cached") else {})


class Cell:
    """The training runs of one cell, and the comparisons."""

    def __init__(self, subject: Subject, strategy: str, folder: Path, seen: dict[str, Any]) -> None:
        self.subject, self.strategy, self.folder, self.seen = subject, strategy, folder, seen
        self.kind = config_class(strategy)

    def run(self) -> None:
        steps = self._steps()
        if self.strategy == BASELINE:
            self._equals_stock()
        trainer = self._train("trained", steps, use="always", watched=True)
        self._check_losses(trainer)
        if self.strategy == "linear_probe":
            self._check_rest()
        self._check_reload(trainer.model)
        if self.seen.get("cached"):
            self._check_uncached(trainer.model, steps)
        if zlib.crc32(f"{self.subject.name} {self.strategy}".encode()) % RESUMED == 0:
            self._check_resumed(steps)

    def _trainer(self, folder: str, steps: int, use: Any, noise: float = 0.0, **more: Any) -> FTTrainer:
        needs = self.kind().needs()
        model: Any
        if needs.source_head:
            model = self.subject.with_source_head()
        else:
            model = (
                self.subject.members() if needs.several_members and self.strategy == "amcf" else self.subject.model()
            )
        options = {key: more.pop(key) for key in ("batch_norm_momentum",) if key in more}
        perturb(model, noise)
        data = {"source_dataset": self.subject.source_data()} if needs.source_data == "required" else {}
        trainer = FTTrainer(
            model,
            arguments(self.folder / folder, steps, **more),
            strategy=self._config(model, **options),
            frozen_cache=use,
            train_dataset=self.subject.data,
            **data,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _config(self, model: nn.Module, **more: Any) -> FTConfig:
        options = {**OPTIONS.get(self.strategy, {}), **more}
        if "frozen" in options and isinstance(model, CollaborativeModel):
            options["frozen"] = options["frozen"] * len(model.members)
        config = self.kind(**options)
        return config.adapted(model) or config

    def _steps(self) -> int:
        """The smallest number of steps, at least four, in which every stage gets one."""
        plan = self._trainer("plan", MOST_STEPS, "never")._start_run().plan
        for steps in range(4, MOST_STEPS):
            try:
                stage_borders(plan.stages, steps)
            except OptionError:
                continue
            return steps
        return MOST_STEPS

    def _train(self, folder: str, steps: int, use: Any, watched: bool = False, **more: Any) -> FTTrainer:
        trainer = self._trainer(folder, steps, use, **more)
        self.start = snapshot(trainer.model)
        if watched:
            trainer.add_callback(_Watch(trainer, self.seen))
        trainer.train()
        return trainer

    # --- what is compared ----------------------------------------------------------------------------------

    def _equals_stock(self) -> None:
        weights, expected = self.subject.stock
        # A few families have TensorFlow's momentum, which is corrected by default; the stock Trainer keeps it.
        trainer = self._train("full", 4, use="auto", batch_norm_momentum="keep", optim="adamw_torch")
        found = snapshot(trainer.model)
        unequal = [name for name in weights if not torch.equal(weights[name], found[name])]
        if (unequal or losses(trainer) != expected) and self.subject.reproducible:
            raise Wrong(f"differs from the stock Trainer in {len(unequal)} of {len(weights)} tensors")

    def _check_losses(self, trainer: FTTrainer) -> None:
        if not all(map(math.isfinite, losses(trainer))):
            raise Wrong(f"losses are not finite: {losses(trainer)}")
        run, final = trainer._run, snapshot(trainer.model)
        assert run is not None
        if trainer.model is not run.model:
            return
        trained = set(run.trained)
        parameters = dict(trainer.model.named_parameters())
        moved = [n for n in parameters if n in self.start and not torch.equal(self.start[n], final[n])]
        if not moved:
            raise Wrong("trains nothing")
        if strays := [name for name in moved if name not in trained and not run.plan.surgery]:
            raise Wrong(f"{strays[0]} changes, although it is frozen")

    def _check_rest(self) -> None:
        """A linear probe's head receives the same input in training as in eval mode."""
        trainer = self._trainer("rest", 4, "never")
        run = trainer._start_run()
        objective = run.objective()
        run.stepper(objective, 4)(0)
        model, found = run.model, []
        head = {model.get_submodule(name) for name in anatomy(model).head.modules}
        hooks = [module.register_forward_pre_hook(lambda m, given: found.append(given[0].clone())) for module in head]
        batch = dict(self.subject.data.columns)
        objective.train()
        torch.manual_seed(1)
        objective(**batch)
        first = found[0]
        found.clear()
        torch.manual_seed(1)
        model.eval()(**batch)
        for hook in hooks:
            hook.remove()
        if (gap := gap_of(first, found[0])) > TOLERANCE:
            raise Wrong(f"frozen features in training differ from those in eval mode by {gap:.2g}")

    def _check_reload(self, model: Any) -> None:
        try:
            model.save_pretrained(self.folder / "saved")
            loaded = type(model).from_pretrained(self.folder / "saved")
            self._same(loaded, model, "reloaded, weights", tolerance=0.0)
            if (gap := gap_of(self.subject.logits(loaded), self.subject.logits(model))) > TOLERANCE:
                raise Wrong(f"reloaded, logits differ by {gap:.2g}")
        except Exception:
            if not self.subject.reload_fault:  # otherwise the stock Trainer's model does not reload either
                raise

    def _check_uncached(self, model: Any, steps: int) -> None:
        """Weights are the same without a cache, or differ no more than after a start that differs by rounding."""
        plain = self._train("uncached", steps, use="never").model
        gap, worst = largest_gap(plain, model)
        if gap <= TOLERANCE:
            return
        again, _ = largest_gap(plain, self._train("perturbed", steps, use="never", noise=ROUNDING).model)
        if not gap <= 10 * again and self.subject.reproducible:
            raise Wrong(f"without a cache, weights differ by {gap:.2g} ({worst})")

    def _same(self, model: Any, other: Any, what: str, tolerance: float) -> None:
        gap, worst = largest_gap(model, other)
        if not gap <= tolerance:
            raise Wrong(f"{what} differ by {gap:.2g} ({worst})")

    def _check_resumed(self, steps: int) -> None:
        half = steps // 2
        whole = self._train("whole", steps, use="auto", save_strategy="steps", save_steps=half)
        resumed = self._trainer("again", steps, "auto")
        resumed.train(resume_from_checkpoint=str(self.folder / "whole" / f"checkpoint-{half}"))
        if self.subject.reproducible:
            self._same(resumed.model, whole.model, "resumed, weights", tolerance=ROUNDING)


class _Watch(TrainerCallback):
    """Notes how far a training run got, and whether anything frozen was recorded."""

    def __init__(self, trainer: FTTrainer, seen: dict[str, Any]) -> None:
        self.trainer, self.seen = trainer, seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        attempt = self.trainer._attempt
        assert attempt is not None
        rows = attempt.cache.rows
        self.seen["steps"] = state.global_step
        self.seen["cached"] |= attempt.objective.prefix is not None or (rows is not None and rows.beside)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen["cached"] = False


@torch.no_grad()
def perturb(model: nn.Module, noise: float) -> None:
    """Change every weight by a random share of itself."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters() if noise else ():
        parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=random))


def largest_gap(one: nn.Module, other: nn.Module) -> tuple[float, str]:
    """The tensor in which two models differ most, and by how much."""
    ours, theirs = snapshot(one), snapshot(other)
    gaps = {name: gap_of(ours[name], theirs[name]) for name in ours if ours[name].numel()}
    worst = max(gaps, key=lambda name: gaps[name])
    return gaps[worst], worst
