"""Running statistics of BatchNorm layers that fit the data under weights other than those of training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_ft.errors import OptionError
from hf_ft.models.batch_norm import BatchMoments, recorded
from hf_ft.models.feature_hooks import model_inputs
from hf_ft.models.norms import batch_norms
from hf_ft.models.preserve import observing
from hf_ft.models.stoch_norm import StochNorm

Statistics = dict[str, tuple[Tensor, ...]]


class _Plain(_BatchNorm):
    """Plain BatchNorm in train mode, of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None: ...


def statistics_of(model: nn.Module, names: Collection[str] | None = None) -> Statistics:
    """Copies in CPU memory of the running statistics of BatchNorm layers, by layer name; by default, of all layers."""
    return {
        name: tuple(buffer.detach().to("cpu", copy=True) for buffer in _buffers(norm))
        for name, norm in batch_norms(model)
        if names is None or name in names
    }


@torch.no_grad()
def set_statistics(model: nn.Module, statistics: Mapping[str, tuple[Tensor, ...]]) -> None:
    """Set running statistics to copies that :func:`statistics_of` made."""
    norms = dict(batch_norms(model))
    for name, values in statistics.items():
        for buffer, value in zip(_buffers(norms[name]), values, strict=True):
            buffer.copy_(value)


@torch.no_grad()
def renew_statistics(
    model: nn.Module,
    names: Collection[str],
    batches: Iterable[Mapping[str, Any]],
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Set the running statistics of BatchNorm layers to those of the data under the model's current weights.

    In one pass, these layers normalise each batch by its own statistics while the rest of the model is in eval mode.
    The running mean becomes the mean of the batch means, and the running variance that of the unbiased variances, as
    with ``torch.optim.swa_utils.update_bn``, but in float64 and over all processes. Batches of one sample, which
    BatchNorm may not be able to train on, are left out. RNG states are restored on exit.

    Args:
        names: names of the layers.
        batches: this process's share of the training data, as keyword arguments of the model.
        reduce: sums a tensor over all processes.

    Raises:
        OptionError: if there is no batch of more than one sample.
    """
    norms = {name: norm for name, norm in batch_norms(model) if name in names}
    sums = {name: BatchMoments(norm) for name, norm in norms.items()}
    device, measured = next(model.parameters()).device, 0
    with observing(model), recorded(model, sums), _by_batch(norms.values()):
        for batch in batches:
            inputs = model_inputs(batch, device)
            if (
                max((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), default=0)
                > 1
            ):
                model(**inputs)
                measured += 1
    if not float(reduce(torch.tensor(float(measured), device=device))):
        raise OptionError(
            "no batch of more than one sample to measure BatchNorm statistics on: the training data are empty, or the "
            "batch size is 1."
        )
    for name, norm in norms.items():
        found = sums[name].result(name, reduce)
        if found is not None:
            norm.running_mean.copy_(found.mean)  # type: ignore[union-attr]
            norm.running_var.copy_(found.var)  # type: ignore[union-attr]


@contextmanager
def _by_batch(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Layers normalise by each batch's own statistics, in this process alone; their buffers are restored on exit."""
    kept = [(norm, type(norm), tuple(buffer.clone() for buffer in _buffers(norm))) for norm in norms]
    try:
        for norm, kind, _ in kept:
            norm.training = True
            if issubclass(kind, StochNorm | nn.SyncBatchNorm):  # draws at random; waits for the other processes
                norm.__class__ = _Plain
        yield
    finally:
        for norm, kind, buffers in kept:
            norm.__class__, norm.training = kind, False
            for buffer, value in zip(_buffers(norm), buffers, strict=True):
                buffer.copy_(value)


def _buffers(norm: _BatchNorm) -> tuple[Tensor, ...]:
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return tuple(buffer for buffer in buffers if buffer is not None)
