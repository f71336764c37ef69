"""Pure maths against independent float64 references."""

import pytest
import torch

from hf_ft.functional import l2_sp


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
    """In bfloat16, 256 + 1 is 256: the sum of many small squares would stand still."""
    weight = torch.full((4096,), 0.125, dtype=torch.bfloat16, requires_grad=True)
    value = l2_sp([weight], [torch.zeros(4096)])
    assert value.dtype == torch.float32 and float(value) == 0.5 * 4096 * 0.125**2
    value.backward()
    assert weight.grad.dtype == torch.bfloat16 and bool((weight.grad == 0.125).all())


def test_l2_sp_of_nothing_and_of_misfits():
    assert float(l2_sp([])) == 0.0
    with pytest.raises(ValueError, match="differ in number or in shape"):
        l2_sp([torch.zeros(2)], [torch.zeros(3)])
