"""A gate per sample and filter: a recurrent network over the layers decides which channels are the fine-tuned ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from hf_ft.errors import OptionError
from hf_ft.functional import wide
from hf_ft.models.gated.paths import straight_through
from hf_ft.models.gated.survey import SAMPLES, Seen, survey
from hf_ft.models.names import Names

Unit = tuple[str, int, int, bool]  # its name, its numbers of input and output channels, and whether it convolves


@dataclass(frozen=True)
class PerFilter:
    """Settings of the gate; :meth:`fitted` completes them for a model.

    Attributes:
        blocks: names of the modules of each block; layers in them are gated.
        width: number of units of the recurrent network.
        layers: the gated layers.
        norms: BatchNorm layers outside these, which are decided by the gate of the layer before them.
    """

    blocks: tuple[Names, ...]
    width: int
    layers: tuple[Unit, ...] = ()
    norms: Names = ()

    def fitted(self, model: nn.Module) -> PerFilter:
        """The settings with the layers.

        A layer is the largest module with a single weight, such as a convolution and its norm, that returns a row for
        each sample.

        Raises:
            OptionError: if there are none.
        """
        modules = dict(model.named_modules())
        tops = [name for block in self.blocks for name in block if name in modules]
        inner = (name for top in tops for name, _ in modules[top].named_modules(prefix=top))
        names = [name for name in dict.fromkeys(inner) if name in modules]  # a module may have several names
        seen, _ = survey(model, names, lambda batch: model(**batch))
        layers = tuple(unit for top in tops for unit in _layers(top, modules, seen))
        if not layers:
            raise OptionError(
                f"the blocks of {type(model).__name__} ({', '.join(tops)}) have no convolution or linear layer that "
                "gives a row for each sample, so there are no filters to choose. Name other blocks with blocks=..."
            )
        inside = [f"{name}." for name, *_ in layers]
        norms = [n for n in names if isinstance(modules[n], _BatchNorm) and not n.startswith(tuple(inside))]
        return dataclasses.replace(self, layers=layers, norms=tuple(norm for norm in norms if seen[norm].has_rows))


def _layers(name: str, modules: Mapping[str, nn.Module], seen: Mapping[str, Seen]) -> Iterator[Unit]:
    """The gated layers in a module."""
    module, one = modules[name], seen[name]
    found = [(n, m) for n, m in module.named_modules(prefix=name) if isinstance(m, (_ConvNd, nn.Linear, Conv1D))]
    if len(found) == 1 and one.has_rows and one.inputs[:1] == (SAMPLES,) and not one.changes:
        weight = found[0][1]
        convolves, filters, own = isinstance(weight, _ConvNd), _filters(weight), seen[found[0][0]]
        axis = 1 if convolves else -1
        # The axes of the module must be those of its weight: some rearrange feature maps to tokens.
        same = len(own.inputs) == len(one.inputs) > 1 and len(own.output) == len(one.output)
        if same and one.output[axis] == filters:
            yield name, one.inputs[axis], filters, convolves
            return
    for child in module._modules:
        if f"{name}.{child}" in modules and found:
            yield from _layers(f"{name}.{child}", modules, seen)


def _filters(weight: nn.Module) -> int:
    return int(next(getattr(weight, n) for n in ("out_channels", "out_features", "nf") if hasattr(weight, n)))


def pooled_channels(values: Tensor, convolves: bool, mask: Tensor | None = None) -> Tensor:
    """The mean of each channel over positions, (B, C).

    Args:
        values: feature maps (B, C, ...), or states (B, ..., C) of a layer that does not convolve.
        mask: (B, T), 0 for padding; used for states (B, T, C).
    """
    values = wide(values)
    if convolves:
        return values.flatten(2).mean(dim=2) if values.dim() > 2 else values
    if mask is not None and values.dim() == 3 and mask.shape == values.shape[:2]:
        weight = mask.to(values.dtype)[..., None]
        return (values * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    return values.flatten(1, -2).mean(dim=1) if values.dim() > 2 else values


class PerFilterGate(nn.Module):
    r"""Decides for each sample and filter of a layer, from what enters it and from the layers before.

    .. math::
        (h_l, c_l) = \mathrm{LSTM}(E_l \, \bar x_{l-1}, \; h_{l-1}, c_{l-1}), \qquad
        G_l = \mathbb 1[\sigma(O_l h_l) > \tfrac12]

    with the mean :math:`\bar x` over positions. The gradient of :math:`G` is that of the sigmoid.
    """

    _mask: Tensor | None
    _state: tuple[Tensor, Tensor] | None
    _last: Tensor | None

    def __init__(self, settings: PerFilter, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.settings = settings
        self.units: Names = (*(name for name, *_ in settings.layers), *settings.norms)
        self._place = {name: place for place, (name, *_) in enumerate(settings.layers)}
        self.enter = nn.ModuleList(nn.Linear(n, settings.width) for _, n, _, _ in settings.layers).to(dtype)
        self.cell = nn.LSTMCell(settings.width, settings.width).to(dtype)
        self.leave = nn.ModuleList(nn.Linear(settings.width, n) for _, _, n, _ in settings.layers).to(dtype)
        self.end()

    def begin(self, pretrained: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        self._running, self._mask = True, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def end(self) -> None:
        self._running = False
        self._mask = self._state = self._last = None

    def share(self, unit: str, inputs: Tensor, output: Tensor) -> Tensor:
        if not self._running:
            raise OptionError(
                f"{unit!r} was called outside of its model, which decides for each sample: call the model."
            )
        if unit not in self._place:
            return self._as_before(output)
        place = self._place[unit]
        convolves = self.settings.layers[place][3]
        with torch.autocast(output.device.type, enabled=False):
            pooled = pooled_channels(inputs, convolves, self._mask).to(self.cell.weight_ih.dtype)
            if self._state is not None and self._state[0].shape[0] != pooled.shape[0]:
                raise OptionError(
                    f"{unit!r} gets {len(pooled)} rows for {len(self._state[0])} samples, so no sample can choose its "
                    "filters. Name other blocks with blocks=..."
                )
            self._state = self.cell(self.enter[place](pooled), self._state)
            soft = self.leave[place](self._state[0]).sigmoid()
            self._last = straight_through((soft > 0.5).to(soft.dtype), soft)
        return _along(self._last, output, 1 if convolves else -1)

    def _as_before(self, output: Tensor) -> Tensor:
        """The share of a norm: that of the layer before; all fine-tuned if that layer has other channels."""
        if self._last is None or self._last.shape != output.shape[:2]:
            return output.new_ones(())
        return _along(self._last, output, 1)


def _along(share: Tensor, output: Tensor, axis: int) -> Tensor:
    """A share per sample and channel, (B, C), in a shape that broadcasts to the output."""
    ones: Sequence[int] = (1,) * (output.dim() - 2)
    rows = share.shape[0]  # not len(), which would fix the batch size in an export
    return share.reshape(rows, -1, *ones) if axis == 1 else share.reshape(rows, *ones, -1)
