"""A plan's actions at each optimizer step: it changes gradients, and the rates of single tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hf_ft.core.plan import GradientChange, Plan
from hf_ft.data.streams import mixed
from hf_ft.engine.param_groups import FACTOR
from hf_ft.errors import OptionError
from hf_ft.models.names import Names, covers

# An optimizer may outlive several training runs; only the last one changes its steps.
_attached: WeakKeyDictionary[Optimizer, list[RemovableHandle]] = WeakKeyDictionary()


def attach(optimizer: Optimizer, model: nn.Module, plan: Plan, step: Callable[[], int]) -> None:
    """Let a plan change each step of an optimizer.

    Args:
        step: returns the index of the step.
    """
    inner = unwrapped(optimizer)
    for handle in _attached.pop(inner, ()):
        handle.remove()
    for name, on in [(c.name, c.on) for c in plan.gradients] + [(r.name, r.on) for r in (plan.tensor_rates,) if r]:
        _check_names(name, on, model)
    handles = []
    for number, change in enumerate(plan.gradients):
        handles.append(inner.register_step_pre_hook(_gradient_hook(model, change, number, step)))
    if plan.tensor_rates is not None:
        handles.append(inner.register_step_pre_hook(_multiply_rates))
        handles.append(inner.register_step_post_hook(_restore_rates))
    if handles:
        _attached[inner] = handles


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside a wrapper, whose steps call it."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    found: Optimizer = optimizer
    return found


def skipped(optimizer: Optimizer) -> bool:
    """Whether the step of a fused optimizer changes nothing, since a gradient scaler found non-finite gradients.

    The scaler calls a fused optimizer all the same, and signals it by this attribute; it skips the step of any other.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unscale(optimizer: Optimizer) -> None:
    """Divide gradients by the factor of a gradient scaler, if it leaves that to the fused step."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(gradients, scale)
        optimizer.grad_scale = None  # type: ignore[attr-defined]


def check_not_needed(plan: Plan) -> None:
    """Reject a loop that does not pass its optimizer, if the plan changes the optimizer's steps.

    Raises:
        OptionError: naming the changes that it would miss.
    """
    changes = [change.name for change in plan.gradients]
    if plan.tensor_rates is not None:
        changes.append(plan.tensor_rates.name)
    if changes:
        raise OptionError(f"{changes[0]} changes the steps of the optimizer: pass optimizer=... to stepper().")


def step_seed(step: int, number: int) -> int:
    """A seed for one change of the gradients at one step; the same on every process and after a resume."""
    return mixed(torch.initial_seed(), step, number)


def _check_names(name: str, on: Names, model: nn.Module) -> None:
    """Reject names that another strategy's surgery has changed.

    Raises:
        OptionError: naming one.
    """
    present = {"", *(n for n, _ in model.named_parameters()), *(n for n, _ in model.named_modules())}
    missing = [prefix for prefix in on if prefix not in present]
    if missing:
        raise OptionError(
            f"{name} changes the training of {missing[0]!r}, which the model no longer has: another strategy replaced "
            "it, so the two cannot be combined."
        )


def _gradient_hook(
    model: nn.Module, change: GradientChange, number: int, step: Callable[[], int]
) -> Callable[..., None]:
    selected = [(n, p) for n, p in model.named_parameters() if any(covers(prefix, n) for prefix in change.on)]

    def hook(optimizer: Optimizer, *_: Any) -> None:
        if skipped(optimizer):
            return
        unscale(optimizer)
        present = [(name, parameter.grad) for name, parameter in selected if parameter.grad is not None]
        if present:
            names, gradients = zip(*present, strict=True)
            with torch.no_grad():
                change.fn(names, gradients, step_seed(step(), number))

    return hook


def _multiply_rates(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if FACTOR in group:
            group["stage_rate"], group["lr"] = group["lr"], group["lr"] * group[FACTOR]


def _restore_rates(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if FACTOR in group:
            group["lr"] = group.pop("stage_rate")
