"""The mathematics of the strategies as pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_ft.errors import OptionError

__all__ = [
    "as_positions",
    "attention_distance",
    "attention_map",
    "batch_spectral_shrinkage",
    "calibrated_log_loss",
    "club_upper_bound",
    "collaborative_loss",
    "disagreement",
    "distillation_loss",
    "feature_distance",
    "feature_spread",
    "gaussian_bandwidths",
    "gaussian_log_likelihood",
    "head_curvature",
    "interpolated",
    "l2_sp",
    "log_losses",
    "mirrored_probabilities",
    "mmd2",
    "pooled",
    "soft_cross_entropy",
    "stable_rate",
    "wide",
]


class _HalfSquaredDistance(torch.autograd.Function):
    """One autograd node for all tensors: a node per tensor costs several more passes over memory."""

    @staticmethod
    def forward(ctx: Any, starts: Sequence[Tensor] | None, *weights: Tensor) -> Tensor:
        # In half precision, sums of squares would lose the small differences of which they consist.
        wide = [w.detach() if w.dtype in (torch.float32, torch.float64) else w.detach().float() for w in weights]
        ctx.dtypes = [w.dtype for w in weights]
        differences = wide if starts is None else torch._foreach_sub(wide, list(starts))
        ctx.save_for_backward(*differences)
        return torch.stack(torch._foreach_norm(differences)).square().sum() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # On a CPU, reading a number is free, and a 0-d tensor takes foreach's slow path (several times slower).
        scale = grad.item() if grad.device.type == "cpu" else grad
        grads = torch._foreach_mul(list(ctx.saved_tensors), scale)
        return (None, *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)))


def l2_sp(weights: Sequence[Tensor], starts: Sequence[Tensor] | None = None) -> Tensor:
    r"""Half the squared distance of the weights from their starting point.

    .. math:: \tfrac12 \sum_i \lVert w_i - w^0_i \rVert^2

    Args:
        weights: parameters of any shapes.
        starts: their initial values, of the same shapes; ``None`` means zeros, which is plain weight decay.

    Returns:
        A scalar in float32 (float64 for float64 weights); exactly 0 at the starting point.

    Raises:
        ValueError: if the two lists differ in length or in a shape.

    Reference: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks", ICML 2018.
    """
    if not weights:
        return torch.zeros(())
    if starts is not None and [w.shape for w in weights] != [s.shape for s in starts]:
        raise ValueError("l2_sp: weights and starts differ in number or shape.")
    return _HalfSquaredDistance.apply(starts, *weights)


def wide(values: Tensor) -> Tensor:
    """Convert values to float32, or keep them in float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def interpolated(starts: Sequence[Tensor], ends: Sequence[Tensor], alpha: float) -> list[Tensor]:
    r"""Weights on the line between two models; exactly the one at 0, and the other at 1.

    .. math:: (1 - \alpha) w^0_i + \alpha w_i

    Args:
        starts, ends: parameters of equal shapes and dtypes.

    Reference: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022.
    """
    return list(torch._foreach_lerp(list(starts), list(ends), alpha)) if starts else []


# --- feature maps -----------------------------------------------------------------------------------------


def as_positions(features: Tensor) -> Tensor:
    """Reshape feature maps (B, C, H, W) or token states (B, T, C) to (B, positions, C).

    Raises:
        ValueError: for any other number of dimensions.
    """
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    if features.dim() == 3:
        return features
    raise ValueError(f"features must be (B, C, H, W) or (B, T, C), not {tuple(features.shape)}.")


