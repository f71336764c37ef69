"""Columns that the engine adds to a batch: recorded activations, reference states, streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# A batch brings the batch of a stream, itself a dictionary, under this and the stream's name.
STREAM = "stream_"


def take_streams(batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the batches of streams out of a batch, by stream."""
    names = [name for name in batch if name.startswith(STREAM)]
    return {name.removeprefix(STREAM): batch.pop(name) for name in names}


def starts_at_borders(inputs: dict[str, Any]) -> bool:
    """Whether activations stand in for the inputs."""
    return any(name.startswith(ACTIVATION) for name in inputs)


# A batch of a stage that starts at borders holds the activation at each under this and the border's place.
ACTIVATION = "frozen_prefix_activation_"


def as_columns(at_borders: Sequence[Tensor]) -> dict[str, Tensor]:
    """Activations as columns of a batch."""
    return {f"{ACTIVATION}{place}": activation for place, activation in enumerate(at_borders)}


def take_activations(batch: dict[str, Any]) -> list[Tensor]:
    """Take the activations out of a batch, border by border; none where it holds the model's own inputs."""
    places = sum(name.startswith(ACTIVATION) for name in batch)
    return [batch.pop(f"{ACTIVATION}{place}") for place in range(places)]


# A batch that brings a layer's recorded reference state holds it under this and the layer's name.
REFERENCE = "reference_state_"


def recorded_states(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Take the recorded reference states out of a batch, by layer."""
    names = [name for name in batch if name.startswith(REFERENCE)]
    return {name.removeprefix(REFERENCE): batch.pop(name) for name in names}


ROW = "frozen_prefix_row_"  # a batch of a store holds its rows' numbers under this and the store's own number


def users_columns(inputs: Mapping[str, Any]) -> list[str]:
    """The columns of a batch that come from the user's data."""
    return [name for name in inputs if not name.startswith((REFERENCE, ACTIVATION))]
