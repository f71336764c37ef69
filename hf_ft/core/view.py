"""The view: all inputs available to a term of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_ft.errors import OptionError
from hf_ft.models.anatomy import parameters_under
from hf_ft.models.border import Border
from hf_ft.models.names import Names
from hf_ft.models.sharding import local, parts


class LayerStates(dict[str, Tensor]):
    """The states of the layers that ran in this step, by name.

    With LayerDrop, a model skips some of its layers at random in each training step.
    """

    def called(self, layers: Names) -> Names:
        """The layers among these that ran, in the same order: at least one, since a term without any is left out."""
        return tuple(layer for layer in layers if layer in self)

    def __missing__(self, layer: str) -> Tensor:
        raise OptionError(
            f"layer {layer!r} did not run in this step: the model skips layers at random in training (LayerDrop), or "
            "the term does not name it in Term.layers. Look only at the layers in view.states.called(layers), or set "
            "the model's layerdrop to 0."
        )


@dataclass(frozen=True)
class StreamView:
    """One batch of a stream.

    Attributes:
        batch: keyword arguments of the model, including labels.
        states: layer states for the terms that use the stream, as in :class:`View`.
        border: where the head begins, as in :class:`View`.
    """

    batch: Mapping[str, Any]
    states: LayerStates
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
        logit_inputs: input of the layer that gives the logits, (B, d), for terms that need ``"logit_inputs"``; if there
            are logits for each token, pooled as these are.
        second_view: the batch, read a second time, without labels, for terms that need ``"second_view"``; the batch
            itself if samples are the same each time they are read, or if they were not read twice.
        states: states of the terms' layers by name, in float32 or wider: feature maps (B, C, H, W) or token states
            (B, T, C), whatever the order of axes in the model; inputs of modules as these take them. Layers that the
            model skipped in this step (LayerDrop) are missing.
        reference: the same states in the initial model, for terms that need ``"reference"``.
        streams: batches of other data by stream name, for terms that name a stream.
        border: what enters the head, for terms with the layer ``SOURCE_LOGITS``.
        token_masks: by layer, (B, T), 0 for padding; without an entry, all positions are valid.
        progress: completed share of the run, in [0, 1).
    """

    def __init__(self, model: nn.Module, anchors: Mapping[str, Tensor]) -> None:
        self.model = model
        self._parts = parts(model)
        self._anchors = anchors
        self._pairs: dict[Names, tuple[list[Tensor], list[Tensor]]] = {}
        self.batch: Mapping[str, Any] = {}
        self.outputs: Any = None
        self.features: Tensor | None = None
        self.logit_inputs: Tensor | None = None
        self.second_view: Mapping[str, Any] = {}
        self.states = LayerStates()
        self.reference: Mapping[str, Tensor] = {}
        self.streams: Mapping[str, StreamView] = {}
        self.border: Border | None = None
        self.token_masks: Mapping[str, Tensor] = {}
        self.progress = 0.0
        self._run: Callable[[nn.Module, Mapping[str, Any]], Tensor | None] | None = None
        self._gather: Callable[[Tensor], Tensor] | None = None

    def logit_inputs_of(self, network: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
        """:attr:`logit_inputs` of a copy of the model, which runs in its current mode, and under autocast if the
        model does."""
        assert self._run is not None
        return self._run(network, batch)

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order; the same number from each, and without gradients."""
        return rows if self._gather is None else self._gather(rows.detach())

    def weights(self, names: Names) -> list[Tensor]:
        """The parameters under these names that train in the current stage.

        In a sharded model, they are the parts that this process holds: see :meth:`summed`.
        """
        weights = self._pair(names)[0]
        return weights if self._parts == 1 else [local(weight) for weight in weights]

    def starts(self, names: Names) -> list[Tensor]:
        """The initial values of :meth:`weights`, in the same order."""
        return self._pair(names)[1]

    def summed(self, value: Tensor) -> Tensor:
        """A sum over elements of :meth:`weights`, over those of all processes if each holds a part of the model.

        The gradient is that of the value, since each process has all that its own part needs. The number returned is
        the value times the number of parts, so that its mean over the processes, which is logged, is the whole sum:
        no communication is needed in a step.
        """
        return value if self._parts == 1 else value + (self._parts - 1) * value.detach()

    def forget(self) -> None:
        """Clear cached parameters: another stage trains others."""
        self._pairs.clear()

    def release(self) -> None:
        """Release the micro-batch and the autograd graph attached to it."""
        self.batch, self.outputs, self.features, self.border = {}, None, None, None
        self.logit_inputs, self.second_view, self._run = None, {}, None
        self.states, self.reference, self.streams, self.token_masks = LayerStates(), {}, {}, {}

    def source_logits(self, head: Callable[[Border], Tensor]) -> Tensor:
        """Logits (B, C_s) of a source head on the target's batch, for terms with the layer ``SOURCE_LOGITS``."""
        return _source_logits(self.border, head)

    def _pair(self, names: Names) -> tuple[list[Tensor], list[Tensor]]:
        if names not in self._pairs:  # once per stage: walking the module tree every step is slow
            pairs = [
                (parameter, self._anchors.get(name))
                for name, parameter in parameters_under(self.model, names)
                if parameter.requires_grad
            ]
            weights: list[Tensor] = [parameter for parameter, _ in pairs]
            starts = [local(start).to(parameter.device) for parameter, start in pairs if start is not None]
            self._pairs[names] = (weights, starts)
        return self._pairs[names]


def _source_logits(border: Border | None, head: Callable[[Border], Tensor]) -> Tensor:
    if border is None:
        raise OptionError("a term requests source logits: its layers must include SOURCE_LOGITS.")
    return head(border)
