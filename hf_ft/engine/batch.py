"""Extra batch columns of the engine: recorded activations, reference states, streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# Prefix, followed by the stream's name, of a batch entry that holds the batch of a stream (a dictionary).
STREAM = "stream_"


def take_streams(batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Remove the batches of streams from a batch; return them by stream."""
    names = [name for name in batch if name.startswith(STREAM)]
    return {name.removeprefix(STREAM): batch.pop(name) for name in names}


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
    return [name for name in inputs if not name.startswith((REFERENCE, ACTIVATION))]
