"""Distances of distributions against independent float64 references and known values."""

import math

import pytest
import torch

from hf_ft.functional import club_upper_bound, gaussian_bandwidths, gaussian_log_likelihood, mmd2


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draws(count, n1, n2, d, seed=0, shift=0.0):
    joined = draw(count, n1 + n2, d, seed=seed)
    return [(x, y + shift) for x, y in zip(joined[:, :n1], joined[:, n1:], strict=True)]


def squared(a, b):
    return sum((u - v) ** 2 for u, v in zip(a, b, strict=True))


def reference_bandwidths(x, y, eps=1e-6):
    z = x.tolist() + y.tolist()
    pairs = [squared(z[a], z[b]) for a in range(len(z)) for b in range(len(z)) if a != b]
    return [max(eps, sum(pairs) / len(pairs)) * 2 ** (i - 2) for i in range(5)]


def reference_mmd2(x, y, unbiased, bandwidths):
    def mean(one, other, skip):
        total, count = 0.0, 0
        for a, u in enumerate(one):
            for b, v in enumerate(other):
                if not (skip and a == b):
                    total, count = total + sum(math.exp(-squared(u, v) / w) for w in bandwidths), count + 1
        return total / count

    x, y = x.tolist(), y.tolist()
    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


def log_density(mean, log_var, sample):
    total = 0.0
    for m, v, s in zip(mean, log_var, sample, strict=True):
        total += math.log(math.exp(-((s - m) ** 2) / (2 * math.exp(v))) / math.sqrt(2 * math.pi * math.exp(v)))
    return total


def reference_club(mean, log_var, samples):
    mean, log_var, samples = mean.tolist(), log_var.tolist(), samples.tolist()
    count = len(mean)
    matched = sum(log_density(mean[i], log_var[i], samples[i]) for i in range(count)) / count
    crossed = sum(log_density(mean[i], log_var[i], samples[j]) for i in range(count) for j in range(count))
    return matched - crossed / count**2


@pytest.mark.parametrize("shape", [(6, 6, 3), (5, 8, 1), (2, 7, 4)], ids=str)
def test_mmd2_against_double_loops(shape):
    ((x, y),) = draws(1, *shape, shift=0.7)
    expected = reference_bandwidths(x, y)
    widths = gaussian_bandwidths(x, y)
    assert widths.dtype == torch.float64 and widths.tolist() == pytest.approx(expected, rel=1e-12)
    for unbiased in (False, True):
        value = reference_mmd2(x, y, unbiased, expected)
        assert float(mmd2(x, y, unbiased=unbiased)) == pytest.approx(value, rel=1e-11)
        assert float(mmd2(x.float(), y.float(), unbiased=unbiased)) == pytest.approx(value, rel=1e-4)
        other = torch.tensor([0.3, 2.0], dtype=torch.float64)
        value = reference_mmd2(x, y, unbiased, other.tolist())
        assert float(mmd2(x, y, unbiased=unbiased, bandwidths=other)) == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("d", [1, 3])
def test_mmd2_gradient(unbiased, d):
    ((x, y),) = draws(1, 4, 5, d, shift=0.5)
    x, y = x.requires_grad_(), y.requires_grad_()
    widths = gaussian_bandwidths(x, y)
    assert not widths.requires_grad
    assert torch.autograd.gradcheck(lambda a, b: mmd2(a, b, unbiased=unbiased, bandwidths=widths), [x, y])
    given = torch.autograd.grad(mmd2(x, y, unbiased=unbiased, bandwidths=widths), [x, y])
    torch.testing.assert_close(torch.autograd.grad(mmd2(x, y, unbiased=unbiased), [x, y]), given, rtol=0, atol=0)


def test_unbiased_mmd2_is_zero_on_average():
    """The biased one is positive on the same draws, because of the pairs of each sample with itself."""
    pairs = draws(600, 8, 12, 2)
    values = torch.stack([mmd2(x, y, unbiased=True) for x, y in pairs])
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean())) < 3 * error and float(values.min()) < 0
    assert float(torch.stack([mmd2(x, y) for x, y in pairs]).mean()) > 10 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3), (17, 1), (33, 5)], ids=str)
def test_biased_mmd2_of_a_set_with_itself_is_exactly_zero(dtype, shape):
    x = 10 * draw(*shape, dtype=dtype)
    assert float(mmd2(x, x)) == 0.0 and float(mmd2(x, x.clone())) == 0.0


