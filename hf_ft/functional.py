"""The maths of the methods, as pure functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _HalfSquaredDistance(torch.autograd.Function):
    """One autograd node for all tensors: a node per tensor costs several passes over memory more."""

    @staticmethod
    def forward(ctx: Any, starts: Sequence[Tensor] | None, *weights: Tensor) -> Tensor:
        # Sums of squares of half-precision weights would lose the small differences they are made of.
        wide = [w.detach() if w.dtype in (torch.float32, torch.float64) else w.detach().float() for w in weights]
        ctx.dtypes = [w.dtype for w in weights]
        differences = wide if starts is None else torch._foreach_sub(wide, list(starts))
        ctx.save_for_backward(*differences)
        return torch.stack(torch._foreach_norm(differences)).square().sum() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # On a CPU a number is free to read, and a 0-d tensor takes foreach's slow path (several times slower).
        scale = grad.item() if grad.device.type == "cpu" else grad
        grads = torch._foreach_mul(list(ctx.saved_tensors), scale)
        return (None, *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)))


def l2_sp(weights: Sequence[Tensor], starts: Sequence[Tensor] | None = None) -> Tensor:
    r"""Half the squared distance of the weights from their starting point.

    .. math:: \tfrac12 \sum_i \lVert w_i - w^0_i \rVert^2

    Args:
        weights: the parameters, of any shapes.
        starts: their starting values, shapes alike; ``None`` stands for zeros, plain weight decay.

    Returns:
        A scalar, in float32 (float64 for float64 weights); exactly 0 at the starting point.

    Raises:
        ValueError: the two lists differ in length or in a shape.

    Reference: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks", ICML 2018.
    """
    if not weights:
        return torch.zeros(())
    if starts is not None and [w.shape for w in weights] != [s.shape for s in starts]:
        raise ValueError("l2_sp: weights and starts differ in number or in shape.")
    return _HalfSquaredDistance.apply(starts, *weights)
