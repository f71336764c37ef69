"""Training steps that can be timed one at a time, alternating with those of another trainer."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback

from hf_ft import FTTrainer
from hf_ft.core.compose import resolve
from hf_ft.testing.training import equipped, tiny_arguments

BATCH, PIXELS, SOURCE_CLASSES = 32, 96, 1000
WIDTHS = [64, 128, 256, 512]
GEOMETRY = "ResNet-18, 96 px, batch 32, SGD with momentum, float32"


def seconds() -> float:
    """The time, after the GPU, if there is one, has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def resnet18() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(hidden_sizes=WIDTHS, depths=[2, 2, 2, 2], layer_type="basic", num_labels=2)
    return ResNetForImageClassification(config)


class Images(torch.utils.data.Dataset):
    """Random images, or other inputs of a model, kept in memory."""

    def __init__(self, images: int, name: str = "pixel_values", shape: tuple[int, ...] | None = None) -> None:
        self.name, generator = name, torch.Generator().manual_seed(0)
        self.values = torch.randn(images, *(shape or (3, PIXELS, PIXELS)), generator=generator)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> dict[str, object]:
        return {self.name: self.values[row], "labels": row % 2}


class OneStep(TrainerCallback):
    """Ends a run after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


class Steps(Protocol):
    """Anything that takes a step and returns how long it took."""

    def step(self) -> float: ...


class Stepper:
    """One trainer, advanced to a point of its run where the body of its training loop can be run by hand.

    It trains on the CPU, or as :func:`hf_ft.testing.conditions.under` sets.

    Args:
        strategy: of an FTTrainer; None for the Trainer of Transformers.
        recorded: whether outputs of frozen parts and reference models are recorded; otherwise, each step computes them.
        batch: samples per batch.
        steps: those of the whole run.
        at: the step to stop at, from 0; by default, the run's end.
        model: instead of a ResNet-18.
        data: the training samples, instead of images.
    """

    def __init__(
        self,
        strategy: Any,
        folder: str,
        recorded: bool = False,
        batch: int | None = None,
        *,
        steps: int = 1,
        at: int | None = None,
        model: nn.Module | None = None,
        data: Images | None = None,
    ) -> None:
        batch = BATCH if batch is None else batch
        model = resnet18() if model is None else model
        model.accepts_loss_kwargs = False  # the fix for transformers#47688 on both sides
        args = tiny_arguments(folder, max_steps=steps, per_device_train_batch_size=batch, optim="sgd",
                              logging_steps=10**6, seed=0)  # fmt: skip
        args.optim_args = "momentum=0.9"
        kind, extra = Trainer, {}
        if strategy is not None:
            equipped(model, strategy, classes=SOURCE_CLASSES)
            kind, extra = FTTrainer, {"strategy": strategy, "frozen_cache": "always" if recorded else "never"}
            if any(config.needs().source_data == "required" for config in resolve(strategy)):
                extra["source_dataset"] = Images(4 * BATCH)
        self.trainer = kind(model, args, train_dataset=Images(batch) if data is None else data,
                            callbacks=[OneStep()], **extra)  # fmt: skip
        self.trainer.train()
        self.trainer.remove_callback(OneStep)
        loader = self.trainer.get_train_dataloader()
        if strategy is not None:
            self.trainer.state.global_step = steps if at is None else at  # which the callbacks of each step read
            self.trainer._attempt.stepper.stage = -1  # to re-enter the stage
            self.trainer._attempt.enter(self.trainer.state.global_step)
            self.trainer.optimizer.state.clear()  # momentum of another stage
        self.batch = next(iter(loader))

    def step(self) -> float:
        """Run the body of the Trainer's loop once, and return the seconds it took."""
        started = seconds()
        self.body()
        return seconds() - started

    def body(self) -> None:
        """Run the body of the Trainer's loop once."""
        t = self.trainer
        t.callback_handler.on_step_begin(t.args, t.state, t.control)
        t.training_step(t.model_wrapped, dict(self.batch))
        t._clip_grad_norm(t.model_wrapped)
        t.optimizer.step()
        t.lr_scheduler.step()
        t.model_wrapped.zero_grad()
        t.callback_handler.on_step_end(t.args, t.state, t.control)


class Linear(nn.Module):
    """A linear layer with its loss, as a model."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def in_turns(steppers: Sequence[Steps], rounds: int) -> np.ndarray:
    """Seconds, (rounds, steppers): each round, every stepper takes a step, in random order; three rounds warm up."""
    for stepper in (*steppers,) * 3:
        stepper.step()
    rng, seconds = random.Random(0), np.empty((rounds, len(steppers)))
    for row in seconds:
        order = list(range(len(steppers)))
        rng.shuffle(order)
        for place in order:
            row[place] = steppers[place].step()
    return seconds


def ratio(over: np.ndarray, under: np.ndarray) -> dict[str, float]:
    """The median over rounds of the ratio over / under, and the bootstrap 95 % interval of that median."""
    ratios = over / under
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


def compare(one: Steps, other: Steps, pairs: int) -> dict[str, float]:
    """The ratio of step times, other / one."""
    base, others = in_turns((one, other), pairs).T
    return {**ratio(others, base), "base_seconds": float(np.median(base))}