def pooled(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average feature maps (B, C, H, W) or token states (B, T, C) over positions to (B, C).

    Args:
        mask: (B, T), 0 for padding tokens, which are excluded.
    """
    positions = as_positions(features)
    if mask is None:
        return positions.mean(dim=1)
    weights = mask.to(positions)[..., None]
    return (positions * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def attention_map(features: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Spatial attention map: the mean square over channels at each position, normalised to unit length per sample.

    .. math:: A = \frac{a}{\lVert a \rVert_2}, \qquad a_p = \tfrac1C \sum_c F_{cp}^2

    Args:
        features: (B, C, H, W) or (B, T, C).
        mask: (B, T), 0 for padding tokens, which get attention 0.

    Returns:
        (B, H * W) or (B, T); zeros for all-zero features.

    Reference: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017.
    """
    squares = features.square()
    energy = squares.mean(dim=1).flatten(1) if features.dim() == 4 else as_positions(squares).mean(dim=2)
    return nn.functional.normalize(energy if mask is None else energy * mask.to(energy), dim=1)


def attention_distance(target: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The mean squared difference between two :func:`attention_map`, over samples and positions.

    Args:
        target: (B, C, H, W) or (B, T, C).
        source: same shape except for the number of channels.
        mask: (B, T), 0 for padding tokens, which are excluded.

    Raises:
        ValueError: if the two differ in samples or positions.
    """
    one, other = attention_map(target, mask), attention_map(source, mask)
    _same_shape("attention_distance", one, other)
    squares = (one - other).square()
    return squares.mean() if mask is None else squares.sum() / mask.sum().clamp_min(1)


def feature_distance(
    target: Tensor,
    source: Tensor,
    channel_weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    per_position: bool = True,
) -> Tensor:
    r"""The squared distance between two feature maps per position, summed over channels.

    .. math:: \frac1{hw} \sum_c w_c \lVert T_c - S_c \rVert_2^2

    Args:
        target: (B, C, H, W) or (B, T, C).
        source: same shape.
        channel_weights: (C,); None for ones.
        mask: (B, T), 0 for padding tokens; the positions are then each sample's real tokens.
        reduction: mean or sum over the batch.
        per_position: whether to divide by the number of positions, hw.

    Raises:
        ValueError: if the shapes differ, or if the number of weights is not the number of channels.

    Reference: Li et al., "DELTA: Deep Learning Transfer using Feature Map with Attention for Convolutional
    Networks", ICLR 2019.
    """
    _same_shape("feature_distance", target, source)
    squares = (target - source).square()
    if channel_weights is not None:
        channels = target.shape[1 if target.dim() == 4 else -1]
        if channel_weights.shape != (channels,):
            raise ValueError(
                f"feature_distance: channel_weights have shape {tuple(channel_weights.shape)}, but features have "
                f"{channels} channels."
            )
        squares = squares * channel_weights.to(squares).reshape((-1, 1, 1) if target.dim() == 4 else (-1,))
    if mask is None:
        positions = math.prod(target.shape[2:]) if target.dim() == 4 else target.shape[1]
        total = squares.sum() / (positions if per_position else 1)
    else:
        per_sample = (squares.sum(dim=2) * mask.to(squares)).sum(dim=1)
        tokens = mask.to(squares).sum(dim=1).clamp_min(1)
        total = (per_sample / tokens if per_position else per_sample).sum()
    return total if reduction == "sum" else total / len(target)


def batch_spectral_shrinkage(features: Tensor, k: int = 1) -> Tensor:
    r"""The sum of the k smallest squared singular values of a batch of features.

    .. math:: \sum_{i=1}^{k} \sigma_{-i}^2

    There are min(B, d) singular values; if k is larger, all are summed. Values that are 0 up to rounding count as 0.
    A batch of one sample has a single singular value, which carries no information about a spectrum: the result is 0.

    Args:
        features: (B, d); narrower types are computed in float32.
        k: number of singular values to penalise.

    Reference: Chen et al., "Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe
    Transfer Learning", NeurIPS 2019.
    """
    features = wide(features)
    if len(features) < 2:
        return (features * 0.0).sum()
    # Singular values only: the gradient of singular vectors divides by gaps between singular values.
    values = torch.linalg.svdvals(features)
    noise = values.detach()[0] * max(features.shape) * torch.finfo(features.dtype).eps  # as in a matrix rank
    return torch.where(values > noise, values, 0.0)[-k:].square().sum()


# --- distributions ----------------------------------------------------------------------------------------

BANDWIDTHS = 5


def gaussian_bandwidths(x: Tensor, y: Tensor, eps: float = 1e-6) -> Tensor:
    r"""Bandwidths of the five Gaussians of :func:`mmd2`, without gradient.

    .. math:: b_i = 2^{i-2} \max\Big(\varepsilon, \frac{1}{n(n-1)} \sum_{a \ne b} \lVert z_a - z_b \rVert^2\Big),
        \quad i = 0 \ldots 4

    Args:
        x: (n1, d).
        y: (n2, d); z is the concatenation of both, n = n1 + n2.

    Returns:
        (5,).
    """
    with torch.no_grad():
        z = torch.cat([x, y])
        count = len(z)
        mean = _squared_distances(z, z).sum() / (count * (count - 1))
        return mean.clamp_min(eps) * 2.0 ** (torch.arange(BANDWIDTHS, device=x.device).to(mean) - BANDWIDTHS // 2)


def mmd2(x: Tensor, y: Tensor, *, unbiased: bool = False, bandwidths: Tensor | None = None) -> Tensor:
    r"""The squared maximum mean discrepancy between two samples under a sum of Gaussian kernels.

    .. math:: \overline{k(x, x')} + \overline{k(y, y')} - 2\,\overline{k(x, y)}, \qquad
        k(a, b) = \sum_i e^{-\lVert a - b \rVert^2 / b_i}

    Args:
        x: (n1, d).
        y: (n2, d); narrower types than float32 are widened to float32.
        unbiased: exclude the pairs of a sample with itself from the first two means. The result is then 0 on average
            for equal distributions and may be negative. The biased estimate is never negative, and 0 for equal
            samples.
        bandwidths: bandwidths of the Gaussians; default: :func:`gaussian_bandwidths`. They receive no gradient.

    Returns:
        A scalar, at most twice the number of Gaussians.

    Raises:
        ValueError: if shapes are not (n, d), or if there are fewer samples than the means need.

    Reference: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012; Long et al., "Learning Transferable Features
    with Deep Adaptation Networks", ICML 2015, for the sum of kernels.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"mmd2: samples must be (n, d) with the same d, not {tuple(x.shape)} and {tuple(y.shape)}.")
    least = 2 if unbiased else 1
    if min(len(x), len(y)) < least:
        raise ValueError(f"mmd2: at least {least} samples on each side are needed, not {len(x)} and {len(y)}.")
    x, y = wide(x), wide(y)
    widths = gaussian_bandwidths(x, y) if bandwidths is None else bandwidths.detach()

    def mean_kernel(a: Tensor, b: Tensor, without_self: bool = False) -> Tensor:
        kernel = torch.exp(-_squared_distances(a, b)[..., None] / widths.to(a)).sum(dim=2)
        if not without_self:
            return kernel.mean()
        return (kernel.sum() - kernel.diagonal().sum()) / (len(a) * (len(a) - 1))

    return mean_kernel(x, x, unbiased) + mean_kernel(y, y, unbiased) - 2 * mean_kernel(x, y)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n1, n2), from differences: with a matrix product, equal samples would not be exactly 0 apart.

    Called for each pair of sets, not once for all: where x equals y, the gradients then cancel exactly. A remainder of
    1e-8 would be a full step of Adam, in a random direction.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def gaussian_log_likelihood(mean: Tensor, log_var: Tensor, samples: Tensor) -> Tensor:
    r"""The mean log-likelihood of samples under diagonal Gaussians, a scalar.

    .. math:: \frac1B \sum_i \log \mathcal N(s_i;\, \mu_i, \operatorname{diag} \, e^{v_i})

    Args:
        mean: (B, d).
        log_var: (B, d).
        samples: (B, d).
    """
    terms = (samples - mean).square() / log_var.exp() + log_var + math.log(2 * math.pi)
    return -terms.sum(dim=1).mean() / 2


def club_upper_bound(mean: Tensor, log_var: Tensor, samples: Tensor) -> Tensor:
    r"""CLUB, an upper bound on the mutual information of p and n, if q(n | p) is close to the true conditional.

    .. math:: \frac1B \sum_i \log q(n_i \mid p_i) - \frac1{B^2} \sum_{i,j} \log q(n_j \mid p_i), \qquad
        q(n \mid p_i) = \mathcal N(\mu_i, \operatorname{diag} \, e^{v_i})

    Both sums contain the same log-variances, which cancel.

    Args:
        mean: (B, d), mean of q given p_i.
        log_var: (B, d), log-variance of q given p_i.
        samples: (B, d), the n_i.

    Returns:
        A scalar. It may be negative, by chance or where q is a poor fit.

    Reference: Cheng et al., "CLUB: A Contrastive Log-ratio Upper Bound of Mutual Information", ICML 2020.
    """
    # The mean of (n_j - mu_i)^2 over j is (mean n - mu_i)^2 + var n, which avoids a table of all pairs.
    centre, spread = samples.mean(dim=0), samples.var(dim=0, correction=0)
    positive = (samples - mean).square()
    negative = (centre - mean).square() + spread
    return ((negative - positive) / log_var.exp()).sum(dim=1).mean() / 2


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    r"""Divergence of a student's softened predictions from a teacher's; exactly 0 for equal logits.

    .. math:: \frac1B \sum_b \mathrm{KL}(\operatorname{softmax}(t_b / T) \,\|\, \operatorname{softmax}(s_b / T)),

    without the factor T^2 of Hinton et al.

    Args:
        student: logits (B, C).
        teacher: logits (B, C), which should carry no gradient.
        temperature: T > 0.

    Returns:
        A scalar, in float32 or wider.

    Reference: Li and Hoiem, "Learning without Forgetting", ECCV 2016.
    """
    s, t = (nn.functional.log_softmax(wide(logits) / temperature, dim=1) for logits in (student, teacher))
    return nn.functional.kl_div(s, t, reduction="batchmean", log_target=True)


def soft_cross_entropy(
    logits: Tensor, shares: Tensor, class_weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    r"""Cross-entropy with several classes per sample, as for mixed images.

    .. math:: -\frac{\sum_b \sum_c w_c \, q_{bc} \log \operatorname{softmax}(z_b)_c}{\sum_b m_b}, \qquad
        q_b = (1 - \epsilon) \, y_b + \epsilon \, m_b / C, \qquad m_b = \sum_c y_{bc}

    It is linear in the shares: for :math:`y = \lambda y_1 + (1 - \lambda) y_2`, it is :math:`\lambda L(y_1) +
    (1 - \lambda) L(y_2)`. A sample without a label has shares of 0 and does not count.

    Args:
        logits: (B, C).
        shares: (B, C), y; the shares of a sample sum to 1.
        class_weights: (C,), w; by default 1.
        smoothing: :math:`\epsilon`, as for ``label_smoothing_factor``.

    Returns:
        A scalar, in float32 or wider.

    Reference: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    log_p = nn.functional.log_softmax(wide(logits), dim=1)
    y = shares.to(log_p)
    mass = y.sum(dim=1, keepdim=True)
    q = (1 - smoothing) * y + smoothing * mass / y.shape[1] if smoothing else y
    q = q if class_weights is None else q * class_weights.to(q)
    return -(q * log_p).sum() / mass.sum()


def mirrored_probabilities(predict: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    r"""Mean of the predictions for images and for their mirror images: :math:`(p(x) + p(x_{\leftrightarrow})) / 2`.

    Args:
        predict: images -> logits (B, C).
        images: (B, ..., H, W).

    Returns:
        (B, C), probabilities, in float32 or wider.

    Reference: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
        NeurIPS 2012.
    """
    both = [wide(predict(view)).softmax(dim=1) for view in (images, images.flip(-1))]
    return torch.stack(both).mean(dim=0)


def _same_shape(name: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"{name}: target {tuple(one.shape)} and source {tuple(other.shape)} differ in shape: both must come from "
            "the same layer of the same architecture, at the same image size."
        )


def disagreement(logits: Sequence[Tensor]) -> Tensor:
    r"""Distance of an ensemble's members from their mean: :math:`\frac{1}{B N} \sum_b \sum_j \|z_j - \bar z\|_2`.

    The norm is not squared, and its gradient is 0 where all members agree.

    Args:
        logits: N tensors (B, C).

    Returns:
        A scalar, in the dtype of the logits.
    """
    z = torch.stack(list(logits))
    # Relative to the first member, so that equal members are exactly 0 apart: their mean alone may be rounded.
    shifted = z - z[0]
    # torch's norm has subgradient 0 at 0, where the root of a sum of squares has none.
    return torch.linalg.vector_norm(shifted - shifted.mean(dim=0), dim=-1).mean()


def collaborative_loss(logits: Sequence[Tensor], labels: Tensor, consistency: float = 0.2) -> Tensor:
    r"""The loss of AMCF: the cross-entropy of every member, plus their disagreement.

    .. math:: \sum_j \mathrm{CE}(z_j, y) + \lambda \frac{1}{B} \sum_b \frac{1}{N} \sum_j \|z_j - \bar z\|_2,
        \qquad \bar z = \frac{1}{N} \sum_j z_j

    With one member it reduces to the cross-entropy.

    Args:
        logits: logits of the N members, (B, C) each.
        labels: (B,), class indices.
        consistency: lambda, >= 0.

    Raises:
        OptionError: if there is no member, if shapes differ, or if the weight is negative.

    Reference: Feng et al., PeerJ Computer Science 2107 (2024), as in the authors' code.
    """
    shapes = [tuple(member.shape) for member in logits]
    if not shapes or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise OptionError(f"logits must be (B, C), with the same shape for every member, not {shapes}.")
    if not 0 <= consistency < math.inf:
        raise OptionError(f"consistency={consistency!r} lies outside [0, inf). Default: 0.2.")
    loss = torch.stack([nn.functional.cross_entropy(member, labels) for member in logits]).sum()
    return loss + consistency * disagreement(logits) if consistency else loss


def calibrated_log_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    r"""The log loss at the temperature that minimises it: how well logits tell classes apart, however confident.

    .. math:: \min_{T > 0} \; \frac1n \sum_i w_{y_i} \, \mathrm{CE}(z_i / T, \, y_i)

    With several labels per row, the binary cross-entropy, as the mean over rows and labels. The loss is convex in 1/T.

    Args:
        logits: (n, C).
        labels: (n,), classes, -100 for none; or (n, C), each 0 or 1.
        weights: (C,), weights of the classes; only for labels (n,).

    Returns:
        The loss, and T, between 1/1000 and 1000. Infinite if a logit is not finite.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    z, several = logits.detach().double().cpu(), labels.dim() == 2
    y = labels.detach().cpu()
    if not bool(z.isfinite().all()):
        return math.inf, 1.0
    if not several:
        z, y = z[y != -100], y[y != -100].long()
        z = z - z.amax(dim=1, keepdim=True)
    share = torch.ones(len(y), dtype=z.dtype) if weights is None or several else weights.double().cpu()[y]

    def slope(scale: float) -> float:
        if several:
            return float(((torch.sigmoid(scale * z) - y) * z).mean())
        expected = (torch.softmax(scale * z, dim=1) * z).sum(dim=1)
        return float((share * (expected - z.gather(1, y[:, None]).squeeze(1))).mean())

    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(60):  # from an interval of length 14, only rounding errors are left
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    temperature = math.exp(-(low + high) / 2)
    return float(log_losses(logits, labels, temperature, weights).mean()), temperature


def log_losses(logits: Tensor, labels: Tensor, temperature: float = 1.0, weights: Tensor | None = None) -> Tensor:
    r"""The log loss of each row at a temperature, in float64: :math:`w_{y_i} \, \mathrm{CE}(z_i / T, \, y_i)`.

    With several labels per row, the mean binary cross-entropy over them.

    Args:
        logits: (n, C).
        labels: (n,), classes, -100 for none; or (n, C), each 0 or 1.
        weights: (C,), weights of the classes; only for labels (n,).

    Returns:
        (m,), without the rows that have no label.
    """
    z, y = logits.detach().double().cpu() / temperature, labels.detach().cpu()
    if y.dim() == 2:
        return nn.functional.binary_cross_entropy_with_logits(z, y.double(), reduction="none").mean(dim=1)
    z, y = z[y != -100], y[y != -100].long()
    losses = nn.functional.cross_entropy(z, y, reduction="none")
    return losses if weights is None else weights.double().cpu()[y] * losses


def head_curvature(features: Tensor) -> Tensor:
    r"""The largest eigenvalue of the features' second moment, with a constant feature for the bias.

    .. math:: \lambda = \lambda_{\max}\Bigl(\tfrac1N \sum_n z_n z_n^T\Bigr), \qquad z = (f, 1)

    For a linear head, the Hessian of the mean loss is at most :math:`c \lambda`, where c bounds the loss's second
    derivative in the logits: 1/2 for softmax and cross-entropy (Böhning 1992), 1/4 for the sigmoid, 2 for the squared
    error, the latter two divided by the number of outputs over which the loss is averaged.

    Args:
        features: (N, d), inputs of the head.

    Returns:
        A scalar in float64.

    Reference:
        Böhning. Multinomial logistic regression algorithm. Annals of the Institute of Statistical Mathematics, 1992.
    """
    z = nn.functional.pad(features.double(), (0, 1), value=1.0)
    return torch.linalg.matrix_norm(z, ord=2).square() / len(z)


def feature_spread(features: Tensor) -> Tensor:
    r"""The mean L1 distance of features from their mean.

    .. math:: \tfrac1N \sum_n \lVert f_n - \bar f \rVert_1

    Args:
        features: (N, d), inputs of a head.

    Returns:
        A scalar in float64.
    """
    values = features.double()
    return (values - values.mean(dim=0)).abs().sum(dim=1).mean()


def stable_rate(curvature: float, momentum: float = 0.0) -> float:
    r"""The largest learning rate at which gradient descent with momentum is stable on a quadratic.

    .. math:: \eta_{\max} = \frac{2 (1 + m)}{\lambda}

    Args:
        curvature: largest eigenvalue of the Hessian.
        momentum: m in [0, 1), of the heavy ball as in ``torch.optim.SGD``, without dampening.
    """
    return 2 * (1 + momentum) / curvature
