"""Functions of tensors against independent float64 references."""

import math
import re

import numpy
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

from hf_ft.functional import (
    as_positions,
    attention_distance,
    attention_map,
    batch_spectral_shrinkage,
    calibrated_log_loss,
    feature_distance,
    l2_sp,
    pooled,
)


def tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((3, 4), (5,), (), (2, 1, 3))]


def reference(weights, starts):
    total = 0.0
    for weight, start in zip(weights, starts, strict=True):
        for a, b in zip(weight.reshape(-1).tolist(), start.reshape(-1).tolist(), strict=True):
            total += 0.5 * (a - b) ** 2
    return total


def test_l2_sp_is_half_the_squared_distance():
    weights, starts = tensors(0), tensors(1)
    assert float(l2_sp(weights, starts)) == pytest.approx(reference(weights, starts), rel=1e-14)
    assert float(l2_sp(weights)) == pytest.approx(reference(weights, [w * 0 for w in weights]), rel=1e-14)
    single = [w.float() for w in weights], [s.float() for s in starts]
    assert float(l2_sp(*single)) == pytest.approx(reference(*single), rel=1e-6)


def test_l2_sp_gradient():
    weights, starts = [w.requires_grad_() for w in tensors(0)], tensors(1)
    assert torch.autograd.gradcheck(lambda *w: l2_sp(w, starts), weights)
    (3 * l2_sp(weights, starts)).backward()
    for weight, start in zip(weights, starts, strict=True):
        torch.testing.assert_close(weight.grad, 3 * (weight - start).detach(), rtol=1e-14, atol=0)


def test_l2_sp_at_the_start_is_exactly_zero_with_a_finite_gradient():
    weights = [w.requires_grad_() for w in tensors(0, torch.float32)]
    value = l2_sp(weights, [w.detach().clone() for w in weights])
    value.backward()
    assert value.item() == 0.0 and all(bool((w.grad == 0).all()) for w in weights)


def test_l2_sp_of_half_precision_weights_is_computed_in_float32():
    """In bfloat16, 256 + 1 is 256: the sum of many small squares would stop growing."""
    weight = torch.full((4096,), 0.125, dtype=torch.bfloat16, requires_grad=True)
    value = l2_sp([weight], [torch.zeros(4096)])
    assert value.dtype == torch.float32 and float(value) == 0.5 * 4096 * 0.125**2
    value.backward()
    assert weight.grad.dtype == torch.bfloat16 and bool((weight.grad == 0.125).all())


def test_l2_sp_of_nothing_and_of_misfits():
    assert float(l2_sp([])) == 0.0
    with pytest.raises(ValueError, match="differ in number or shape"):
        l2_sp([torch.zeros(2)], [torch.zeros(3)])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


RAGGED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def reference_pooled(features, mask):
    rows = []
    for tokens, keep in zip(features.tolist(), mask.tolist(), strict=True):
        own = [t for t, k in zip(tokens, keep, strict=True) if k]
        rows.append([sum(t[c] for t in own) / max(1, len(own)) for c in range(len(tokens[0]))])
    return torch.tensor(rows, dtype=torch.float64)


def reference_attention(features, mask):
    rows = []
    for tokens, keep in zip(features.tolist(), mask.tolist(), strict=True):
        a = [k * sum(v**2 for v in t) / len(t) for t, k in zip(tokens, keep, strict=True)]
        length = math.sqrt(sum(v**2 for v in a))
        rows.append([v / length if length else 0.0 for v in a])
    return torch.tensor(rows, dtype=torch.float64)


def reference_delta(target, source, weights, mask):
    total = 0.0
    for t, s, keep in zip(target.tolist(), source.tolist(), mask.tolist(), strict=True):
        for c, weight in enumerate(weights.tolist()):
            norm = sum((t[p][c] - s[p][c]) ** 2 for p in range(len(t)) if keep[p])
            total += weight * norm / max(1, sum(keep))
    return total / len(target)


def test_positions_of_maps_and_of_tokens():
    maps = draw(2, 3, 4, 5)
    positions = as_positions(maps)
    assert positions.shape == (2, 20, 3) and float(positions[1, 2 * 5 + 3, 2]) == float(maps[1, 2, 2, 3])
    assert as_positions(positions) is positions
    for shape in ((2, 3), (2, 3, 4, 5, 6)):
        with pytest.raises(ValueError, match=re.escape(f"not {shape}")):
            as_positions(torch.zeros(shape))


