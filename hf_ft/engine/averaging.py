"""The running average of a model's weights, alongside the weights that are trained."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.core.plan import Average
from hf_ft.engine.step_hooks import skipped
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.models.preserve import forget_evaluation

LIVE, AVERAGE, STEPS = "live/", "average/", "steps"


class RunningAverage:
    """The running average of some tensors of a model, alongside the model itself.

    It is kept in float32 or wider, and updated after each step of the optimizer that it follows.

    Args:
        model: the model in training.
        names: names of parameters or buffers.

    Attributes:
        steps: number of optimizer steps since the average began.
    """

    def __init__(self, model: nn.Module, names: Collection[str], average: Average) -> None:
        self._model, self._names, self._decay = model, frozenset(names), average.decay
        self._live: dict[str, Tensor] = {}  # the model's own
        self._averages: dict[str, Tensor] = {}
        self._displaced: list[Tensor] | None = None  # the live values while averages are in their place
        self._equal: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._wider: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._hook: Any = None
        self.steps = 0

    @property
    def begun(self) -> bool:
        """Whether there is an average: from the first step until the end of the run."""
        return bool(self._averages)

    @torch.no_grad()
    def begin(self) -> None:
        """Restart at the current weights."""
        tensors = itertools.chain(self._model.named_parameters(), self._model.named_buffers())
        self._live = {name: tensor for name, tensor in tensors if name in self._names}
        self.steps, self._displaced = 0, None
        self._averages = {name: tensor.detach().to(_wide(tensor), copy=True) for name, tensor in self._live.items()}
        self._equal, self._wider = ([], []), ([], [])
        for name, tensor in self._live.items():
            averages, live = self._equal if tensor.dtype == _wide(tensor) else self._wider
            averages.append(self._averages[name])
            live.append(tensor)

    def start(self, step: int, optimizer: Any) -> None:
        """Begin, unless this is a later step of a resumed run, and follow an optimizer in place of an earlier one.

        Args:
            optimizer: plain, or wrapped by Accelerate. A step that a gradient scaler skips does not count.

        Raises:
            OptionError: if the optimizer averages the weights itself.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        if callable(getattr(inner, "eval", None)):  # it would put its average in place of ours
            raise OptionError(
                f"optim: {type(inner).__name__} averages the weights itself (schedule-free): choose another, or leave "
                "out the strategy that averages them."
            )
        if step == 0 or not self.begun:
            self.begin()
        if self._hook is not None:
            self._hook.remove()
        self._hook = inner.register_step_post_hook(lambda stepped, *_: None if skipped(stepped) else self.update())

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        share = 1.0 - self._decay(self.steps)
        self.steps += 1
        averages, live = self._equal
        if live:
            torch._foreach_lerp_(averages, live, share)
        averages, live = self._wider
        if live:  # what does not move must not drift by rounding, hence the difference
            torch._foreach_add_(averages, torch._foreach_sub(averages, live), alpha=-share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in place of the weights; on exit, the weights are restored bit for bit."""
        if self._displaced is not None or not self.begun:
            yield
            return
        self._displaced = [tensor.detach().clone() for tensor in self._live.values()]
        self._put(self._averages.values())
        try:
            yield
        finally:
            displaced, self._displaced = self._displaced, None
            self._put(displaced)

    def finish(self) -> None:
        """Leave the average in place of the weights, and end."""
        if self.begun:
            self._put(self._averages.values())
        self.forget()

    def forget(self) -> None:
        """End, and leave the model unchanged."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._live, self._averages = None, {}, {}
        self._equal, self._wider = ([], []), ([], [])

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        torch._foreach_copy_(list(self._live.values()), list(values))
        forget_evaluation(self._model)

    def moved(self, modules: Iterable[nn.Module]) -> bool:
        """Whether the average of anything in these modules differs from its current value."""
        inside = {id(tensor) for module in modules for tensor in itertools.chain(module.parameters(), module.buffers())}
        pairs = ((self._averages[name], live) for name, live in self._live.items() if id(live) in inside)
        return any(not torch.equal(average.to(live.dtype), live) for average, live in pairs)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the averaged model: live values, and averages that are wider than these."""
        live = self._displaced if self._displaced is not None else self._live.values()
        tensors = {f"{LIVE}{name}": value.detach() for name, value in zip(self._live, live, strict=True)}
        wider = {name: value for name, value in self._averages.items() if value.dtype != self._live[name].dtype}
        return {**tensors, **{f"{AVERAGE}{n}": v for n, v in wider.items()}, STEPS: torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`, with the averaged model loaded and the average begun at it.

        Raises:
            CheckpointError: if it belongs to another model.
        """
        own = self.state_dict()
        wrong = sorted(n for n in {*own, *tensors} if n not in own or n not in tensors or not _fits(own[n], tensors[n]))
        if wrong:
            raise CheckpointError(f"the live weights of the checkpoint do not fit the model: {', '.join(wrong[:5])}.")
        for name, average in self._averages.items():
            self._live[name].copy_(tensors[f"{LIVE}{name}"])
            average.copy_(tensors.get(f"{AVERAGE}{name}", average))
        self.steps = int(tensors[STEPS])
        forget_evaluation(self._model)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _fits(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and own.dtype == other.dtype


@contextmanager
def averaged(average: RunningAverage | None) -> Iterator[None]:
    """The model with its running average in place of its weights, if there is one."""
    if average is None:
        yield
    else:
        with average.in_place():
            yield
