"""The relationship of source and target classes against independent float64 references."""

import math
import re

import numpy
import pytest
import torch
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from hf_ft.errors import OptionError
from hf_ft.strategies.co_tuning import relationship as category_relationship
from hf_ft.strategies.co_tuning.relationship import (
    direct_relationship,
    fit_temperature,
    relationship_loss,
    reverse_relationship,
)

RELATIONSHIPS = [direct_relationship, reverse_relationship]


def samples(per_class=10, classes=3, source=5, signal=1.5, seed=0):
    """Noise, and the logit of source class (2 t + 1) mod source raised by ``signal`` for target class t."""
    labels = torch.arange(classes).repeat(per_class)
    logits = torch.randn(len(labels), source, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[torch.arange(len(labels)), (2 * labels + 1) % source] += signal
    return logits, labels


def softmax(row):
    exponentials = [math.exp(z - max(row)) for z in row]
    return [e / sum(exponentials) for e in exponentials]


def cross_entropy(logits, labels):
    return sum(-math.log(softmax(z)[y]) for z, y in zip(logits, labels, strict=True)) / len(labels)


def reference_temperature(logits, labels):
    """The temperature at which the derivative in 1 / T, the mean of E[z] - z_y, is zero, by bisection."""

    def slope(beta):
        total = 0.0
        for z, y in zip(logits, labels, strict=True):
            total += sum(p * v for p, v in zip(softmax([beta * v for v in z]), z, strict=True)) - z[y]
        return total

    low, high = 1 / 20, 1 / 0.05
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / low


def reference_direct(logits, labels, classes, temperature=1.0):
    rows = []
    for target in range(classes):
        own = [softmax([v / temperature for v in z]) for z, y in zip(logits, labels, strict=True) if y == target]
        rows.append([sum(p[s] for p in own) / len(own) for s in range(len(logits[0]))])
    return torch.tensor(rows, dtype=torch.float64)


def reference_regression(features, labels, classes, strength):
    """Softmax regression with a row of weights per class, even for two, and no intercept, like the authors'."""
    features, hot = numpy.asarray(features), numpy.eye(classes)[labels]

    def objective(flat):
        weights = flat.reshape(classes, -1)
        logits = features @ weights.T
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))
        error = strength * (numpy.exp(log_p) - hot)
        gradient = error.T @ features + weights
        return -strength * (hot * log_p).sum() + (weights**2).sum() / 2, gradient.ravel()

    start = numpy.zeros(classes * features.shape[1])
    limits = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-16, "gtol": 1e-9}
    rows = minimize(objective, start, jac=True, method="L-BFGS-B", options=limits).x.reshape(classes, -1)
    return lambda x: (numpy.asarray(x) @ rows.T).tolist()


def reference_reverse(logits, labels, classes, temperature=1.0, folds=5, seed=0, groups=None):
    groups = range(len(labels)) if groups is None else groups
    order = sorted(range(len(labels)), key=lambda n: (labels[n], numpy.array(logits[n]).tobytes()))
    labels, groups = [labels[n] for n in order], [groups[n] for n in order]
    features = [softmax([v / temperature for v in logits[n]]) for n in order]
    folds = min(folds, *(len({g for g, y in zip(groups, labels, strict=True) if y == t}) for t in range(classes)))
    strength, calibration = 1.0, 1.0
    if folds > 1:
        alone = len({*groups}) == len(labels)
        kind = StratifiedKFold if alone else StratifiedGroupKFold
        splits = kind(folds, shuffle=True, random_state=seed).split(features, labels, None if alone else groups)
        splits = [(train, test) for train, test in splits if len({labels[i] for i in train}) == classes]
        tested = [i for _, test in splits for i in test]
        found = []
        for power in range(-2, 5):
            held_out = [None] * len(labels)
            for train, test in splits:
                g = reference_regression([features[i] for i in train], [labels[i] for i in train], classes, 10.0**power)
                for i in test:
                    held_out[i] = g(features[i])
            kept = [held_out[i] for i in tested], [labels[i] for i in tested]
            found.append((cross_entropy(*kept), 10.0**power, kept))
        _, strength, kept = min(found)
        calibration = reference_temperature(*kept)
    g = reference_regression(features, labels, classes, strength)
    sources = range(len(features[0]))
    marginal = [sum(p[s] for p in features) / len(features) for s in sources]
    given = [softmax([v / calibration for v in g([float(s == i) for i in sources])]) for s in sources]
    rows = []
    for t in range(classes):
        joint = [given[s][t] * marginal[s] for s in sources]
        rows.append([p / sum(joint) for p in joint])
    return torch.tensor(rows, dtype=torch.float64)


