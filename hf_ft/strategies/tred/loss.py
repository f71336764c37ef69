r"""What of a frozen source's features serves the target: TRED's first stage.

Features F are split into P, for the target, and N, the rest, by minimising

.. math::
    L_1 = \mathrm{CE}(c(\bar P), y) + \lambda_r \overline{(P + N - F)^2} - \lambda_m \mathrm{MMD}^2(\bar P, \bar N)
        + \lambda_i I(\bar P; \bar N) + \lambda_b B

where bars are means over positions. The paper has the first four terms, as far as it tells. P = F, N = 0 is an
optimum of them: nothing there takes out of P what has nothing to do with the label. The bottleneck B
(:meth:`DisentanglingLoss.bottleneck`), and how everything is scaled, are ours.

Reference: Li et al. Target-Awareness Representation Disentanglement. arXiv 2010.08532; Machine Learning 113, 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ft.functional import as_positions, club_upper_bound, gaussian_log_likelihood, mmd2, pooled
from hf_ft.strategies.tred.disentangler import Disentangler, Mask, valid_positions

Batch = tuple[Tensor, Tensor, Tensor | None]
MINIMUM = 1e-12  # of what is divided by: features may be constant
# Of the variance within classes. Where the label explains less, a batch's estimate of it is noise, which a division
# by that little would magnify until nothing else counted.
LEAST_LABEL = 1 / 32


@dataclass(frozen=True)
class Weights:
    """Of the terms of L1 beside cross-entropy. ``bottleneck=0`` leaves the paper's."""

    reconstruction: float = 10.0
    mmd: float = 0.1
    information: float = 0.1
    bottleneck: float = 1.0


