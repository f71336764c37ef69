"""The forward passes of a step: the target batch, and stream batches concatenated to it or run after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_ft.core.plan import Stream
from hf_ft.core.view import LayerStates, StreamView
from hf_ft.errors import OptionError
from hf_ft.functional import wide
from hf_ft.models.feature_hooks import Taps, run_to
from hf_ft.models.layouts import Layouts
from hf_ft.models.names import Names

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
        features: input of the head for the target batch, if requested.
        streams: batches and recorded layers of the streams, by name.
        masks: of recorded layers with padding, (B, T), by layer.
    """

    loss: Tensor | None
    outputs: dict[str, Any]
    states: dict[str, Tensor]
    features: Tensor | None
    streams: dict[str, StreamView]
    masks: dict[str, Tensor] = field(default_factory=dict)


def forward(
    model: nn.Module,
    task_loss: Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor | None, dict[str, Any]]],
    batch: Mapping[str, Any],
    *,
    layers: Names = (),
    head: Names = (),
    wants_features: bool = False,
    streams: Sequence[StreamBatch] = (),
    layouts: Layouts | None = None,
) -> Forward:
    """Run the target batch and the stream batches, jointly or separately as each stream specifies.

    Args:
        task_loss: model and batch -> loss and outputs.
        layers: layers to record on the target batch.
        head: names of the head's modules.
        wants_features: whether to record the head's input.
        layouts: how layers lay out their outputs, for those that do not as (B, T, C) or (B, C, H, W).
    """
    together = [other for other in streams if other.stream.forward == "joint"]
    rows, joint_batch = None, batch
    if together:
        pad_token = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        joint_batch = concatenate(batch, {other.stream.name: other.batch for other in together}, pad_token)
        rows = rows_of(batch)
    tap_layers = tuple(dict.fromkeys([*layers, *(layer for other in together for layer in other.layers)]))
    # Taps are registered first, so that they see all rows where the head receives fewer.
    with Taps(model, tap_layers, head if wants_features else ()) as taps, head_sees(model, head, rows):
        loss, outputs = task_loss(model, joint_batch)
    layouts = layouts or Layouts()
    recorded = layouts.arranged(taps.states)
    if together:
        everything = sum(rows_of(one) for one in (batch, *(other.batch for other in together)))
        _check_rows(recorded, everything, [layer for other in together for layer in other.layers])
    views, start = {}, rows or 0
    for other in together:
        end = start + rows_of(other.batch)
        called = [layer for layer in other.layers if layer in recorded]
        views[other.stream.name] = _view(other, {layer: recorded[layer][start:end] for layer in called})
        start = end
    for other in streams:
        if other.stream.forward == "separate":
            states = run_to(model, other.layers, inputs_of(other.batch), may_skip=True)
            views[other.stream.name] = _view(other, layouts.arranged(states))
    states = {layer: recorded[layer][:rows] for layer in layers if layer in recorded}
    masks = {layer: mask[:rows] for layer, mask in layouts.masks(joint_batch, states).items()}
    return Forward(loss, outputs, states, None if taps.features is None else taps.features[:rows], views, masks)


def _check_rows(states: Mapping[str, Tensor], rows: int, of_streams: Sequence[str]) -> None:
    """Reject a layer whose rows do not correspond to samples, such as one after the head or one of image windows."""
    for layer, state in states.items():
        if len(state) != rows and (layer in of_streams or len(state) > rows):
            raise OptionError(
                f"layer {layer!r} outputs {len(state)} rows, but the batches of the target and the stream have {rows}, "
                "so it cannot be split. Set source_forward='separate', or name another layer."
            )


def _view(other: StreamBatch, states: Mapping[str, Tensor]) -> StreamView:
    return StreamView(other.batch, LayerStates({layer: wide(state) for layer, state in states.items()}))


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


@contextlib.contextmanager
def head_sees(model: nn.Module, head: Sequence[str], rows: int | None) -> Iterator[None]:
    """Within this context, the head receives only the first rows of its input; all rows for None.

    Args:
        head: names of its modules. Modules without parameters (a dropout before the last layer) receive all rows.
    """
    if rows is None:
        yield
        return

    def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if isinstance(module, nn.Linear) and args and args[0].dim() > 2:
            raise OptionError(
                "this model picks a token after its head, so its head cannot be given a part of the batch: set "
                "source_forward='separate'. Strategies that keep the source head cannot be used with it at all."
            )
        return tuple(map(first, args)), {name: first(value) for name, value in kwargs.items()}

    def first(value: Any) -> Any:
        return value[:rows] if isinstance(value, Tensor) and value.dim() else value

    modules = [model.get_submodule(name) for name in head]
    layers = [module for module in modules if next(module.parameters(), None) is not None]
    handles = [module.register_forward_pre_hook(cut, with_kwargs=True) for module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