# --- temperature ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_temperature_against_bisection(scale):
    logits, _ = samples(signal=0.0)
    labels = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(2)).flatten()
    expected = reference_temperature((scale * logits).tolist(), labels.tolist())
    assert 0.05 < expected < 20 and fit_temperature(scale * logits, labels) == pytest.approx(expected, rel=1e-5)


def test_over_confident_logits_need_a_temperature_higher_by_their_scale():
    logits, _ = samples(per_class=200, signal=0.0)
    labels = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(1)).flatten()
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(1, abs=0.15)  # the labels are drawn from the logits' own distribution
    assert fit_temperature(5 * logits, labels) == pytest.approx(5 * fitted, rel=1e-5)
    assert fit_temperature((5 * logits).float(), labels) == pytest.approx(5 * fitted, rel=1e-5)


def test_temperature_stays_within_its_bounds():
    logits = torch.eye(3, dtype=torch.float64)
    assert fit_temperature(logits, torch.arange(3)) == pytest.approx(0.05, rel=1e-3)
    assert fit_temperature(logits, torch.tensor([1, 2, 0])) == pytest.approx(20, rel=1e-3)
    assert 0.05 <= fit_temperature(torch.zeros(3, 3), torch.arange(3)) <= 20  # any temperature is equally good


# --- relationships --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_direct_against_loops(temperature):
    logits, labels = samples()
    expected = reference_direct(logits.tolist(), labels.tolist(), 3, temperature)
    torch.testing.assert_close(direct_relationship(logits, labels, 3, temperature), expected.float())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("case", [{}, {"temperature": 0.5}, {"folds": 2, "seed": 7}], ids=str)
