"""Inputs and outputs of modules, recorded during a forward pass by temporary hooks.

A *layer* is a module name, for the module's output, or ``input:`` and a module name, for its input.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from hf_ft.errors import OptionError
from hf_ft.models.preserve import evaluating

INPUT = "input:"
NOT_CALLED = "it is not called in the forward pass, as is the case for lists of modules. Name a module inside it."


def tap(model: nn.Module, layer: str, keep: Callable[[Tensor], object]) -> RemovableHandle:
    """Call ``keep`` with the first tensor of a layer whenever it is computed, until the handle is removed."""
    module = model.get_submodule(layer.removeprefix(INPUT))

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        keep(first_tensor((args, kwargs)))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        keep(first_tensor(output))

    if layer.startswith(INPUT):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def first_tensor(value: Any) -> Tensor:
    """The first tensor in nested tuples, lists, dictionaries and model outputs."""
    return next(leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


@functools.cache
def takes_labels(kind: Any) -> bool:
    """Whether the forward of this class accepts labels: some classifiers of Transformers compute no loss."""
    parameters = inspect.signature(kind.forward).parameters.values()
    return any(parameter.name == "labels" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def run(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The outputs of a model for a batch, whose labels are left out if the model does not accept any."""
    kind: Any = type(model)
    without = "labels" in batch and not takes_labels(kind)
    return model(**{name: value for name, value in batch.items() if not (without and name == "labels")})


class _Reached(Exception):
    """Raised once all requested layers are computed, to skip the rest of the forward pass."""


def run_to(
    model: nn.Module, layers: Sequence[str], batch: Mapping[str, Any], *, may_skip: bool = False
) -> dict[str, Tensor]:
    """Compute several layers in one forward pass that stops at the last of them.

    Args:
        may_skip: leave out layers that are not called. In train mode, a model may skip layers at random (LayerDrop).

    Raises:
        OptionError: if one of them is not called, unless ``may_skip``.
    """
    tensors: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[Tensor], None]:
        def keep(state: Tensor) -> None:
            last = len(tensors) == len(layers) - 1
            # Modules still to run may change the tensor in place, e.g. by adding a shortcut.
            tensors[name] = state if last else state.clone()
            if last:
                raise _Reached

        return keep

    handles = [tap(model, name, keeper(name)) for name in layers]
    try:
        with contextlib.suppress(_Reached):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in layers if name not in tensors]
    if silent and not may_skip:
        raise OptionError(f"layer {silent[0]!r} produced no output: {NOT_CALLED}")
    return tensors


class Taps:
    """Record layers while the context is open.

    Args:
        model: model whose modules are tapped.
        layers: layers to record.
        head: names of the head's modules, to record the head's input as well.

    Attributes:
        states: first tensor of each layer, by layer name, as the layer left it: a copy, since what runs next may change
            it in place (a ReLU after a convolution, a shortcut added to the output).
        features: input of the first module inside the head, (B, d).
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] = (), head: Sequence[str] = ()) -> None:
        self.model, self.layers, self.head = model, layers, head
        self.states: dict[str, Tensor] = {}
        self.features: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        for name in self.layers:
            self._handles.append(tap(self.model, name, self._keeper(name)))
        for name in self.head:
            for module in self.model.get_submodule(name).modules():
                # A head of several modules may take whole sequences and select a token itself, so hook its leaves.
                if next(module.children(), None) is None:
                    self._handles.append(module.register_forward_pre_hook(self._keep_features))
        return self

    def detach(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _keeper(self, name: str) -> Callable[[Tensor], None]:
        def keep(state: Tensor) -> None:
            if name in self.states:
                raise OptionError(
                    f"layer {name!r} is called several times in a forward pass (shared weights), so there is no single "
                    "output to compare. Name another layer, or use L2SPConfig, which compares weights."
                )
            self.states[name] = state.clone()

        return keep

    def _keep_features(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Perceiver's queries are made from a number of samples.
        if self.features is None and inputs and isinstance(inputs[0], Tensor):
            single = inputs[0].dim() == 3 and inputs[0].shape[1] == 1  # one vector per sample, (B, 1, d)
            self.features = inputs[0].flatten(1) if inputs[0].dim() == 4 or single else inputs[0]


Batch = Mapping[str, Any]


def activations(model: nn.Module, borders: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """Compute several layers in one forward pass that stops at the last (see :mod:`hf_ft.models.feature_hooks`).

    Returns:
        Activations by layer, (B, ...), in evaluation mode and without gradient.

    Raises:
        OptionError: if one of the modules is not called.
    """
    with evaluating(model), torch.no_grad():
        return run_to(model, borders, batch)


def model_inputs(batch: Any, device: torch.device) -> dict[str, Any]:
    """Turn a batch into keyword arguments on a device, without labels, since no loss is needed.

    Raises:
        OptionError: if the batch is not a mapping.
    """
    if not isinstance(batch, Mapping):
        raise OptionError(
            f"a batch is a {type(batch).__name__}: batches must be dictionaries of the model's keyword arguments, such "
            "as {'pixel_values': ...}."
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
