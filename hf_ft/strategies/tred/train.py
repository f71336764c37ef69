"""TRED's first stage: train a disentangler on a frozen network's features.

For the loss see :mod:`hf_ft.strategies.tred.loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ft.errors import OptionError
from hf_ft.functional import as_positions, pooled, wide
from hf_ft.strategies.tred.collapse import judge
from hf_ft.strategies.tred.disentangler import Disentangler, Kind, make_disentangler, valid_positions
from hf_ft.strategies.tred.loss import MINIMUM, Batch, ClassMoments, DisentanglingLoss, Weights

Read = Callable[[Sequence[int]], Batch]


@dataclass(frozen=True)
class Disentangled:
    """Result of :func:`disentangle`.

    Attributes:
        module: the disentangler, in eval mode and frozen.
        history: per epoch, the mean of every unweighted term of L1, and ``total``.
        figures: computed on all samples in eval mode. ``p_share`` and ``n_share``: norms of P and N relative to F;
            ``reconstruction``: squared error relative to the square of F; ``accuracy`` of the classifier, and
            ``chance``, the share of the largest class; ``p_varies`` and ``n_varies``: variance of pooled P and N
            relative to pooled F; ``p_label``, ``n_label``, ``f_label``: share of that variance between classes.
        verdict: what went wrong and how to fix it; empty if nothing did.
    """

    module: Disentangler
    history: list[dict[str, float]]
    figures: dict[str, float]
    verdict: str


def disentangle(
    read: Read,
    samples: int,
    classes: int,
    kind: Kind = "mask",
    weights: Weights | None = None,
    *,
    epochs: int = 20,
    batch_size: int = 32,
    lr: float = 0.3,
    generator: torch.Generator,
    advance: Callable[[dict[str, float]], None] | None = None,
) -> Disentangled:
    """Learn P and N from a frozen source model's features.

    Args:
        read: returns the features of the given rows, their labels (B,), and for tokens a mask (B, T) or None.
        samples: number of rows; at least two.
        classes: number of classes; labels lie in [0, classes).
        kind: ``"mask"`` or ``"branches"``.
        weights: weights of the terms; by default :class:`Weights`.
        epochs: passes over all rows; a last batch of one is dropped.
        lr: approximate change of a gate's logit, or of an output in units of F, per Adam step.
        generator: source of all random numbers; the global random state is left unchanged.
        advance: called after every epoch with its terms.

    Raises:
        OptionError: if there are too few samples, or features are not finite.
    """
    if samples < 2 or batch_size < 2:
        raise OptionError(f"disentangling needs batches of at least two samples, not {min(samples, batch_size)}.")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)  # all random numbers are drawn on the CPU
        module, moments, positions = _measured(read, samples, classes, kind, batch_size)
        loss = DisentanglingLoss(module, moments, weights or Weights(), lr)
        history = []
        for _ in range(epochs):
            order = torch.randperm(samples).tolist()
            batches = _batches(read, order, batch_size, least=2)
            steps = [loss.step(batch) for batch in batches]
            history.append({name: sum(step[name] for step in steps) / len(steps) for name in steps[0]})
            if advance is not None:
                advance(history[-1])
        module.settle(*positions)
        module.eval().requires_grad_(False)
        figures = _figures(loss, moments, _batches(read, range(samples), batch_size))
    return Disentangled(module, history, figures, judge(figures))


def _batches(read: Read, rows: Sequence[int], size: int, least: int = 1) -> Iterator[Batch]:
    for chunk in (rows[start : start + size] for start in range(0, len(rows), size)):
        if len(chunk) >= least:
            features, labels, mask = read(chunk)
            yield wide(features.detach()), labels.to(features.device), mask


def _measured(
    read: Read, samples: int, classes: int, kind: Kind, size: int
) -> tuple[Disentangler, ClassMoments, tuple[Tensor, Tensor]]:
    """An initialised module, F's moments by class, and its moments over positions; all for F / scale."""
    pools, count, total, products, least = [], 0, torch.zeros(()), torch.zeros(()), 0.0
    for features, labels, mask in _batches(read, range(samples), size):
        rows = as_positions(features)
        rows = rows[valid_positions(rows, mask)]
        least = min(least, float(rows.min()))
        exact = rows.cpu().double() if rows.device.type == "mps" else rows.double()  # MPS has no float64
        count, total = count + len(exact), total.to(exact) + exact.sum(dim=0)
        products = products.to(exact) + (exact.T @ exact if kind == "branches" else exact.square().sum(dim=0).diag())
        pools.append((pooled(features, mask), labels))
    if not bool(products.diagonal().isfinite().all()):
        raise OptionError("the source model's features are not finite: check the inputs for NaN or infinite values.")
    scale = (products.diagonal().mean() / count).sqrt().clamp_min(MINIMUM)
    mean = total / count / scale
    covariance = products / count / scale.square() - mean[:, None] * mean
    module = make_disentangler(kind, len(mean), non_negative=least >= 0).to(features.device)
    module.scale.copy_(scale)
    module.start(mean, covariance)
    moments = ClassMoments(classes)
    for pool, labels in pools:
        moments.add(pool / module.scale, labels)
    return module, moments, (mean, covariance)


@torch.no_grad()
def _figures(loss: DisentanglingLoss, of_f: ClassMoments, batches: Iterator[Batch]) -> dict[str, float]:
    module, scale = loss.module, loss.module.scale
    squares = dict.fromkeys("pnfr", 0.0)
    moments = {"p": ClassMoments(of_f.classes), "n": ClassMoments(of_f.classes), "f": of_f}
    right = 0
    for features, labels, mask in batches:
        valid = valid_positions(as_positions(features), mask)
        p, n = module(features, mask)
        for name, part in {"p": p, "n": n, "f": features, "r": p + n - features}.items():
            squares[name] += float((as_positions(part)[valid] / scale).square().sum())
        pool = pooled(p, mask) / scale
        moments["p"].add(pool, labels)
        moments["n"].add(pooled(n, mask) / scale, labels)
        right += int((loss.logits(pool).argmax(dim=1) == labels).sum())
    energy, variance = max(squares["f"], MINIMUM), max(float(of_f.var.sum()), MINIMUM)
    return {
        "p_share": math.sqrt(squares["p"] / energy),
        "n_share": math.sqrt(squares["n"] / energy),
        "reconstruction": squares["r"] / energy,
        "accuracy": right / float(of_f.counts.sum()),
        "chance": float(of_f.counts.max() / of_f.counts.sum()),
        "p_varies": float(moments["p"].var.sum()) / variance,
        "n_varies": float(moments["n"].var.sum()) / variance,
        **{f"{k}_label": float(m.between.sum()) / max(float(m.var.sum()), MINIMUM) for k, m in moments.items()},
    }
