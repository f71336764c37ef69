"""Each sample chooses its filters layer by layer, by a recurrent network over the layers."""

import pytest
import torch
from torch import nn

from hf_ft import AdaFilterConfig, L2SPConfig, OptionError, set_up
from hf_ft.models.gated.per_filter import PerFilter, PerFilterGate, pooled_channels
from hf_ft.testing import same_tensors, tiny_bert, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.models import tiny_swin
from hf_ft.testing.training import make_trainer, snapshot, train


def gated(make, spread=0.3, **options):
    """A model with two paths in float64, whose fine-tuned weights differ from the pretrained ones."""
    model = set_up(make().double(), AdaFilterConfig(**options)).model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "two_paths" not in name:
                parameter.add_(spread * parameter.std() * torch.randn_like(parameter))
    return model.eval()


def double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


class ByHand:
    """The gate in float64, from its weights and the equations of an LSTM."""

    def __init__(self, gate):
        self.state, self.places = gate.state_dict(), [name for name, *_ in gate.settings.layers]
        self.h = self.c = torch.zeros(1, gate.settings.width).double()

    def __call__(self, name, mean):
        w, place = self.state, self.places.index(f"resnet.{name}")
        x = mean @ w[f"enter.{place}.weight"].T + w[f"enter.{place}.bias"]
        sums = x @ w["cell.weight_ih"].T + w["cell.bias_ih"] + self.h @ w["cell.weight_hh"].T + w["cell.bias_hh"]
        i, f, g, o = sums.chunk(4, dim=1)
        self.c = f.sigmoid() * self.c + i.sigmoid() * g.tanh()
        self.h = o.sigmoid() * self.c.tanh()
        return (self.h @ w[f"leave.{place}.weight"].T + w[f"leave.{place}.bias"] > 0).double()


def test_a_resnet_by_hand():
    model, batch = gated(tiny_resnet), double(tiny_inputs(tiny_resnet(), 5))
    choose, frozen, shares = ByHand(model.two_paths.gate), model.two_paths.pretrained.resnet, []

    def layer(unit, x):
        share = choose(unit, x.mean((2, 3)))[..., None, None]
        shares.append(share)
        one, other = (root.get_submodule(unit) for root in (model.resnet, frozen))
        return share * type(one).forward(one, x) + (1 - share) * other(x)

    x = model.resnet.embedder(batch["pixel_values"])
    for number, stage in enumerate(model.resnet.encoder.stages):
        for place, block in enumerate(stage.layers):
            name = f"encoder.stages.{number}.layers.{place}"
            y = layer(f"{name}.layer.1", layer(f"{name}.layer.0", x))
            short = x if isinstance(block.shortcut, nn.Identity) else layer(f"{name}.shortcut", x)
            x = block.activation(y + short)
    wanted = model.classifier(model.resnet.pooler(x))
    assert len(shares) == len(model.two_paths.gate.settings.layers) == 7
    torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-12, rtol=0)
    assert 0.2 < float(torch.cat([share.flatten() for share in shares]).mean()) < 0.8


@pytest.mark.parametrize("all_of", ["fine-tuned", "pretrained"])
@pytest.mark.parametrize("make", [tiny_resnet, tiny_bert, tiny_swin])
def test_at_the_extremes_it_is_one_of_the_two_networks(make, all_of):
    model, batch = gated(make), double(tiny_inputs(make(), 4))
    plain = make().double().eval()
    tuned = {name: value for name, value in model.state_dict().items() if "two_paths" not in name}
    layers = [name for name, *_ in model.two_paths.gate.settings.layers]
    if all_of == "pretrained":
        start = plain.state_dict()
        tuned |= {name: value for name, value in start.items() if name.startswith(tuple(f"{n}." for n in layers))}
    plain.load_state_dict(tuned)
    with torch.no_grad():
        for leave in model.two_paths.gate.leave:
            leave.weight.zero_()
            leave.bias.fill_(5.0 if all_of == "fine-tuned" else -5.0)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, atol=1e-12, rtol=0)


def test_the_gradient_is_that_of_the_sigmoid():
    torch.manual_seed(0)
    gate = PerFilterGate(PerFilter((), 5, (("layer", 3, 4, False),)), torch.float64)
    x, upstream = torch.randn(6, 2, 3).double().requires_grad_(), torch.randn(6, 2, 4).double()
    gate.begin(nn.Identity(), (), {})
    share = gate.share("layer", x, upstream)
    assert set(share.unique().tolist()) == {0.0, 1.0} and share.shape == (6, 1, 4)
    (share * upstream).sum().backward()
    found, x.grad = x.grad, None
    state = gate.cell(gate.enter[0](x.mean(1)))
    (gate.leave[0](state[0]).sigmoid()[:, None] * upstream).sum().backward()
    torch.testing.assert_close(found, x.grad, atol=1e-12, rtol=0)
    gate.end()
    with pytest.raises(OptionError, match="outside of its model"):
        gate.share("layer", x, upstream)


