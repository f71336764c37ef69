"""Checks of measured states: they may come from a damaged file, or have been measured on another model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_ft.errors import OptionError

LARGEST = 1e12  # no sum of squares of such values overflows in float32, and nothing measured is larger


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int] | None = None,
    least: float = float("-inf"),
    most: float = float("inf"),
) -> None:
    """Check that a tensor of a state is finite, of this shape, and within limits.

    Raises:
        OptionError: if not; the message names it.
    """
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise OptionError(f"{name!r} has shape {tuple(tensor.shape)}, but this model needs {tuple(shape)}.")
    values = tensor.detach()
    if not bool(values.isfinite().all()):
        raise OptionError(f"{name!r} contains values that are NaN or infinite.")
    if values.numel() and not least <= float(values.min()) <= float(values.max()) <= most:
        found = f"[{float(values.min()):.3g}, {float(values.max()):.3g}]"
        raise OptionError(f"{name!r} has values in {found}, outside [{least:g}, {most:g}].")