def test_reverse_against_loops(classes, case):
    logits, labels = samples(per_class=8, classes=classes)
    expected = reference_reverse(logits.tolist(), labels.tolist(), classes, **case)
    found = reverse_relationship(logits, labels, classes, **case)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("groups", [[n % 6 for n in range(24)], [n % 8 // 4 * 3 + n // 8 for n in range(24)]], ids=str)
def test_reverse_holds_out_whole_groups(groups):
    """In the second case, each class has two groups of its own."""
    logits, labels = samples(per_class=8, signal=0.5)
    groups = numpy.array(groups)
    for seed in range(3):
        expected = reference_reverse(logits.tolist(), labels.tolist(), 3, groups=groups.tolist(), seed=seed)
        found = reverse_relationship(logits, labels, 3, groups=groups, seed=seed)
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-5)
        assert not torch.allclose(found, reverse_relationship(logits, labels, 3, seed=seed), rtol=1e-3, atol=1e-5)


def test_reverse_with_a_single_group_of_a_class_is_not_cross_validated():
    logits, labels = samples(per_class=8)
    groups = numpy.where(labels == 0, -1, numpy.arange(24))
    expected = reference_reverse(logits.tolist(), labels.tolist(), 3, groups=groups.tolist())
    found = reverse_relationship(logits, labels, 3, groups=groups)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_reverse_with_a_single_sample_of_a_class_is_not_cross_validated(classes):
    logits, labels = samples(per_class=6, classes=classes)
    kept = torch.cat(((labels > 0).nonzero().flatten(), torch.tensor([0])))
    logits, labels = logits[kept], labels[kept]
    expected = reference_reverse(logits.tolist(), labels.tolist(), classes)
    torch.testing.assert_close(reverse_relationship(logits, labels, classes), expected.float(), rtol=1e-4, atol=1e-6)


def test_folds_are_lowered_to_the_smallest_class():
    logits, labels = samples(per_class=8)
    kept = torch.cat(((labels > 0).nonzero().flatten(), (labels == 0).nonzero().flatten()[:3]))
    logits, labels = logits[kept], labels[kept]
    assert torch.equal(
        reverse_relationship(logits, labels, 3, folds=5), reverse_relationship(logits, labels, 3, folds=3)
    )
    expected = reference_reverse(logits.tolist(), labels.tolist(), 3)
    torch.testing.assert_close(reverse_relationship(logits, labels, 3), expected.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_regression_is_a_stationary_point_of_the_penalised_softmax_likelihood(classes):
    """For two classes too, where scikit-learn fits one row with a penalty twice as high."""
    logits, labels = samples(classes=classes)
    features, strength = logits.softmax(1), 3.0
    regression = category_relationship._regression().set_params(C=category_relationship._sklearn_c(strength, classes))
    regression.fit(features.numpy(), labels.numpy())
    assert not regression.intercept_.any()
    coefficients = torch.from_numpy(regression.coef_)
    if classes == 2:
        coefficients = torch.cat((-coefficients / 2, coefficients / 2))
    coefficients.requires_grad_()
    scores = features @ coefficients.T
    torch.testing.assert_close(category_relationship._logits(regression, features.numpy()), scores.detach())
    loss = strength * torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
    (loss + coefficients.square().sum() / 2).backward()
    assert float(coefficients.grad.abs().max()) < 1e-3 < float(coefficients.detach().abs().max())


@pytest.mark.parametrize("relationship", RELATIONSHIPS)
@pytest.mark.parametrize("classes", [2, 4])
def test_a_planted_relationship_is_recovered(relationship, classes):
    logits, labels = samples(per_class=20, classes=classes, source=12, signal=6.0)
    rows = relationship(logits, labels, classes)
    assert rows.shape == (classes, 12) and rows.dtype == torch.float32
    assert rows.argmax(dim=1).tolist() == [2 * t + 1 for t in range(classes)]
    assert float(rows.max(dim=1).values.min()) > 0.8


def test_reverse_separates_classes_further_if_it_has_the_samples():
    """Source class 0 is predicted equally for all target classes: it keeps its marginal; informative ones grow."""
    logits, labels = samples(per_class=1000, source=7, signal=2.0)
    logits[:, 0] += 1.0
    direct, reverse = direct_relationship(logits, labels, 3), reverse_relationship(logits, labels, 3)
    assert float((reverse[:, 0] - logits.softmax(1).mean(0)[0]).abs().max()) < 0.06
    telling = [1, 3, 5]
    assert bool((reverse[:, telling].diagonal() > direct[:, telling].diagonal() + 0.1).all())


@pytest.mark.parametrize("relationship", RELATIONSHIPS)
def test_an_uninformative_source_head_gives_the_marginal(relationship):
    _, labels = samples()
    torch.testing.assert_close(relationship(torch.zeros(30, 5), labels, 3), torch.full((3, 5), 0.2))
    same = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0]).expand(30, 5)
    torch.testing.assert_close(relationship(same, labels, 3), same[:3].softmax(1), rtol=1e-4, atol=1e-6)
    noise, labels = samples(per_class=200, signal=0.0)
    marginal = noise.softmax(1).mean(0).float()
    torch.testing.assert_close(relationship(noise, labels, 3), marginal.expand(3, 5), rtol=0, atol=0.05)


@pytest.mark.slow
def test_the_order_of_the_samples_does_not_matter():
    logits, labels = samples(per_class=12)
    logits[3] = logits[0]  # of one class, and
    logits[1] = logits[0]  # of another
    for seed in range(3):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        one, other = direct_relationship(logits, labels, 3), direct_relationship(logits[order], labels[order], 3)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        one, other = reverse_relationship(logits, labels, 3), reverse_relationship(logits[order], labels[order], 3)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("relationship", RELATIONSHIPS)
def test_one_target_class_and_one_source_class(relationship):
    logits, labels = samples(classes=2)
    marginal = logits.softmax(1).mean(0, keepdim=True).float()
    torch.testing.assert_close(relationship(logits, labels * 0, 1), marginal)
    assert relationship(logits[:, :1], labels, 2).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("relationship", RELATIONSHIPS)
def test_extreme_and_half_precision_logits(relationship):
    logits, labels = samples()
    for given in (1e4 * logits, logits.bfloat16(), logits.half().requires_grad_(), logits * 1e-4):
        rows = relationship(given, labels, 3)
        assert rows.dtype == torch.float32 and not rows.requires_grad and bool((rows >= 0).all())
        torch.testing.assert_close(rows.double().sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("relationship", RELATIONSHIPS)
def test_fewer_samples_than_source_classes(relationship):
    """With as many classes as ImageNet: every row is a distribution, led by the planted class."""
    logits, labels = samples(per_class=50, classes=10, source=1000, signal=8.0)
    rows = relationship(logits, labels, 10)
    torch.testing.assert_close(rows.sum(1), torch.ones(10), rtol=0, atol=1e-6)
    assert rows.argmax(dim=1).tolist() == [2 * t + 1 for t in range(10)]


# --- loss -----------------------------------------------------------------------------------------------------


def test_loss_against_loops_and_its_gradient():
    logits, labels = samples(per_class=2)
    targets = direct_relationship(logits, labels, 3)[labels]
    expected = 0.0
    for z, q in zip(logits.tolist(), targets.tolist(), strict=True):
        expected -= sum(a * math.log(b) for a, b in zip(q, softmax(z), strict=True)) / len(labels)
    assert relationship_loss(logits, targets).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: relationship_loss(z, targets), logits.requires_grad_())


def test_loss_of_half_precision_logits_is_computed_in_float32():
    logits, labels = samples(per_class=2)
    targets, half = direct_relationship(logits, labels, 3)[labels], logits.bfloat16().requires_grad_()
    value = relationship_loss(half, targets)
    value.backward()
    assert value.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(relationship_loss(half.double(), targets).item(), rel=1e-6)


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [fit_temperature, lambda z, y: direct_relationship(z, y, 3), lambda z, y: reverse_relationship(z, y, 3)],
    ids=["temperature", "direct", "reverse"],
)
def test_bad_samples(call):
    logits, labels = samples(source=3)
    for bad in (-100, -1, 3):
        wrong = labels.clone()
        wrong[4] = bad
        with pytest.raises(OptionError, match=re.escape(f"label {bad} lies outside [0, 3)")):
            call(logits, wrong)
    for bad in (math.nan, math.inf, -math.inf):
        wrong = logits.clone()
        wrong[7, 1] = bad
        with pytest.raises(OptionError, match="logits of sample 7 are not finite"):
            call(wrong, labels)
    with pytest.raises(OptionError, match=re.escape("logits (0, 3) are empty")):
        call(logits[:0], labels[:0])
    for one, other in ((logits, labels[:-1]), (logits[0], labels[0]), (logits, labels.double()), (logits, logits)):
        with pytest.raises(OptionError, match="do not match: expected"):
            call(one, other)


@pytest.mark.parametrize("relationship", RELATIONSHIPS)
def test_bad_options(relationship):
    logits, labels = samples()
    with pytest.raises(OptionError, match=r"no samples of target class 3, 4 \(classes=5\): add some"):
        relationship(logits, labels, 5)
    with pytest.raises(OptionError, match=r"no samples of target class 3, 4, 5, 6, 7, \.\.\. \(classes="):
        relationship(logits, labels, 50)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(OptionError, match=f"temperature={bad} must be a positive number"):
            relationship(logits, labels, 3, bad)


def test_bad_folds_and_misfits():
    logits, labels = samples()
    with pytest.raises(OptionError, match="folds=1 leaves nothing to hold out"):
        reverse_relationship(logits, labels, 3, folds=1)
    for targets in (torch.zeros(30, 4), torch.zeros(30), labels):
        with pytest.raises(ValueError, match="index the relationship by the labels"):
            relationship_loss(logits, targets)