@pytest.mark.parametrize("mask", [RAGGED, RAGGED.bool(), RAGGED.double(), None], ids=["int", "bool", "float", "none"])
def test_pooled_and_attention_and_feature_distance_against_loops(mask):
    target, source, weights = draw(3, 4, 5), draw(3, 4, 5, seed=1), draw(5, seed=2).abs()
    keep = torch.ones(3, 4, dtype=torch.long) if mask is None else RAGGED
    torch.testing.assert_close(pooled(target, mask), reference_pooled(target, keep), rtol=1e-12, atol=1e-14)
    one, other = reference_attention(target, keep), reference_attention(source, keep)
    torch.testing.assert_close(attention_map(target, mask), one, rtol=1e-12, atol=0)
    squares = sum((a - b) ** 2 for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
    value = float(attention_distance(target, source, mask))
    assert value == pytest.approx(squares / int(keep.sum()), rel=1e-12)
    for w in (None, weights):
        expected = reference_delta(target, source, torch.ones(5) if w is None else w, keep)
        assert float(feature_distance(target, source, w, mask)) == pytest.approx(expected, rel=1e-12)
        total = feature_distance(target, source, w, mask, reduction="sum")
        assert float(total) == pytest.approx(3 * expected, rel=1e-12)


def test_maps_and_equal_tokens_agree():
    target, source, weights = draw(3, 5, 2, 4), draw(3, 5, 2, 4, seed=1), draw(5, seed=2).abs()
    tokens = as_positions(target), as_positions(source)
    torch.testing.assert_close(pooled(target), pooled(tokens[0]))
    torch.testing.assert_close(pooled(target), target.mean(dim=(2, 3)))
    torch.testing.assert_close(attention_map(target), attention_map(tokens[0]))
    torch.testing.assert_close(attention_distance(target, source), attention_distance(*tokens))
    for w in (None, weights):
        torch.testing.assert_close(feature_distance(target, source, w), feature_distance(*tokens, w))


def test_padding_does_not_count():
    target, source = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    long_target = torch.cat([target, 50 * draw(2, 3, 3, seed=2)], dim=1)
    long_source = torch.cat([source, 50 * draw(2, 3, 3, seed=3)], dim=1)
    mask, weights = torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 2), draw(3, seed=4).abs()
    torch.testing.assert_close(pooled(long_target, mask), pooled(target))
    torch.testing.assert_close(attention_map(long_target, mask)[:, :4], attention_map(target))
    assert bool((attention_map(long_target, mask)[:, 4:] == 0).all())
    torch.testing.assert_close(attention_distance(long_target, long_source, mask), attention_distance(target, source))
    for reduction in ("mean", "sum"):
        value = feature_distance(long_target, long_source, weights, mask, reduction)
        torch.testing.assert_close(value, feature_distance(target, source, weights, reduction=reduction))


def test_attention_may_differ_only_in_channels():
    assert float(attention_distance(draw(2, 3, 4, 4), draw(2, 7, 4, 4, seed=1))) > 0
    torch.testing.assert_close(attention_map(draw(2, 3, 4)), attention_map(7 * draw(2, 3, 4)))
    torch.testing.assert_close(attention_map(draw(2, 3, 4)).norm(dim=1), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"target \(2, 16\) and source \(2, 25\)"):
        attention_distance(draw(2, 3, 4, 4), draw(2, 3, 5, 5))


