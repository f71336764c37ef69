r"""The loss of TRED's first stage, which extracts the target-relevant part of a frozen source model's features.

Features F are split into P, the target-relevant part, and N, the remainder, by minimising

.. math::
    L_1 = \mathrm{CE}(c(\bar P), y) + \lambda_r \overline{(P + N - F)^2} - \lambda_m \mathrm{MMD}^2(\bar P, \bar N)
        + \lambda_i I(\bar P; \bar N) + \lambda_b B

where bars are means over positions. The first four terms are the paper's, as far as it specifies them. P = F, N = 0 is
an optimum of these four: none of them removes from P what is unrelated to the label. The bottleneck B
(:meth:`DisentanglingLoss.bottleneck`) and the scaling of all terms are ours.

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
MINIMUM = 1e-12  # lower bound of divisors, since features may be constant
# Share of the within-class variance. If the label explains less, a batch's estimate is noise, and dividing by so small
# a value would amplify it until it dominated the loss.
LEAST_LABEL = 1 / 32


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of L1 other than cross-entropy. ``bottleneck=0`` leaves only the paper's terms."""

    reconstruction: float = 10.0
    mmd: float = 0.1
    information: float = 0.1
    bottleneck: float = 1.0


class Conditional(nn.Module):
    """CLUB's Gaussian q(n | p): one MLP for the mean and one, with tanh output, for the log-variance."""

    def __init__(self, channels: int, hidden: int = 128, lr: float = 5e-3) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.log_var = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Tanh())
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr, fused=True)

    def forward(self, p: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(p), self.log_var(p)

    def information(self, p: Tensor, n: Tensor) -> Tensor:
        """The bound in nats per channel, so that its weight means the same at every width."""
        mean, log_var = self(p)
        return club_upper_bound(mean, log_var, n) / p.shape[1]

    def fit(self, p: Tensor, n: Tensor) -> None:
        """Take one maximum-likelihood step."""
        mean, log_var = self(p)
        self.optimizer.zero_grad()
        (-gaussian_log_likelihood(mean, log_var, n) / p.shape[1]).backward()
        self.optimizer.step()


def class_variances(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Within-class and between-class variance of (B, C), summed over channels.

    The first is the mean of half the squared distance over all pairs within a class, the second the same over all
    pairs, minus the first. Both are unbiased even with few samples per class, so the second may be negative. Both are
    0 if no class has two samples, or if there is only one class.
    """
    alike = (labels[:, None] == labels).to(values)
    sizes = alike.sum(dim=1)
    if bool((sizes == 1).all()) or bool((sizes == len(sizes)).all()):
        return values.sum() * 0.0, values.sum() * 0.0
    # Over n samples, n times the squared distances to their mean sum to half the squared distances of ordered pairs.
    squares = (values - alike @ values / sizes[:, None]).square().sum(dim=1)
    within = sizes @ squares / (sizes - 1).sum()
    return within, values.var(dim=0).sum() - within


class ClassMoments:
    """Moments of pooled features by class, in float64 on the CPU."""

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
        return torch.where(var > MINIMUM * mean_square, var, 0.0)  # anything smaller is rounding error

    @property
    def between(self) -> Tensor:
        """Variance of the class means."""
        means = self.sums / self.counts.clamp_min(1)[:, None]
        return self.counts @ (means - self.mean).square() / self.counts.sum()

    @property
    def within(self) -> Tensor:
        """Unbiased within-class variance."""
        count, freedom = self.counts.sum(), (self.counts - 1).clamp_min(0).sum()
        return (self.var - self.between).clamp_min(0) * count / freedom.clamp_min(1)


class DisentanglingLoss:
    """L1 on a batch, with the auxiliary networks it trains: the classifier c and CLUB's q."""

    def __init__(self, module: Disentangler, moments: ClassMoments, weights: Weights, lr: float) -> None:
        self.module, self.weights = module, weights
        device, channels = module.scale.device, len(moments.mean)
        inverse = torch.where(moments.var > 0, moments.var.rsqrt(), 0.0)
        self.mean, self.inverse_std = moments.mean.float().to(device), inverse.float().to(device)
        self.within = max(float((moments.within * inverse.square()).sum()), MINIMUM)
        self.between = max(float((moments.between * inverse.square()).sum()), self.within * LEAST_LABEL)
        self.label_in_n = self.between / 4  # initially N = F / 2
        self.classifier = nn.Linear(channels, moments.classes)
        self.classifier.to(device)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.conditional = Conditional(channels).to(device)
        # An Adam step moves every weight by its learning rate, and an output by the sum over channels: these rates
        # make outputs move equally at every width. A gate affects a single channel.
        matrices = [p for p in module.parameters() if p.dim() > 1]
        vectors = [p for p in module.parameters() if p.dim() == 1]
        groups = [
            {"params": vectors, "lr": lr if isinstance(module, Mask) else lr / 10},
            {"params": list(self.classifier.parameters()), "lr": lr / math.sqrt(channels)},
        ]
        groups += [{"params": matrices, "lr": lr / channels}] if matrices else []
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def logits(self, p: Tensor) -> Tensor:
        """The classifier's logits for P, pooled and divided by ``scale``."""
        return self.classifier((p - self.mean) * self.inverse_std)

    def terms(self, features: Tensor, labels: Tensor, mask: Tensor | None, fit: bool = False) -> dict[str, Tensor]:
        """Every unweighted term and the weighted total; ``fit`` updates q before evaluating it."""
        scale, weights = self.module.scale, self.weights
        p, n = self.module(features, mask)
        residual = as_positions((p + n - features) / scale)[valid_positions(as_positions(features), mask)]
        p, n = pooled(p, mask) / scale, pooled(n, mask) / scale
        # Signed pools could differ by a mere constant, P = F + c and N = -c, which is uninformative.
        seen = (p, n) if self.module.non_negative else (p - p.mean(dim=0), n - n.mean(dim=0))
        # In units of F's standard deviation, not their own: that would cancel a gate, however little it passes.
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
        total = terms["classification"]
        for name, weight in {
            "reconstruction": weights.reconstruction,
            "mmd2": -weights.mmd,
            "information": weights.information,
            "bottleneck": weights.bottleneck,
        }.items():
            if weight:  # the gradient of the others is not computed
                total = total + weight * terms[name]
        return {**terms, "total": total}

    def bottleneck(self, p: Tensor, n: Tensor, labels: Tensor, fit: bool = False) -> Tensor:
        r"""Label-unrelated variance left in P, plus label-related variance left in N.

        .. math::
            B = \frac{\mathrm{E}\,\mathrm{Var}(P \mid y)}{\mathrm{E}\,\mathrm{Var}(F \mid y)}
              + \frac{\mathrm{Var}\,\mathrm{E}(N \mid y)}{\mathrm{Var}\,\mathrm{E}(F \mid y)}

        1 for P = F and for P = 0, 1/2 for F / 2, and 0 if P contains only the label and N nothing of it. A mask that
        minimises it opens each gate by the channel's share of label-related against label-unrelated variance.
        """
        (excess, _), (_, lost) = class_variances(p, labels), class_variances(n, labels)
        if fit:
            self.label_in_n += 0.1 * (float(lost.detach()) - self.label_in_n)
        # Once negative on average, N contains no label information, and minimising further would fit the estimator's
        # noise. Clamping every batch at 0 would not help: the remaining noise would count as label information.
        return excess / self.within + (lost if self.label_in_n > 0 else lost * 0.0) / self.between

    def step(self, batch: Batch) -> dict[str, float]:
        """Take one step for q, then one for the module and the classifier."""
        terms = self.terms(*batch, fit=True)
        self.optimizer.zero_grad()
        terms["total"].backward()
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in terms.items()}
