"""The optimizer's momentum as scheduled by a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from hf_ft.core.plan import Stage

OWN_MOMENTUM = "own_momentum"  # in a parameter group, so that it is saved with the optimizer


def schedules_momentum(stages: Sequence[Stage]) -> bool:
    return any(stage.momentum is not None for stage in stages)


def set_momentum(optimizer: Optimizer, stages: Sequence[Stage], index: int, progress: float) -> None:
    """Set an optimizer's momentum as scheduled by stage ``index``; an optimizer without momentum is left unchanged.

    Args:
        progress: progress within the stage.
    """
    if not schedules_momentum(stages):
        return
    schedule = stages[index].momentum
    for group in optimizer.param_groups:
        own = group.setdefault(OWN_MOMENTUM, _momentum(group))
        if own:  # plain SGD has none
            _set(group, own if schedule is None else schedule(progress))


def _momentum(group: dict[str, Any]) -> float | None:
    betas = group.get("betas")
    return betas[0] if betas else group.get("momentum")


def _set(group: dict[str, Any], value: float) -> None:
    if group.get("betas"):
        group["betas"] = (value, *group["betas"][1:])
    else:
        group["momentum"] = value
