"""The forward passes of a step: the target batch, and stream batches concatenated to it or run after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.core.plan import Stream
from hf_ft.core.view import LayerStates, StreamView
from hf_ft.errors import OptionError
from hf_ft.functional import wide
from hf_ft.models.border import SOURCE_LOGITS, Border, run_to_head
from hf_ft.models.feature_hooks import INPUT, Taps, run, run_to
from hf_ft.models.head_features import HeadFeatures
from hf_ft.models.layouts import Layouts
from hf_ft.models.names import Names, covered

PADDING = {"attention_mask": 0, "token_type_ids": 0}


@dataclass(frozen=True)
class StreamBatch:
    """A batch of a stream, and the layers to record on it."""

    stream: Stream
    batch: Mapping[str, Any]
    layers: Names


@dataclass(frozen=True)
class Forward:
    """Results of the forward passes of a step.

    Attributes:
        loss: task loss on the target batch; None without labels.
        outputs: outputs of the model.
        states: recorded layers of the target batch; without those that the model skipped (LayerDrop).
        features: input of the head for the target batch, (B, d), if requested.
        logit_inputs: input of the layer that gives the logits, for the target batch, (B, d), if requested.
        border: where the head begins, for the target batch, if ``SOURCE_LOGITS`` or features are requested.
        streams: batches and recorded layers of the streams, by name.
        masks: masks of recorded layers with padding, (B, T), by layer.
    """

    loss: Tensor | None
    outputs: dict[str, Any]
    states: dict[str, Tensor]
    features: Tensor | None
    logit_inputs: Tensor | None
    border: Border | None
    streams: dict[str, StreamView]
    masks: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """Names of a model's head.

    Attributes:
        modules: its modules.
        begins: the modules where it begins, as in :class:`~hf_ft.models.border.Border`.
        logits: its layers that give the logits.
    """

    modules: Names = ()
    begins: Names = ()
    logits: Names = ()


@dataclass(frozen=True)
class Wanted:
    """Which features of the head to record: its input, and that of the layer that gives the logits."""

    features: bool = False
    logit_inputs: bool = False

    @property
    def any(self) -> bool:
        return self.features or self.logit_inputs

    def of(self, recorded: HeadFeatures, border: Border) -> tuple[Tensor | None, Tensor | None]:
        """The features of a pass, None for what is not requested."""
        last = recorded.logit_inputs(border) if self.logit_inputs else None
        return recorded.pooled(border) if self.features else None, last


NO_HEAD, NO_FEATURES = Head(), Wanted()
TaskLossOf = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor | None, dict[str, Any]]]


def forward(
    model: nn.Module,
    task_loss: TaskLossOf,
    batch: Mapping[str, Any],
    *,
    layers: Names = (),
    head: Head = NO_HEAD,
    wants: Wanted = NO_FEATURES,
    streams: Sequence[StreamBatch] = (),
    layouts: Layouts | None = None,
) -> Forward:
    """Run the target batch and the stream batches, jointly or separately as each stream specifies.

    Args:
        task_loss: model and batch -> loss and outputs.
        layers: layers to record on the target batch.
        wants: the inputs of the head and of its last layer, if they are to be recorded.
        layouts: how layers lay out their outputs, for those that do not use (B, T, C) or (B, C, H, W).
    """
    layouts = layouts or Layouts()
    together = [other for other in streams if other.stream.forward == "joint"]
    if together:
        return _joint(model, task_loss, batch, together, streams, layers, head, wants, layouts)
    features = HeadFeatures(model, head.modules, head.logits) if wants.any else None
    border = Border(model, head.begins) if wants.any or SOURCE_LOGITS in layers else None
    recording = border.recording() if border else contextlib.nullcontext()
    with Taps(model, _modules(layers)) as taps, recording, features or contextlib.nullcontext():
        loss, outputs = task_loss(model, batch)
    found = wants.of(features, border) if features and border else (None, None)
    states = layouts.arranged(taps.states)
    others = _separate(model, head, streams, layouts)
    return Forward(loss, outputs, states, *found, border, others, layouts.masks(batch, states))


def logit_inputs_of_copies(head: Head, device: str) -> Callable[[nn.Module, Mapping[str, Any]], Tensor | None]:
    """A function of copies of a model with this head: their logit inputs in a pass, under the current autocast."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def logit_inputs_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
        features, border = HeadFeatures(model, head.modules, head.logits), Border(model, head.begins)
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            with border.recording(), features:
                run(model, inputs_of(batch))
            found = features.logit_inputs(border)
        return None if found is None else wide(found)

    return logit_inputs_of


