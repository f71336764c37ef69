"""The features of a classifier: one vector per sample that enters its head, as a matrix (B, d)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_ft.models.border import Border
from hf_ft.models.feature_hooks import Taps, first_tensor


class HeadFeatures:
    """Records a head's features while the context is open.

    They are the input of the first layer in the head. If that is not one vector per sample, they are the input of the
    layer that gives the logits; and if this gives logits for each token, of which the model then picks one or takes
    the mean, they are the inputs picked or averaged in the same way.

    Args:
        head: names of the head's modules.
        logits: names of the layers that give the logits (:func:`hf_ft.models.head_layers.logit_layers`).
    """

    def __init__(self, model: nn.Module, head: Sequence[str], logits: Sequence[str]) -> None:
        self.model, self.logits = model, logits
        self._first = Taps(model, head=head)
        self._into: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> HeadFeatures:
        self._first.__enter__()
        for name in self.logits:
            hook = self.model.get_submodule(name).register_forward_pre_hook(self._keeper(name), with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, *error: object) -> None:
        self._first.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._into.setdefault(name, first_tensor((args, kwargs)))

        return keep

    def pooled(self, border: Border) -> Tensor | None:
        """The features of the pass, (B, d) if they can be determined; otherwise the input of the head as it is.

        Args:
            border: where the head begins, in the same pass.
        """
        first, into = self._first.features, self._into
        if first is None or first.dim() == 2 or set(into) != set(self.logits) or not into:
            return first
        return self._pooled(border)

    def logit_inputs(self, border: Border) -> Tensor | None:
        """The input of the layer that gives the logits, (B, d); for logits per token, pooled as these are.

        None if no such layer was called.
        """
        return self._pooled(border) if self._into else None

    def _pooled(self, border: Border) -> Tensor:
        if all(state.dim() == 2 for state in self._into.values()):
            return next(iter(self._into.values()))
        return border.pooled(self._into)