def test_the_gradient_between_equal_sets_is_exactly_zero():
    """As at the start of a mask, at one half: Adam would make full steps from rounding errors."""
    features, gates = torch.rand(8, 16), torch.full((16,), 0.5, requires_grad=True)
    mmd2(features * gates, features * (1 - gates)).backward()
    assert torch.equal(gates.grad, torch.zeros(16))


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("d", [1, 4])
def test_mmd2_grows_with_a_mean_shift(unbiased, d):
    means = [
        float(torch.stack([mmd2(x, y, unbiased=unbiased) for x, y in draws(20, 30, 25, d, shift=shift)]).mean())
        for shift in (0.0, 0.5, 1.0, 2.0)
    ]
    assert all(a < b for a, b in zip(means, means[1:], strict=False))


@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd2_is_at_most_ten(unbiased):
    for shift in (0.0, 10.0, 1e4):
        assert all(float(mmd2(x, y, unbiased=unbiased)) <= 10 for x, y in draws(5, 6, 4, 3, shift=shift))
    apart = torch.zeros(3, 2), torch.full((3, 2), 9.0)
    assert float(mmd2(*apart, unbiased=unbiased, bandwidths=torch.full((5,), 1e-3))) == 10.0
    assert 0 < float(mmd2(*apart, unbiased=unbiased)) < 10


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("d", [1, 3])
def test_mmd2_of_equal_rows(unbiased, d):
    x, y = torch.full((3, d), 0.3).requires_grad_(), torch.full((4, d), 0.3).requires_grad_()
    value = mmd2(x, y, unbiased=unbiased)
    value.backward()
    assert value.item() == 0.0 and bool((x.grad == 0).all()) and bool((y.grad == 0).all())
    assert gaussian_bandwidths(x, y, eps=0.5).tolist() == [0.125, 0.25, 0.5, 1.0, 2.0]


def test_mmd2_far_from_the_origin_is_the_same():
    """Distances by a matrix product would cancel here; multiples of 1/8 lose no digit with this offset."""
    x, y = ((8 * draw(20, 4, seed=seed, dtype=torch.float32)).round() / 8 for seed in range(2))
    assert float(mmd2(x + 4096, y + 4096)) == float(mmd2(x, y))


def test_mmd2_misfits():
    with pytest.raises(ValueError, match=r"not \(3, 2\) and \(3, 4\)"):
        mmd2(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"not \(3,\) and \(3,\)"):
        mmd2(torch.zeros(3), torch.zeros(3))
    for sizes in ((1, 3), (3, 1)):
        with pytest.raises(ValueError, match=f"2 samples on each side.*not {sizes[0]} and {sizes[1]}"):
            mmd2(torch.zeros(sizes[0], 2), torch.zeros(sizes[1], 2), unbiased=True)
        assert float(mmd2(torch.zeros(sizes[0], 2), torch.zeros(sizes[1], 2))) == 0.0
    with pytest.raises(ValueError, match="not 0 and 3"):
        mmd2(torch.zeros(0, 2), torch.zeros(3, 2))


def test_gaussian_log_likelihood():
    mean, log_var, samples = draw(5, 3), draw(5, 3, seed=1), draw(5, 3, seed=2)
    value = float(gaussian_log_likelihood(mean, log_var, samples))
    normal = torch.distributions.Normal(mean, log_var.exp().sqrt())
    assert value == pytest.approx(float(normal.log_prob(samples).sum(dim=1).mean()), rel=1e-13)
    rows = zip(mean.tolist(), log_var.tolist(), samples.tolist(), strict=True)
    assert value == pytest.approx(sum(log_density(*row) for row in rows) / 5, rel=1e-13)


@pytest.mark.parametrize("shape", [(6, 3), (4, 1), (1, 2)], ids=str)
def test_club_against_a_table_of_log_densities(shape):
    """The reference includes the log-variances in both sums; they differ between samples, but cancel."""
    mean, log_var, samples = draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2)
    value = float(club_upper_bound(mean, log_var, samples))
    assert value == pytest.approx(reference_club(mean, log_var, samples), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("function", [gaussian_log_likelihood, club_upper_bound])
def test_gradients_of_gaussian_functions(function):
    inputs = [draw(5, 3, seed=seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("d", [1, 6])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_club_of_correlated_gaussians(rho, d):
    """With the exact q: rho^2 / (1 - rho^2) per dimension, less the share 1/B of all pairs that are matched."""
    batch, values = 500, []
    for seed in range(100):
        p, noise = draw(2, batch, d, seed=seed)
        n = rho * p + math.sqrt(1 - rho**2) * noise
        values.append(club_upper_bound(rho * p, torch.full_like(p, math.log(1 - rho**2)), n))
    values = torch.stack(values)
    error = float(values.std()) / math.sqrt(len(values))
    expected = d * rho**2 / (1 - rho**2) * (1 - 1 / batch)
    assert error < 0.02 * max(expected, 1e-9)
    assert float(values.mean()) == pytest.approx(expected, abs=max(3 * error, 1e-12))