def _joint(
    model: nn.Module,
    task_loss: TaskLossOf,
    batch: Mapping[str, Any],
    together: Sequence[StreamBatch],
    streams: Sequence[StreamBatch],
    layers: Names,
    head: Head,
    wants: Wanted,
    layouts: Layouts,
) -> Forward:
    """One pass over all samples up to the head; the head then sees only the target's samples."""
    pad_token = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    joint = concatenate(batch, {other.stream.name: other.batch for other in together}, pad_token)
    everything, rows = sum(rows_of(one) for one in (batch, *(other.batch for other in together))), rows_of(batch)
    of_streams = [layer for other in together for layer in _modules(other.layers)]
    _check_before_head(of_streams, head)
    with Taps(model, tuple(dict.fromkeys([*_modules(layers), *of_streams]))) as taps:
        whole = run_to_head(model, head.begins, inputs_of(joint))
        taps.detach()
        recorded = layouts.arranged(taps.states)
        _check_rows(recorded, everything, of_streams)
        border = whole.rows(0, rows, everything)
        features = HeadFeatures(model, head.modules, head.logits) if wants.any else None
        late = [layer for layer in _modules(layers) if layer not in recorded]  # in the head
        with border.replaying(), Taps(model, late) as of_head, features or contextlib.nullcontext():
            loss, outputs = task_loss(model, {**joint, **border.inputs})
    views, start = {}, rows
    for other in together:
        end = start + rows_of(other.batch)
        states = {layer: recorded[layer][start:end] for layer in other.layers if layer in recorded}
        views[other.stream.name] = _view(other, states, whole.rows(start, end, everything))
        start = end
    before = {layer: recorded[layer][:rows] for layer in layers if layer in recorded}
    states = before | layouts.arranged(of_head.states)
    masks = {layer: mask[:rows] for layer, mask in layouts.masks(joint, states).items()}
    found = wants.of(features, border) if features else (None, None)
    return Forward(loss, outputs, states, *found, border, views | _separate(model, head, streams, layouts), masks)


def _separate(model: nn.Module, head: Head, streams: Sequence[StreamBatch], layouts: Layouts) -> dict[str, StreamView]:
    """The streams that run on their own."""
    views = {}
    for other in streams:
        if other.stream.forward != "separate":
            continue
        inputs, modules = inputs_of(other.batch), _modules(other.layers)
        border = None
        if SOURCE_LOGITS in other.layers:
            with Taps(model, modules) as taps:
                border = run_to_head(model, head.begins, inputs)
            states = taps.states
            modules = tuple(layer for layer in modules if layer not in states)  # in the head, or skipped
        else:
            states = {}
        more = run_to(model, modules, inputs, may_skip=True) if modules else {}
        views[other.stream.name] = _view(other, layouts.arranged(states | more), border)
    return views


def _modules(layers: Sequence[str]) -> Names:
    """The layers that are inputs or outputs of modules."""
    return tuple(layer for layer in layers if layer != SOURCE_LOGITS)


def _check_before_head(of_streams: Sequence[str], head: Head) -> None:
    """Reject layers of the head, which only sees the target's samples."""
    for layer in of_streams:
        if not layer.startswith(INPUT) and covered(layer, set(head.begins)):
            raise OptionError(
                f"layer {layer!r} is in the head, which only sees the target's samples. Set "
                "source_forward='separate', or name another layer."
            )


def _check_rows(states: Mapping[str, Tensor], rows: int, of_streams: Sequence[str]) -> None:
    """Reject a layer whose rows do not correspond to samples, such as one of image windows."""
    for layer, state in states.items():
        if len(state) != rows and (layer in of_streams or len(state) > rows):
            raise OptionError(
                f"layer {layer!r} outputs {len(state)} rows, but the batches of the target and the stream have {rows}, "
                "so it cannot be split. Set source_forward='separate', or name another layer."
            )


def _view(other: StreamBatch, states: Mapping[str, Tensor], border: Border | None = None) -> StreamView:
    return StreamView(other.batch, LayerStates({layer: wide(state) for layer, state in states.items()}), border)


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def rows_of(batch: Mapping[str, Any]) -> int:
    """The number of samples in a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())


def check_columns(target: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> None:
    """Reject streams whose columns differ from the target's.

    Raises:
        OptionError: if they differ; the message names stream, column and fix.
    """
    for stream, batch in others.items():
        names = [{n for n, value in inputs_of(one).items() if isinstance(value, Tensor)} for one in (target, batch)]
        for only, has, lacks in ((0, "train", stream), (1, stream, "train")):
            if names[only] - names[1 - only]:
                raise OptionError(
                    f"{has}_dataset has a column {min(names[only] - names[1 - only])!r}, but {lacks}_dataset does not: "
                    "preprocess both with the same processor or tokenizer."
                )


def concatenate(
    target: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]], pad_token: int = 0
) -> dict[str, Any]:
    """Concatenate the batches of streams to the target batch; labels are the target's only.

    Token sequences are padded to the longest.

    Args:
        target: keyword arguments of the model; entries without a sample dimension are kept.
        others: batches by stream name.
        pad_token: padding value of ``input_ids``.

    Raises:
        OptionError: if a column is missing or differs in shape; the message names the stream and the fix.
    """
    check_columns(target, others)
    rows, result = rows_of(target), dict(target)
    for name, column in inputs_of(target).items():
        if not isinstance(column, Tensor) or not column.dim() or len(column) != rows:
            continue
        columns = [column]
        columns += [batch[name].to(column.device) for batch in others.values()]
        padding = pad_token if name == "input_ids" else PADDING.get(name)
        if padding is not None and column.dim() == 2:
            width = max(c.shape[1] for c in columns)
            if "attention_mask" not in target and any(c.shape[1] != width for c in columns):
                raise OptionError(
                    "sequences of the target and of a stream differ in length, and there is no 'attention_mask' to "
                    "mark padding: let the tokenizer return one, or set source_forward='separate'."
                )
            columns = [nn.functional.pad(c, (0, width - c.shape[1]), value=padding) for c in columns]
        for stream, other in zip(others, columns[1:], strict=True):
            if other.shape[1:] != columns[0].shape[1:]:
                raise OptionError(
                    f"{stream}_dataset yields {name!r} of shape {tuple(other.shape[1:])}, but train_dataset yields "
                    f"{tuple(column.shape[1:])}: preprocess both to one size, or set {stream}_forward='separate'."
                )
        result[name] = torch.cat([other.to(column.dtype) for other in columns])
    return result
