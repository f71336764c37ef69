"""Laws that matter on a GPU, besides those of `hf_ft.testing`; each takes a config, a model factory and a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_ft.core.config import FTConfig
from hf_ft.engine.checkpoint import load_weights
from hf_ft.testing.conditions import conditions
from hf_ft.testing.laws import LAWS, Law, Maker, _fewest_steps
from hf_ft.testing.training import make_trainer, same_tensors, snapshot, still, train

# Recorded with another batch size than that of a step, for which kernels round differently.
CACHE_TOLERANCE = 1e-5
COMPILED = ("full", "l2_sp")
# How far a weight after a step may be from the compiled one's: compilation fuses, and so rounds differently.
COMPILER_TOLERANCE = 1e-4


def frozen_cache_changes_nothing(config: FTConfig, make: Maker, folder: Path) -> None:
    """Recorded outputs of frozen parts and reference models give the same weights as computing them in every step."""
    trained = []
    for use in ("never", "always"):
        trainer = make_trainer(still(make()), config, folder / use, frozen_cache=use, optim="sgd")
        trainer.train()
        trained.append(snapshot(trainer.model))
    same_tensors(*trained, CACHE_TOLERANCE * conditions().slack)


def best_model_is_loaded(config: FTConfig, make: Maker, folder: Path) -> None:
    """With ``load_best_model_at_end``, the trained model has the weights of the best checkpoint, on its device."""
    trainer = make_trainer(make(), config, folder)
    run = trainer._start_run()
    if run.plan.finalise or run.plan.select or run.plan.average:
        return  # the final model is not one of those that were saved
    steps = _fewest_steps(run.plan, 4)
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = train(make(), config, folder, max_steps=steps, learning_rate=0.3, **each, **best)
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_global_step == min(logged, key=lambda step: logged[step]), f"not the best of {logged}"
    after = snapshot(trainer.model)
    load_weights(trainer.model, trainer.state.best_model_checkpoint)
    same_tensors(after, snapshot(trainer.model))


def trained_states_are_finite(config: FTConfig, make: Maker, folder: Path) -> None:
    """Losses and weights stay finite, and training changes something."""
    trainer = make_trainer(make(), config, folder, learning_rate=1e-3)
    trainer.args.max_steps = _fewest_steps(trainer._start_run().plan, 4)
    before = snapshot(trainer.model)
    trainer.train()
    losses = {k: v for entry in trainer.state.log_history for k, v in entry.items() if k.startswith("loss")}
    wrong = [name for name, value in losses.items() if not torch.tensor(value).isfinite()]
    wrong += [name for name, p in trainer.model.named_parameters() if not p.isfinite().all()]
    assert losses and not wrong, f"not finite: {', '.join(wrong[:5])}"
    after = snapshot(trainer.model)
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not same, "nothing was trained"


def everything_is_on_the_device(config: FTConfig, make: Maker, folder: Path) -> None:
    """After a step, model, terms, reference model, anchors, averages and momentum are on the training device."""
    trainer = make_trainer(make(), config, folder, frozen_cache="never", optim="sgd", optim_args="momentum=0.9")
    trainer.args.max_steps = _fewest_steps(trainer._start_run().plan, 2)
    look = Look(trainer)
    trainer.add_callback(look)
    trainer.train()
    found = look.found
    wrong = sorted(name for name, tensor in found.items() if tensor.device.type != trainer.args.device.type)
    assert found, "no step was taken"
    assert not wrong, f"not on {trainer.args.device}: {', '.join(wrong[:5])}"


class Look(TrainerCallback):
    """Keeps all tensors that a step uses."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.found: dict[str, torch.Tensor] = {}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.found.update(_tensors(self.trainer))


def _tensors(trainer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    objective, run = trainer._attempt.objective, trainer._run
    yield from objective.named_parameters()
    yield from objective.named_buffers()
    yield from ((f"anchor of {name}", tensor) for name, tensor in run.anchors.items())
    if run.reference is not None and objective.uses_reference:
        yield from ((f"reference {name}", tensor) for name, tensor in run.reference.model.state_dict().items())
    if run.average is not None:
        yield from ((f"average of {name}", tensor) for name, tensor in run.average._averages.items())
    for number, state in enumerate(trainer.optimizer.state.values()):
        yield from ((f"{key} {number}", value) for key, value in state.items() if key == "momentum_buffer")


def compiling_changes_nothing(config: FTConfig, make: Maker, folder: Path) -> None:
    """With ``torch_compile``, the weights are the same up to rounding."""
    backend = "inductor" if conditions().device.type == "cuda" else "aot_eager"  # which needs no C++ compiler
    trained = []
    for compiled in (False, True):
        arguments = {"torch_compile": True, "torch_compile_backend": backend} if compiled else {}
        trainer = train(still(make()), config, folder / str(compiled), max_steps=3, optim="sgd", **arguments)
        trained.append(snapshot(trainer.model))
    same_tensors(*trained, COMPILER_TOLERANCE * conditions().slack)


FLOAT32_ONLY: dict[str, Law] = {law.__name__: law for law in (everything_is_on_the_device, compiling_changes_nothing)}
ON_GPU: dict[str, Law] = {
    law.__name__: law
    for law in (frozen_cache_changes_nothing, best_model_is_loaded, trained_states_are_finite, *FLOAT32_ONLY.values())
}
# The kit's laws that train with a Trainer, and thus in the precision of its arguments.
IN_ANY_PRECISION = ("accumulation_changes_nothing", "resume_changes_nothing", "plain_reload", "mixed_images_train")


def laws_of(precision: str) -> dict[str, Callable[[FTConfig, Maker, Path], None]]:
    """The laws to check in this precision."""
    if precision == "fp32":
        return {**LAWS, **ON_GPU}
    of_kit = {name: LAWS[name] for name in IN_ANY_PRECISION}
    return of_kit | {name: law for name, law in ON_GPU.items() if name not in FLOAT32_ONLY}