def test_means_over_positions():
    x = torch.randn(2, 3, 4, 5).double()
    torch.testing.assert_close(pooled_channels(x, True), x.mean((2, 3)))
    torch.testing.assert_close(pooled_channels(x, False), x.mean((1, 2)))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    states = x[..., 0]
    wanted = torch.stack([states[0, :2].mean(0), states[1].mean(0)])
    torch.testing.assert_close(pooled_channels(states, False, mask), wanted)
    assert pooled_channels(states[:, 0], False).shape == (2, 4)


def test_evaluation_depends_only_on_the_sample():
    model = gated(tiny_bert)
    batch = double(tiny_inputs(model, 4))
    with torch.no_grad():
        together = model(**batch).logits
        wider = {name: nn.functional.pad(value, (0, 3)) if value.dim() == 2 else value for name, value in batch.items()}
        alone = torch.cat([model(**{key: value[i : i + 1] for key, value in batch.items()}).logits for i in range(4)])
        torch.testing.assert_close(together, model(**wider).logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_a_norm_beside_its_convolution_has_the_same_gate():
    torch.manual_seed(0)
    settings = PerFilter((), 5, (("conv", 4, 4, True),), ("norm",))
    gate = PerFilterGate(settings, torch.float64)
    x = torch.randn(3, 4, 2, 2).double()
    gate.begin(nn.Identity(), (), {})
    assert torch.equal(gate.share("norm", x, x), torch.tensor(1.0).double())  # before any layer
    share = gate.share("conv", x, x)
    assert torch.equal(gate.share("norm", x, x), share) and share.shape == (3, 4, 1, 1)
    assert gate.share("norm", x, torch.randn(3, 7, 2, 2).double()).shape == ()


@pytest.mark.newest
def test_the_layers_are_the_largest_modules_of_one_weight():
    model = tiny_resnet()
    unit = model.resnet.encoder.stages[0].layers[0].layer[0]
    assert AdaFilterConfig().gate(model).fitted(model).norms == ()
    layers = dict((name, rest) for name, *rest in AdaFilterConfig().gate(model).fitted(model).layers)
    name = "resnet.encoder.stages.0.layers.0.layer.0"
    assert layers[name] == [8, 8, True]  # with its norm
    unit.more = nn.Conv2d(8, 8, 1)  # no longer
    found = AdaFilterConfig().gate(model).fitted(model)
    assert f"{name}.convolution" in dict((one, rest) for one, *rest in found.layers)
    assert found.norms == (f"{name}.normalization",)
    swin = AdaFilterConfig().gate(tiny_swin()).fitted(tiny_swin())
    assert {one.rpartition(".")[2] for one, *_ in swin.layers} == {"fc1", "fc2", "downsample"}  # windows aren't samples


def test_rates_and_what_stays_frozen(tmp_path):
    run = set_up(tiny_resnet(), AdaFilterConfig(gate_lr=0.5, head_lr=0.25))
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in run.param_groups(0.125) for p in group["params"]}
    assert rates["two_paths.gate.cell.weight_ih"] == 0.5 and rates["classifier.1.weight"] == 0.25
    assert rates["resnet.embedder.embedder.convolution.weight"] == 0.125
    start = snapshot(tiny_resnet())
    model = train(tiny_resnet(), [AdaFilterConfig(), L2SPConfig()], tmp_path, max_steps=3).model
    same_tensors(snapshot(model.two_paths.pretrained), start)
    now = snapshot(model)
    assert all(not torch.equal(now[name], start[name]) for name in start if now[name].is_floating_point())


def test_refused(tmp_path):
    with pytest.raises(OptionError, match="gradient_checkpointing=True"):
        make_trainer(tiny_vit(), "ada_filter", tmp_path, gradient_checkpointing=True)
    with pytest.raises(OptionError, match="no filters to choose"):
        PerFilter((("vit.layers.0.layernorm_before",),), 5).fitted(tiny_vit())
    with pytest.raises(OptionError, match="two paths already"):
        set_up(set_up(tiny_vit(), "ada_filter").model, "ada_filter")
    with pytest.raises(OptionError, match="both decide"):
        set_up(tiny_vit(), ["ada_filter", "spot_tune"])
