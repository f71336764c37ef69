"""What a term of the loss may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_ft.models.names import Names, covers


@dataclass(frozen=True)
class StreamView:
    """One batch of a stream.

    Attributes:
        batch: its keyword arguments, labels too.
        states: what the layers of the terms that use it gave, as in :class:`View`.
    """

    batch: Mapping[str, Any]
    states: Mapping[str, Tensor]


class View:
    """What a term of the loss may look at, for one micro-batch.

    Attributes:
        model: the model in training.
        batch: its keyword arguments, for terms that need ``"inputs"``; else empty, since a stage may start
            from recorded activations.
        outputs: what it returned.
        features: what goes into the head, (B, d), for terms that need ``"features"``.
        states: what a term's layers gave, by name, at least in float32: feature maps (B, C, H, W) or token states
            (B, T, C).
        reference: what they give in the model as it was at the start, for terms that need ``"reference"``.
        streams: the batches of other data, by the stream's name, for terms that name one.
        token_mask: (B, T), 0 where a token is padding; None where there is none.
        progress: how much of the run is done, in [0, 1).
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
        self.token_mask: Tensor | None = None
        self.progress = 0.0

    def weights(self, names: Names) -> list[Tensor]:
        """The parameters under these names that train in the present stage."""
        return self._pair(names)[0]

    def starts(self, names: Names) -> list[Tensor]:
        """The starting values of :meth:`weights`, in the same order."""
        return self._pair(names)[1]

    def forget(self) -> None:
        """Look parameters up anew: another stage trains others."""
        self._pairs.clear()

    def release(self) -> None:
        """Let go of the micro-batch, and of the graph that hangs on it."""
        self.batch, self.outputs, self.features, self.token_mask = {}, None, None, None
        self.states, self.reference, self.streams = {}, {}, {}

    def _pair(self, names: Names) -> tuple[list[Tensor], list[Tensor]]:
        if names not in self._pairs:  # once a stage: walking a module tree every step is slow
            chosen = [
                (parameter, self._anchors.get(name))
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and any(covers(prefix, name) for prefix in names)
            ]
            weights: list[Tensor] = [parameter for parameter, _ in chosen]
            starts = [start.to(parameter.device) for parameter, start in chosen if start is not None]
            self._pairs[names] = (weights, starts)
        return self._pairs[names]
