r"""BatchNorm on another domain: statistics measured there, and affine parameters that preserve the function.

A layer normalises by source statistics :math:`(\mu_s, v_s)` and then applies :math:`(\gamma, \beta)`. With target
statistics :math:`(\mu_t, v_t)`, the same function has

.. math::
    \beta' = \beta + \gamma \frac{\mu_t - \mu_s}{\sqrt{v_s + \epsilon}}
    \qquad
    \gamma' = \gamma \frac{\sqrt{v_t + \epsilon}}{\sqrt{v_s + \epsilon}}

Reference: Ha, Jeong, Lee. Domain-Aware Fine-Tuning: Enhancing Neural Network Adaptability. AAAI 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from hf_ft.errors import OptionError
from hf_ft.models.feature_hooks import model_inputs
from hf_ft.models.norms import batch_norms
from hf_ft.models.preserve import observing

logger = logging.get_logger(__name__)
Reduce = Callable[[Tensor], Tensor]
Moments = tuple[int, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class BatchNormStatistics:
    """Per-channel mean and variance of the input of one BatchNorm layer, both (C,)."""

    mean: Tensor
    var: Tensor


def estimate_batch_norm(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    statistics: Literal["batch", "pooled"] = "batch",
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, BatchNormStatistics]:
    """Estimate the input statistics of every BatchNorm layer in one pass over the data.

    The model runs in eval mode, so all layers are measured under its current statistics. Modes and RNG states are
    restored on exit.

    ``"batch"`` is the mean of the batch means, and the mean of the unbiased within-batch variances, each
    ``sum((x - mean)^2) / (n - 1)``. Every batch has the same weight, and variation between batches is ignored: this
    is what BatchNorm sees in train mode, on average. A batch with one value per channel contributes only a mean.

    ``"pooled"`` is the mean and the population (biased) variance ``sum((x - mean)^2) / n`` of all values, by Chan's
    parallel formula: with ``d`` the difference between two means, ``M2 = M2_a + M2_b + d^2 n_a n_b / (n_a + n_b)``.

    A layer called several times in a forward pass counts each call as a batch. A layer that is never called is omitted.

    Args:
        model: model whose BatchNorm layers with running statistics are measured: 1d, 2d, 3d and Sync.
        loader: batches as dictionaries of the model's keyword arguments; ``labels`` are ignored.
        statistics: ``"batch"`` or ``"pooled"``.
        reduce: sums a tensor over all processes, each of which processes its own batches.

    Returns:
        Statistics by layer name, in float64.

    Raises:
        OptionError: if there is no BatchNorm, no batch or no variance to measure, or if values are not finite.

    Reference:
        Chan, Golub, LeVeque. Updating formulae and a pairwise algorithm for computing sample variances. 1979.
    """
    if statistics not in _MOMENTS:
        raise OptionError(f"statistics={statistics!r} is unknown: choose {' or '.join(map(repr, _MOMENTS))}.")
    reduce = reduce or _alone
    sums = {name: _MOMENTS[statistics](norm) for name, norm in batch_norms(model)}
    if not sums:
        raise OptionError(
            f"{type(model).__name__} has no BatchNorm with running statistics, so there is nothing to convert. "
            "DAFTConfig(convert_batch_norm=False) keeps the rest of the method: the zero head and two learning rates."
        )
    batches = _pass_over(model, loader, sums)
    # The condition is summed over all processes, so that all continue or all raise.
    device = next(iter(sums.values())).device
    if not float(reduce(torch.tensor(float(batches), device=device))):
        raise OptionError("no batches to measure BatchNorm statistics on: the loader or the training data is empty.")
    results = {name: moments.result(name, reduce) for name, moments in sums.items()}
    return {name: _finite(name, result) for name, result in results.items() if result is not None}


@torch.no_grad()
def convert_batch_norm(model: nn.Module, statistics: Mapping[str, BatchNormStatistics]) -> nn.Module:
    r"""Set target statistics in BatchNorm layers and adjust the affine parameters to preserve the function, in place.

    .. math::
        \beta' = \beta + \gamma (\mu_t - \mu_s) / \sqrt{v_s + \epsilon} \qquad
        \gamma' = \gamma \sqrt{v_t + \epsilon} / \sqrt{v_s + \epsilon}

    In eval mode the model's outputs are unchanged. Values are computed in float64 and rounded to each tensor's dtype.
    A layer that already has the target statistics stays bit-identical. ``num_batches_tracked`` is kept. A layer
    without weight or bias cannot compensate for the difference; it is left unchanged, with a warning.

    Args:
        statistics: by layer name, as :func:`estimate_batch_norm` returns them.

    Returns:
        The model.

    Raises:
        OptionError: for an unknown layer, a wrong shape or an invalid value; nothing is changed then.
    """
    norms = dict(batch_norms(model))
    targets = {name: _target(name, norms, target) for name, target in statistics.items()}
    bare = [name for name in targets if norms[name].weight is None or norms[name].bias is None]
    if bare:
        logger.warning(
            f"{len(bare)} BatchNorm layers, such as {bare[0]!r}, have no weight or no bias and keep their statistics: "
            "without these, new statistics would change the model's function."
        )
    for name, (mean, var) in targets.items():
        if name not in bare:
            _convert(norms[name], mean, var)
    return model


def _convert(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    running_mean, running_var = _exact(norm.running_mean), _exact(norm.running_var)
    if torch.equal(mean, running_mean) and torch.equal(var, running_var):
        return
    gamma, source = _exact(norm.weight), (running_var + norm.eps).sqrt()
    norm.bias.copy_(_exact(norm.bias) + gamma * (mean - running_mean) / source)
    norm.weight.copy_(gamma * (var + norm.eps).sqrt() / source)
    norm.running_mean.copy_(mean)  # type: ignore[union-attr]
    norm.running_var.copy_(var)  # type: ignore[union-attr]


def _target(name: str, norms: Mapping[str, _BatchNorm], wanted: BatchNormStatistics) -> tuple[Tensor, Tensor]:
    """Mean and variance rounded to the dtype of the layer's buffers, in float64."""
    if name not in norms:
        raise OptionError(f"{name!r} is not a BatchNorm with running statistics in this model: {_some(norms)}.")
    buffers: list[Any] = [norms[name].running_mean, norms[name].running_var]
    for kind, value, buffer in zip(("mean", "var"), (wanted.mean, wanted.var), buffers, strict=True):
        if value.shape != buffer.shape:
            raise OptionError(f"{name}: a {kind} of shape {tuple(value.shape)} does not match {tuple(buffer.shape)}.")
    # Round first, so that bias and weight compensate for exactly the statistics that the layer receives.
    mean, var = (_exact(v.to(b.dtype)) for v, b in zip((wanted.mean, wanted.var), buffers, strict=True))
    if not (bool(mean.isfinite().all()) and bool(var.isfinite().all()) and bool((var >= 0).all())):
        raise OptionError(f"{name}: statistics must be finite, and variances non-negative, in {buffers[0].dtype}.")
    return mean, var