def test_feature_distance_misfits():
    with pytest.raises(ValueError, match=r"target \(2, 3, 4, 4\) and source \(2, 3, 5, 5\)"):
        feature_distance(draw(2, 3, 4, 4), draw(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"channel_weights have shape \(4,\), but features have 3 channels"):
        feature_distance(draw(2, 3, 4, 4), draw(2, 3, 4, 4), torch.ones(4))
    with pytest.raises(ValueError, match=r"channel_weights have shape \(3,\), but features have 4 channels"):
        feature_distance(draw(2, 3, 4), draw(2, 3, 4), torch.ones(3))


@pytest.mark.parametrize("distance", [attention_distance, feature_distance])
@pytest.mark.parametrize("shape", [(3, 5, 2, 2), (3, 4, 5)])
def test_a_distance_from_itself_is_exactly_zero(distance, shape):
    for mask in (None, RAGGED) if len(shape) == 3 else (None,):
        for dtype in (torch.float32, torch.bfloat16):
            source = draw(*shape, dtype=torch.float32).to(dtype)
            target = source.clone().requires_grad_()
            value = distance(target, source, mask=mask)
            value.backward()
            assert value.item() == 0.0 and bool((target.grad == 0).all())


@pytest.mark.parametrize("constant", [0.0, 2.5])
@pytest.mark.parametrize("distance", [attention_distance, feature_distance])
@pytest.mark.parametrize("shape", [(3, 5, 2, 2), (3, 4, 5)])
def test_zero_and_constant_features_have_finite_distances(distance, constant, shape):
    flat, other = torch.full(shape, constant), draw(*shape, dtype=torch.float32)
    for mask in (None, RAGGED) if len(shape) == 3 else (None,):
        for target, source in ((flat, other), (other, flat), (flat, torch.zeros(shape))):
            target = target.clone().requires_grad_()
            value = distance(target, source, mask=mask)
            value.backward()
            assert bool(value.isfinite()) and bool(target.grad.isfinite().all())


def test_gradients_of_feature_functions():
    target, source, weights = draw(3, 4, 5).requires_grad_(), draw(3, 4, 5, seed=1), draw(5, seed=2).abs()
    maps = draw(2, 3, 2, 2).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(as_positions, [maps]) and check(pooled, [maps]) and check(attention_map, [maps])
    for mask in (None, RAGGED[[0, 1, 1]]):
        assert check(lambda t, m=mask: pooled(t, m), [target])
        assert check(lambda t, m=mask: attention_map(t, m), [target])
        assert check(lambda t, m=mask: attention_distance(t, source, m), [target])
        for reduction in ("mean", "sum"):
            assert check(lambda t, m=mask, r=reduction: feature_distance(t, source, weights, m, r), [target])
    assert check(lambda t: feature_distance(t, draw(2, 3, 2, 2, seed=1), weights[:3]), [maps])


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("k", [1, 3, 9])
def test_bss_value_and_gradient(shape, k):
    features = draw(*shape).requires_grad_()
    value = batch_spectral_shrinkage(features, k)
    value.backward()
    u, s, vt = numpy.linalg.svd(features.detach().numpy(), full_matrices=False)
    last = range(len(s))[-k:]
    assert value.item() == pytest.approx(sum(s[i] ** 2 for i in last), rel=1e-12)
    gradient = sum(2 * s[i] * numpy.outer(u[:, i], vt[i]) for i in last)
    numpy.testing.assert_allclose(features.grad.numpy(), gradient, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda f: batch_spectral_shrinkage(f, k), [features])


def test_bss_of_one_sample_is_zero():
    features = draw(1, 6).requires_grad_()
    value = batch_spectral_shrinkage(features)
    value.backward()
    assert value.item() == 0.0 and bool((features.grad == 0).all())


@pytest.mark.parametrize("kind", ["equal rows", "constant", "zeros"])
@pytest.mark.parametrize("shape", [(4, 32), (32, 4)], ids=str)
def test_bss_of_degenerate_features(kind, shape):
    """Repeated singular values: a gradient through singular vectors would be infinite here."""
    rows = {"equal rows": draw(1, shape[1], dtype=torch.float32), "constant": torch.full((1, shape[1]), 3.0)}
    features = rows.get(kind, torch.zeros(1, shape[1])).repeat(shape[0], 1).requires_grad_()
    for k in (1, 3):
        value = batch_spectral_shrinkage(features, k)
        (gradient,) = torch.autograd.grad(value, features)
        assert 0 <= value.item() <= 1e-6 * float(features.detach().square().sum())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("autocast", [False, True])
def test_bss_of_half_precision_features_is_computed_in_float32(autocast):
    features = draw(6, 8, dtype=torch.float32).bfloat16().requires_grad_()
    outer = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with outer, torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        value = batch_spectral_shrinkage(features, 2)
    value.backward()
    singular = numpy.linalg.svd(features.detach().double().numpy(), compute_uv=False)
    assert value.dtype == torch.float32 and value.item() == pytest.approx((singular[-2:] ** 2).sum(), rel=1e-5)
    assert features.grad.dtype == torch.bfloat16 and bool(features.grad.isfinite().all())


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_the_calibrated_log_loss_is_that_of_the_best_temperature(scale):
    random = numpy.random.default_rng(0)
    labels = random.integers(4, size=60)
    logits = scale * (random.normal(size=(60, 4)) + 2 * numpy.eye(4)[labels] * (random.random((60, 1)) < 0.7))
    weights = numpy.array([1.0, 2.0, 0.5, 1.5])

    def at(log_temperature, share):
        odds = numpy.exp((logits - logits.max(1, keepdims=True)) / numpy.exp(log_temperature))
        total = log_loss(labels, odds / odds.sum(1, keepdims=True), sample_weight=share)
        return total * share.mean()

    for given, share in ((None, numpy.ones(60)), (torch.tensor(weights), weights[labels])):
        best = minimize_scalar(at, bounds=(-6, 6), method="bounded", args=(share,), options={"xatol": 1e-9})
        tensors = torch.tensor(logits, dtype=torch.float32), torch.tensor([*labels, -100])
        loss, temperature = calibrated_log_loss(torch.cat([tensors[0], torch.zeros(1, 4)]), tensors[1], given)
        assert loss == pytest.approx(best.fun, rel=1e-5) and temperature == pytest.approx(math.exp(best.x), rel=1e-3)


def test_the_calibrated_log_loss_of_several_labels_and_at_its_ends():
    logits = torch.tensor([[4.0, -1.0], [2.0, 3.0], [-6.0, 1.0]])
    labels = torch.tensor([[1, 0], [0, 1], [0, 0]])
    loss, temperature = calibrated_log_loss(logits, labels)
    at = [
        float(torch.nn.functional.binary_cross_entropy_with_logits(logits / t, labels.float()))
        for t in (temperature, 0.98 * temperature, 1.02 * temperature)
    ]
    assert loss == pytest.approx(at[0], rel=1e-5) and at[0] < min(at[1:])
    # Always right: as confident as allowed. No better than chance: as cautious as allowed.
    loss, temperature = calibrated_log_loss(torch.eye(3), torch.arange(3))
    assert loss == pytest.approx(0.0, abs=1e-12) and temperature < 2e-3
    loss, temperature = calibrated_log_loss(torch.eye(2), torch.tensor([1, 0]))
    assert loss == pytest.approx(math.log(2), abs=1e-3) and temperature == pytest.approx(1e3)
    assert calibrated_log_loss(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))[0] == math.inf
