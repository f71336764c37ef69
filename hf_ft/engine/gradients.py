"""Gradients of the mean task loss over chosen training samples, in batches as large as an update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_ft.core.context import Recipe, Samples
from hf_ft.errors import OptionError
from hf_ft.models.norms import batch_norms
from hf_ft.models.preserve import buffers_kept, random_states_kept

SMALLER = 16.0  # factor by which loss scales fall if float16 overflows


@contextmanager
def looking(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Context for some batches in train mode: on exit, buffers and random states are restored, gradients dropped."""
    with random_states_kept(None if seed is None else seed % 2**32), buffers_kept(model):
        try:
            yield
        finally:
            for parameter in model.parameters():
                parameter.grad = None


def update_batches(samples: Samples, recipe: Recipe, ranks: int, generator: torch.Generator) -> list[list[int]]:
    """Rows of shuffled batches, each as large as an update on all processes, and so the same for any number of them.

    Raises:
        OptionError: if the data set cannot be indexed.
    """
    if not samples.count:
        raise OptionError(
            "gradients are measured on training samples that are read by index: train_dataset must be map-style and "
            "not empty."
        )
    size = recipe.batch_size * recipe.accumulation * ranks
    order = torch.randperm(samples.count, generator=generator).tolist()
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def mean_gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], samples: Samples, recipe: Recipe, rows: Sequence[int]
) -> list[Tensor] | None:
    """Gradients of the mean task loss over rows, as many at once as in training; 0 for parameters without a gradient.

    A last row on its own is left out if BatchNorm could not train on it; None if no other is left.
    """
    chunks = [rows[begin : begin + recipe.batch_size] for begin in range(0, len(rows), recipe.batch_size)]
    if len(chunks[-1]) == 1 and any(norm.training for _, norm in batch_norms(model)):
        chunks.pop()
    if not chunks:
        return None
    scale = recipe.scaler().get_scale()
    while True:
        gradients = _gradients(model, parameters, samples, recipe, chunks, scale)
        if scale <= 1.0 or all(bool(gradient.isfinite().all()) for gradient in gradients):
            return gradients
        scale /= SMALLER


def _gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    samples: Samples,
    recipe: Recipe,
    chunks: Sequence[Sequence[int]],
    scale: float,
) -> list[Tensor]:
    """Gradients of the mean over all chunks, computed on the loss times ``scale``."""
    for parameter in model.parameters():
        parameter.grad = None
    count = sum(map(len, chunks))
    for some in chunks:
        batch = samples.read(some)
        with recipe.computing():
            loss, _ = recipe.task_loss(model, batch)
        if loss is None:
            raise OptionError("gradients are measured with the task loss, which needs labels: train_dataset has none.")
        part: Tensor = loss * (scale * len(some) / count)
        part.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return found if scale == 1.0 else list(torch._foreach_div(found, scale))
