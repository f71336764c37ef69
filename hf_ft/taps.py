"""What modules take in and give out during a forward pass, recorded by hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle


class Taps:
    """Records while it is open.

    Args:
        model: whose modules are tapped.
        layers: names of modules whose outputs are wanted.
        head: names of the head's modules, if what goes into it is wanted.

    Attributes:
        states: the first tensor of each layer's output, by name.
        features: what the first module inside the head takes in, (B, d).
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] = (), head: Sequence[str] = ()) -> None:
        self.model, self.layers, self.head = model, layers, head
        self.states: dict[str, Tensor] = {}
        self.features: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        for name in self.layers:
            self._handles.append(self.model.get_submodule(name).register_forward_hook(self._keeper(name)))
        for name in self.head:
            for module in self.model.get_submodule(name).modules():
                # A head of several modules may take whole sequences and pick a token itself: look inside.
                if next(module.children(), None) is None:
                    self._handles.append(module.register_forward_pre_hook(self._keep_features))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self.states[name] = next(leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))

        return keep

    def _keep_features(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.features is None:
            self.features = inputs[0].flatten(1) if inputs[0].dim() == 4 else inputs[0]
