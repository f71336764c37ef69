"""Two paths through a classifier: modules that are computed as fine-tuned and as pretrained, and mixed by a gate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache

from hf_ft.errors import OptionError
from hf_ft.models.feature_hooks import first_tensor
from hf_ft.models.names import BESIDE, Names
from hf_ft.models.source_head import drop_source_head

GATE = f"{BESIDE}.gate"  # the name of the gate in its classifier
# Neither labels nor further outputs concern the frozen copy.
_NOT_INPUTS = ("labels", "output_hidden_states", "output_attentions", "return_dict")


class Gate(Protocol):
    """The gate that mixes the two paths; an ``nn.Module`` whose parameters train with the model."""

    units: Names

    def begin(self, pretrained: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Called at the start of each forward pass of the model, with its frozen copy and its inputs."""

    def share(self, unit: str, inputs: Tensor, output: Tensor) -> Tensor:
        """The share of the fine-tuned path in a unit's output: 0 or 1, in a shape that broadcasts to it."""

    def end(self) -> None:
        """Called at the end of each pass."""


class TwoPaths(nn.Module):
    r"""The gate of a classifier and its frozen copy; an attribute of the classifier.

    Each unit :math:`u`, a module of the classifier, then computes

    .. math:: G \tilde F_u(x) + (1 - G) F_u(x)

    with its own weights :math:`\tilde F` and those of the frozen copy :math:`F`. Of several outputs, the first tensor
    is mixed; the others are those of :math:`\tilde F`. The frozen copy is always in evaluation mode.
    """

    def __init__(self, gate: nn.Module, pretrained: nn.Module) -> None:
        super().__init__()
        self.gate: Any = gate  # first: what is before everything that trains is seen in the order of definition
        self.pretrained = pretrained.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TwoPaths:
        super().train(mode)
        self.pretrained.eval()
        return self

    def begin(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """A hook before the model's forward."""
        inputs = {name: value for name, value in kwargs.items() if name not in _NOT_INPUTS}
        self.gate.begin(self.pretrained, args, inputs)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """A hook after the model's forward."""
        self.gate.end()


class _Both:
    """The forward of a unit."""

    def __init__(self, paths: TwoPaths, unit: str, module: nn.Module) -> None:
        self.paths, self.unit = paths, unit
        self.forward, self.frozen = module.forward, paths.pretrained.get_submodule(unit)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_not_kept, args))  # both paths would write to one cache
        kwargs = {name: _not_kept(value) for name, value in kwargs.items()}
        tuned, frozen = self.forward(*args, **kwargs), self.frozen(*args, **kwargs)
        leaves, structure = tree_flatten(tuned)
        place = next(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        share = self.paths.gate.share(self.unit, first_tensor((args, kwargs)), leaves[place])
        leaves[place] = mixed(share, leaves[place], first_tensor(frozen))
        return tree_unflatten(leaves, structure)


def mixed(share: Tensor, tuned: Tensor, frozen: Tensor) -> Tensor:
    """The first where the share is 1, the second where it is 0; the share gets the gradient of the weighted sum."""
    share = share.to(tuned.dtype)
    return share * tuned + (1 - share) * frozen


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of the first, exactly, with the gradient of the second."""
    return hard + (soft - soft.detach())


def per_row(share: Tensor | None, output: Tensor, unit: str) -> Tensor:
    """A share per sample, (B,), in the shape of an output (B, ...).

    Raises:
        OptionError: if there is none, or if the rows of the output are not samples.
    """
    if share is None:
        raise OptionError(f"{unit!r} was called outside of its model, which decides for each sample: call the model.")
    if output.shape[0] != share.shape[0]:  # len() would fix the batch size in an export
        raise OptionError(
            f"{unit!r} returns {len(output)} rows for {len(share)} samples, so no sample can choose its path. Name "
            "other blocks with blocks=..."
        )
    return share.reshape(-1, *(1,) * (output.dim() - 1))


def install(model: nn.Module, gate: nn.Module) -> TwoPaths:
    """Give a classifier a frozen copy of itself, and this gate."""
    pretrained = drop_source_head(copy.deepcopy(model))
    paths = TwoPaths(gate, pretrained)
    model.add_module(BESIDE, paths)
    for unit in cast(Gate, gate).units:
        module = model.get_submodule(unit)
        module.forward = _Both(paths, unit, module)
    model.register_forward_pre_hook(paths.begin, with_kwargs=True)
    model.register_forward_hook(paths.end, always_call=True)
    return paths


def _not_kept(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def wide_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model, or float32 if that is wider."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)
