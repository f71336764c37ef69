"""The view: all inputs available to a term of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_ft.errors import OptionError
from hf_ft.models.border import Border
from hf_ft.models.names import Names, covers


@dataclass(frozen=True)
class StreamView:
    """One batch of a stream.

    Attributes:
        batch: keyword arguments of the model, including labels.
        states: layer states for the terms that use the stream, as in :class:`View`.
        border: where the head begins, as in :class:`View`.
    """

    batch: Mapping[str, Any]
    states: Mapping[str, Tensor]
    border: Border | None = None

    def source_logits(self, head: Callable[[Border], Tensor]) -> Tensor:
        """As :meth:`View.source_logits`, for the batch of the stream."""
        return _source_logits(self.border, head)


class View:
    """Inputs available to a term of the loss, for one micro-batch.

    Attributes:
        model: the model in training.
        batch: keyword arguments of the model, for terms that need ``"inputs"``; otherwise empty, since a stage may
            start from recorded activations.
        outputs: outputs of the model.
        features: input of the head, (B, d), for terms that need ``"features"``.
        states: states of the terms' layers by name, in float32 or wider: feature maps (B, C, H, W) or token states
            (B, T, C).
        reference: the same states in the initial model, for terms that need ``"reference"``.
        streams: batches of other data by stream name, for terms that name a stream.
        border: what enters the head, for terms with the layer ``SOURCE_LOGITS``.
        token_mask: (B, T), 0 for padding tokens; None if there are none.
        progress: completed share of the run, in [0, 1).
    """

    def __init__(self, model: nn.Module, anchors: Mapping[str, Tensor]) -> None:
        self.model = model
        self._anchors = anchors
        self._pairs: dict[Names, tuple[list[Tensor], list[Tensor]]] = {}
        self.batch: Mapping[str, Any] = {}
        self.outputs: Any = None
        self.features: Tensor | None = None
        self.states: Mapping[str, Tensor] = {}
        self.reference: Mapping[str, Tensor] = {}
        self.streams: Mapping[str, StreamView] = {}
        self.border: Border | None = None
        self.token_mask: Tensor | None = None
        self.progress = 0.0

    def weights(self, names: Names) -> list[Tensor]:
        """The parameters under these names that train in the current stage."""
        return self._pair(names)[0]

    def starts(self, names: Names) -> list[Tensor]:
        """The initial values of :meth:`weights`, in the same order."""
        return self._pair(names)[1]

    def forget(self) -> None:
        """Clear cached parameters: another stage trains others."""
        self._pairs.clear()

    def release(self) -> None:
        """Release the micro-batch and the autograd graph attached to it."""
        self.batch, self.outputs, self.features, self.token_mask = {}, None, None, None
        self.states, self.reference, self.streams, self.border = {}, {}, {}, None

    def source_logits(self, head: Callable[[Border], Tensor]) -> Tensor:
        """Logits (B, C_s) of a source head on the target's batch, for terms with the layer ``SOURCE_LOGITS``."""
        return _source_logits(self.border, head)

    def _pair(self, names: Names) -> tuple[list[Tensor], list[Tensor]]:
        if names not in self._pairs:  # once per stage: walking the module tree every step is slow
            pairs = [
                (parameter, self._anchors.get(name))
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and any(covers(prefix, name) for prefix in names)
            ]
            weights: list[Tensor] = [parameter for parameter, _ in pairs]
            starts = [start.to(parameter.device) for parameter, start in pairs if start is not None]
            self._pairs[names] = (weights, starts)
        return self._pairs[names]


def _source_logits(border: Border | None, head: Callable[[Border], Tensor]) -> Tensor:
    if border is None:
        raise OptionError("a term asks for source logits: its layers must include SOURCE_LOGITS.")
    return head(border)