class Conditional(nn.Module):
    """CLUB's q(n | p), a Gaussian: an MLP for the mean and one, through tanh, for the log-variance."""

    def __init__(self, channels: int, hidden: int = 128, lr: float = 5e-3) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.log_var = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Tanh())
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def forward(self, p: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(p), self.log_var(p)

    def information(self, p: Tensor, n: Tensor) -> Tensor:
        """The bound in nats a channel, so that its weight means the same at every width."""
        mean, log_var = self(p)
        return club_upper_bound(mean, log_var, n) / p.shape[1]

    def fit(self, p: Tensor, n: Tensor) -> None:
        """One step of maximum likelihood."""
        mean, log_var = self(p)
        self.optimizer.zero_grad()
        (-gaussian_log_likelihood(mean, log_var, n) / p.shape[1]).backward()
        self.optimizer.step()


def class_variances(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The variance within classes and that of the classes' means, of (B, C), summed over channels.

    From half the squared distances of pairs: unbiased however few of a class a batch holds, so that the second may be
    negative. Without two samples of a class, or with one class only, nothing can be told: 0 both.
    """
    alike = labels[:, None] == labels
    pairs = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if not bool((alike & pairs).any()) or bool(alike.all()):
        return values.sum() * 0.0, values.sum() * 0.0
    halves = torch.cdist(values, values).square() / 2
    within = halves[alike & pairs].mean()
    return within, halves[pairs].mean() - within


class ClassMoments:
    """Of pooled features, by class; in float64 on the CPU."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts = self.sums = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, pools: Tensor, labels: Tensor) -> None:
        values, members = pools.cpu().double(), nn.functional.one_hot(labels.cpu(), self.classes).double()
        self.counts = self.counts + members.sum(dim=0)
        self.sums = self.sums + members.T @ values
        self.squares = self.squares + values.square().sum(dim=0)

    @property
    def mean(self) -> Tensor:
        return self.sums.sum(dim=0) / self.counts.sum()

    @property
    def var(self) -> Tensor:
        mean_square = self.squares / self.counts.sum()
        var = mean_square - self.mean.square()
        return torch.where(var > MINIMUM * mean_square, var, 0.0)  # else it is rounding

    @property
    def between(self) -> Tensor:
        """The variance of the classes' means."""
        means = self.sums / self.counts.clamp_min(1)[:, None]
        return self.counts @ (means - self.mean).square() / self.counts.sum()

    @property
    def within(self) -> Tensor:
        """The variance in a class, unbiased."""
        count, freedom = self.counts.sum(), (self.counts - 1).clamp_min(0).sum()
        return (self.var - self.between).clamp_min(0) * count / freedom.clamp_min(1)


class DisentanglingLoss:
    """L1 on a batch, with what it needs besides the module: the classifier c and CLUB's q."""

    def __init__(self, module: Disentangler, moments: ClassMoments, weights: Weights, lr: float) -> None:
        self.module, self.weights = module, weights
        device, channels = module.scale.device, len(moments.mean)
        inverse = torch.where(moments.var > 0, moments.var.rsqrt(), 0.0)
        self.mean, self.inverse_std = moments.mean.float().to(device), inverse.float().to(device)
        self.within = max(float((moments.within * inverse.square()).sum()), MINIMUM)
        self.between = max(float((moments.between * inverse.square()).sum()), self.within * LEAST_LABEL)
        self.label_in_n = self.between / 4  # at the start, where N = F / 2
        self.classifier = nn.Linear(channels, moments.classes)
        self.classifier.to(device)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.conditional = Conditional(channels).to(device)
        # A step of Adam moves every weight by its rate, and an output by the sum over channels: these are rates at
        # which outputs move alike at every width. A gate has a channel of its own.
        matrices = [p for p in module.parameters() if p.dim() > 1]
        vectors = [p for p in module.parameters() if p.dim() == 1]
        groups = [
            {"params": vectors, "lr": lr if isinstance(module, Mask) else lr / 10},
            {"params": list(self.classifier.parameters()), "lr": lr / math.sqrt(channels)},
        ]
        self.optimizer = torch.optim.Adam([*groups, *([{"params": matrices, "lr": lr / channels}] if matrices else [])])

    def logits(self, p: Tensor) -> Tensor:
        """The classifier, of pooled P over ``scale``."""
        return self.classifier((p - self.mean) * self.inverse_std)

    def terms(self, features: Tensor, labels: Tensor, mask: Tensor | None, fit: bool = False) -> dict[str, Tensor]:
        """Every term, unweighted, and their total; ``fit`` takes q's step before q is asked."""
        scale, weights = self.module.scale, self.weights
        p, n = self.module(features, mask)
        residual = as_positions((p + n - features) / scale)[valid_positions(as_positions(features), mask)]
        p, n = pooled(p, mask) / scale, pooled(n, mask) / scale
        # Pools of any sign could part by a constant, P = F + c and N = -c, which says nothing.
        seen = (p, n) if self.module.non_negative else (p - p.mean(dim=0), n - n.mean(dim=0))
        # In units of F's deviation, not their own: by those a gate would cancel, however little it lets through.
        given, other = ((x - x.mean(dim=0)) * self.inverse_std for x in (p, n))
        if fit:
            self.conditional.fit(given.detach(), other.detach())
        terms = {
            "classification": nn.functional.cross_entropy(self.logits(p), labels),
            "reconstruction": residual.square().mean(),
            "mmd2": mmd2(*seen),
            "information": self.conditional.information(given, other),
            "bottleneck": self.bottleneck(given, other, labels, fit),
        }
        total = terms["classification"] + weights.reconstruction * terms["reconstruction"]
        total = total - weights.mmd * terms["mmd2"] + weights.information * terms["information"]
        return {**terms, "total": total + weights.bottleneck * terms["bottleneck"]}

    def bottleneck(self, p: Tensor, n: Tensor, labels: Tensor, fit: bool = False) -> Tensor:
        r"""How much of what is not the label P has, and how much of the label N has.

        .. math::
            B = \frac{\mathrm{E}\,\mathrm{Var}(P \mid y)}{\mathrm{E}\,\mathrm{Var}(F \mid y)}
              + \frac{\mathrm{Var}\,\mathrm{E}(N \mid y)}{\mathrm{Var}\,\mathrm{E}(F \mid y)}

        1 for P = F and for P = 0, 1/2 for F / 2, 0 where P has nothing but the label and N nothing of it. A mask that
        minimises it opens a gate by the channel's part in all that tells the label, against that in all that does not.
        """
        (excess, _), (_, lost) = class_variances(p, labels), class_variances(n, labels)
        if fit:
            self.label_in_n += 0.1 * (float(lost.detach()) - self.label_in_n)
        # Below 0 on average, there is no label left in N: to go on would be to fit the estimate. To cut every batch's
        # at 0 would not do, since the chance that is left would count as label.
        return excess / self.within + (lost if self.label_in_n > 0 else lost * 0.0) / self.between

    def step(self, batch: Batch) -> dict[str, float]:
        """One step for q, then one for the module and the classifier."""
        terms = self.terms(*batch, fit=True)
        self.optimizer.zero_grad()
        terms["total"].backward()
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in terms.items()}
