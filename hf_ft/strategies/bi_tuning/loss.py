"""The mathematics of Bi-tuning: one contrastive loss for both heads, and queues of keys by class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def class_contrast(own: Tensor, others: Tensor, labels: Tensor, temperature: float) -> Tensor:
    r"""Divergence of the similarities from equal shares for all keys of the sample's class, and none for others.

    With the similarities :math:`s_{i0}` of sample :math:`i` to its own key and :math:`s_{ick}` to key :math:`k` of
    class :math:`c`, and :math:`p_i = \operatorname{softmax}(s_i / T)` over all :math:`1 + CK` of them,

    .. math::
        L_i = -\frac{1}{K + 1} \Bigl(\log p_{i0} + \sum_k \log p_{i y_i k}\Bigr) - \log(K + 1) \ge 0

    Args:
        own: (B,).
        others: (B, C, K).
        labels: (B,) integers in [0, C).

    Returns:
        (B,).
    """
    rows, _, keys = others.shape
    logs = (torch.cat([own[:, None], others.flatten(1)], 1) / temperature).log_softmax(1)
    same = logs[:, 1:].view_as(others)[torch.arange(rows, device=labels.device), labels]
    return -(logs[:, 0] + same.sum(1)) / (keys + 1) - math.log(keys + 1)


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., d) scaled to length 1."""
    return nn.functional.normalize(vectors, dim=-1)


def with_bias(vectors: Tensor, bias: Tensor | float | None) -> Tensor:
    """Vectors (n, d) with an additional entry, scaled to length 1: the biases for weights, 1 for what they multiply.

    With None, for a layer without a bias, there is no such entry.
    """
    if bias is None:
        return unit(vectors)
    column = bias.to(vectors) if isinstance(bias, Tensor) else vectors.new_full((len(vectors),), bias)
    return unit(torch.cat([vectors, column[:, None]], 1))


def enqueue(queues: Tensor, labels: Tensor, keys: Tensor, slots: Tensor) -> None:
    """Write keys (n, d) into their slots (n,) of the queues (C, K, d) of their classes, in place.

    If several keys have the same slot, the last one stays. Nothing here depends on values that a GPU would have to
    report.
    """
    count, size = len(labels), queues.shape[1]
    if count > size:  # only then can a class reach the same slot again
        taken = labels * size + slots
        place = torch.arange(count, device=labels.device)
        keys = keys[((taken[:, None] == taken) * place).amax(1)]
    queues[labels, slots] = keys.to(queues.dtype)


def next_slots(labels: Tensor, position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The slots (n,) of keys that enter the queues of their classes in order, and the positions (C,) after them."""
    before = (labels[:, None] == labels).tril(-1).sum(1)
    slots = (position[labels] + before) % size
    return slots, position.index_add(0, labels, torch.ones_like(labels)) % size