def _exact(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().cpu().double()  # on the CPU, because not every device has float64


def _some(names: Iterable[str]) -> str:
    items = list(names)
    return f"it has {', '.join(items[:3])}{', ...' if len(items) > 3 else ''}" if items else "it has none"


# --- measurement ------------------------------------------------------------------------------------------


def _pass_over(model: nn.Module, loader: Iterable[Mapping[str, Any]], sums: Mapping[str, Any]) -> int:
    """Run the model on every batch, accumulating each layer's input moments; return the number of batches."""
    device, batches = next(model.parameters()).device, 0
    with recorded(model, sums), observing(model):
        for batch in loader:
            model(**model_inputs(batch, device))
            batches += 1
    return batches


@contextmanager
def recorded(model: nn.Module, sums: Mapping[str, Any]) -> Iterator[None]:
    """Accumulate the moments of the inputs of layers, by name, whenever the model runs."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(_record, moments), with_kwargs=True)
        for name, moments in sums.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(moments: Any, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    values = args[0] if args else kwargs["input"]
    if values.numel():
        moments.add(_moments(values, moments.device))


def _moments(values: Tensor, device: torch.device) -> Moments:
    """Count, mean and sum of squared deviations per channel of (N, C, ...)."""
    values = values.detach().to(device).double()
    others = [dim for dim in range(values.dim()) if dim != 1]
    count = values.numel() // values.shape[1]
    var, mean = torch.var_mean(values, dim=others, correction=0)
    return count, mean, var * count


class _Sums:
    """Accumulators of one layer, in float64."""

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        device = norm.running_mean.device
        self.device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.zeros = torch.zeros(norm.num_features, dtype=torch.float64, device=self.device)

    def _total(self, count: int, reduce: Reduce) -> float:
        return float(reduce(torch.tensor(float(count), dtype=torch.float64, device=self.device)))


class BatchMoments(_Sums):
    """Sums of batch means and of unbiased batch variances."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm)
        self.means = self.variances = self.zeros
        self.count = self.count_of_variances = 0

    def add(self, moments: Moments) -> None:
        count, mean, squares = moments
        self.means, self.count = self.means + mean, self.count + 1
        if count > 1:
            self.variances = self.variances + squares / (count - 1)
            self.count_of_variances += 1

    def result(self, name: str, reduce: Reduce) -> BatchNormStatistics | None:
        count, variances = self._total(self.count, reduce), self._total(self.count_of_variances, reduce)
        if not count:
            return None
        if not variances:
            raise _no_variance(name, "every batch has one value per channel: measure on larger batches")
        return BatchNormStatistics(reduce(self.means) / count, reduce(self.variances) / variances)


class _Pooled(_Sums):
    """Running count, mean and sum of squared deviations of all values."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm)
        self.mean = self.squares = self.zeros
        self.count = 0

    def add(self, moments: Moments) -> None:
        count, mean, squares = moments
        total, gap = self.count + count, mean - self.mean
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.mean, self.count = self.mean + gap * (count / total), total

    def result(self, name: str, reduce: Reduce) -> BatchNormStatistics | None:
        count = self._total(self.count, reduce)
        if not count:
            return None
        if count == 1:
            raise _no_variance(name, "there is only one value per channel in the data: measure on more")
        mean = reduce(self.count * self.mean) / count
        squares = reduce(self.squares + self.count * (self.mean - mean).square())
        return BatchNormStatistics(mean, squares / count)


_MOMENTS: dict[str, type[BatchMoments] | type[_Pooled]] = {"batch": BatchMoments, "pooled": _Pooled}


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _no_variance(name: str, why: str) -> OptionError:
    return OptionError(f"cannot measure the variance of BatchNorm {name!r}: {why}.")


def _finite(name: str, found: BatchNormStatistics) -> BatchNormStatistics:
    if not (bool(found.mean.isfinite().all()) and bool(found.var.isfinite().all())):
        raise OptionError(
            f"the input of BatchNorm {name!r} is not finite on the training data: check the inputs for NaN or infinite "
            "values, or measure in float32."
        )
    return found
