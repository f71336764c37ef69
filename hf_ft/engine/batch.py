"""Extra batch columns of the engine: recorded activations, reference states, streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import find_batch_size
from torch import Tensor


def rows_of(batch: Mapping[str, Any]) -> int:
    """The number of samples of a batch; 0 if it holds no tensor."""
    return len(batch["labels"]) if isinstance(batch.get("labels"), Tensor) else find_batch_size(batch) or 0


def own_rows(batch: Mapping[str, Any], accelerator: Accelerator) -> int:
    """The number of samples in a rank's batch that belong to the data; the others are repeats that fill it up."""
    rows = rows_of(batch)
    if not fills_up(accelerator):
        return rows
    return min(rows, max(0, accelerator.gradient_state.remainder - rows * accelerator.process_index))


def fills_up(accelerator: Accelerator) -> bool:
    """Whether some rank's current batch repeats samples to fill it up."""
    state = accelerator.gradient_state
    return bool(state.end_of_dataloader and state.remainder > 0)


def leading(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first samples of a batch."""

    def of_samples(value: Any) -> bool:
        return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)

    return {name: value[:count] if of_samples(value) else value for name, value in batch.items()}


def row_shares(batches: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each micro-batch of an update, its rows over the mean number of rows of all: 1 if all have the same size."""
    rows = [rows_of(batch) for batch in batches]
    return [len(rows) * count / sum(rows) for count in rows] if all(rows) else [1.0] * len(rows)


# Prefix, followed by the stream's name, of a batch entry that holds the batch of a stream (a dictionary).
STREAM = "stream_"


def take_streams(batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Remove the batches of streams from a batch; return them by stream."""
    names = [name for name in batch if name.startswith(STREAM)]
    return {name.removeprefix(STREAM): batch.pop(name) for name in names}


# Prefix, followed by the column's name, of a column of the samples as they were when read a second time.
SECOND_VIEW = "second_view_"


def second_view_columns(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a batch as columns of another batch of the same samples."""
    own = (REFERENCE, ACTIVATION, ROW)
    return {f"{SECOND_VIEW}{n}": value for n, value in batch.items() if n != "labels" and not n.startswith(own)}


def take_second_view(batch: dict[str, Any]) -> dict[str, Any]:
    """Remove the columns of the second view from a batch; return them under the names of the model's inputs."""
    names = [name for name in batch if name.startswith(SECOND_VIEW)]
    return {name.removeprefix(SECOND_VIEW): batch.pop(name) for name in names}


def starts_at_borders(inputs: dict[str, Any]) -> bool:
    """Whether activations replace the inputs."""
    return any(name.startswith(ACTIVATION) for name in inputs)


# Prefix, followed by the border's index, of a column with the activations at a border.
ACTIVATION = "frozen_prefix_activation_"


def as_columns(at_borders: Sequence[Tensor]) -> dict[str, Tensor]:
    """Activations as batch columns."""
    return {f"{ACTIVATION}{place}": activation for place, activation in enumerate(at_borders)}


def take_activations(batch: dict[str, Any]) -> list[Tensor]:
    """Remove the activations from a batch, in border order; empty if it holds the model's own inputs."""
    places = sum(name.startswith(ACTIVATION) for name in batch)
    return [batch.pop(f"{ACTIVATION}{place}") for place in range(places)]


# Prefix, followed by the layer's name, of a column with a layer's recorded reference state.
REFERENCE = "reference_state_"


def recorded_states(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Remove the recorded reference states from a batch; return them by layer."""
    names = [name for name in batch if name.startswith(REFERENCE)]
    return {name.removeprefix(REFERENCE): batch.pop(name) for name in names}


ROW = "frozen_prefix_row_"  # prefix, followed by the store's number, of the column with a stored batch's row indices


def users_columns(inputs: Mapping[str, Any]) -> list[str]:
    """The batch columns that come from the user's data."""
    return [name for name in inputs if not name.startswith((REFERENCE, ACTIVATION, SECOND_VIEW))]
