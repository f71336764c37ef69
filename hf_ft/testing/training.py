"""Small training runs for tests: a tiny model, a few random samples, a few steps, by default on the CPU."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_ft.core.compose import resolve
from hf_ft.engine.batch import STREAM
from hf_ft.engine.objective import Objective
from hf_ft.models.anatomy import unwrap
from hf_ft.models.norms import batch_norms
from hf_ft.models.preserve import random_states_kept
from hf_ft.models.source_head import SourceHead, attach_source_head, has_source_head, head_modules, renew_head
from hf_ft.testing.conditions import conditions
from hf_ft.testing.models import tiny_inputs
from hf_ft.trainer.trainer import FTTrainer


def tiny_data(model: nn.Module, samples: int = 32, seed: int = 0) -> datasets.Dataset:
    """Random inputs and labels for a model."""
    rows = {name: value.numpy() for name, value in tiny_inputs(model, samples, seed).items()}
    columns = tuple((name, str(values.dtype), values.shape, values.tobytes()) for name, values in rows.items())
    return _built(columns).with_format("torch")  # a copy, whose format may be set


@functools.lru_cache(maxsize=64)
def _built(columns: tuple[tuple[str, str, tuple[int, ...], bytes], ...]) -> datasets.Dataset:
    """Tests request the same few again and again, and building one takes longer than a training step on it."""
    rows = {name: np.frombuffer(values, dtype).reshape(shape) for name, dtype, shape, values in columns}
    features = datasets.Features({name: _feature(values) for name, values in rows.items()})
    return datasets.Dataset.from_dict(rows, features=features)


def _feature(values: np.ndarray) -> Any:
    value = datasets.Value(str(values.dtype))
    if values.ndim == 4:  # six times faster to read than the inferred nested lists
        return datasets.Array3D(values.shape[1:], value.dtype)
    return datasets.List(value) if values.ndim == 2 else value


def tiny_arguments(folder: str | Path, **arguments: Any) -> TrainingArguments:
    """Training arguments for eight quiet steps under the current conditions; any of them can be overridden."""
    defaults: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **conditions().arguments, **arguments})


def make_trainer(
    model: nn.Module,
    strategy: Any,
    folder: str | Path,
    frozen_cache: Any = "auto",
    mixup: float = 0.0,
    cutmix: float = 0.0,
    groups: Any = None,
    **arguments: Any,
) -> FTTrainer:
    """A trainer on tiny data, not trained yet."""
    ours = {"frozen_cache": frozen_cache, "mixup": mixup, "cutmix": cutmix, "groups": groups}
    data = {"train_dataset": tiny_data(model), "eval_dataset": tiny_data(model, 16, seed=1)}
    equipped(model, strategy)
    if any(config.needs().source_data == "required" for config in resolve(strategy)):
        data["source_dataset"] = tiny_data(model, 20, seed=2)
    args = tiny_arguments(folder, **arguments)
    trainer = FTTrainer(model, args, strategy=strategy, **ours, **data)
    conditions().prepare(trainer)
    return trainer


def equipped(model: Any, strategy: Any, classes: int = 5, seed: int = 9) -> Any:
    """The model, with a pretrained head for this number of classes if the strategy needs one and it has none."""
    if any(config.needs().source_head for config in resolve(strategy)) and not has_source_head(model):
        with random_states_kept(seed):
            base = unwrap(model)[0]
            other = type(base)(copy.deepcopy(base.config))
            renew_head(other, {"num_labels": classes})
        attach_source_head(model, SourceHead({name: other.get_submodule(name) for name in head_modules(other)}))
    return model


def tiny_batch(objective: Objective, samples: int = 8, seed: int = 0) -> dict[str, Any]:
    """Inputs for an objective on its device, including a batch of each stream that it currently needs."""
    streams = {f"{STREAM}{name}": tiny_inputs(objective.model, samples, seed + 100) for name in objective.live_streams}
    device = next(objective.model.parameters()).device
    return dict(send_to_device({**tiny_inputs(objective.model, samples, seed), **streams}, device))


def train(model: nn.Module, strategy: Any, folder: str | Path, resume: Any = None, **arguments: Any) -> FTTrainer:
    """Train a tiny model with a strategy; return the trainer."""
    trainer = make_trainer(model, strategy, folder, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def still(model: nn.Module) -> nn.Module:
    """Make samples independent of each other: BatchNorm permanently in eval mode, and no dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for _, norm in batch_norms(model):
        norm.eval()
        norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign,misc]
        # A stage may set the flag itself. A method, which a deep copy binds to the copy.
        norm.forward = types.MethodType(_by_running_statistics, norm)  # type: ignore[method-assign]
    return model


def _by_running_statistics(norm: Any, values: Tensor) -> Tensor:
    return nn.functional.batch_norm(values, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    """Assert that two state dicts are equal, bit for bit unless a tolerance is given.

    Raises:
        AssertionError: if they differ; the message names the tensor that differs most.
    """
    assert set(one) == set(other), f"different names: {sorted(set(one) ^ set(other))[:5]}"
    gaps = {name: float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel()}
    if not gaps:
        return
    worst = max(gaps, key=lambda name: gaps[name])
    assert gaps[worst] <= tolerance, f"{worst} differs by {gaps[worst]:.3g} (allowed: {tolerance:g})"
    if tolerance == 0.0:
        unequal = [name for name in one if not torch.equal(one[name], other[name])]
        assert not unequal, f"{unequal[0]} is not bitwise equal"
