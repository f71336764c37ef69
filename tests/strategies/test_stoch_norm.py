"""Each channel is normalised by its batch or by the moving statistics; afterwards the layers are plain again."""

import pytest
import torch
from torch import nn

from hf_ft import OptionError, State, StochNormConfig, set_up
from hf_ft.models.stoch_norm import AddStochNorm, StochNorm, remove_stoch_norm
from hf_ft.testing import tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer


def normalised(x, mean, variance, norm):
    shape = (1, -1, *(1,) * (x.dim() - 2))
    x = (x - mean.view(shape)) / (variance.view(shape) + norm.eps).sqrt()
    return x * norm.weight.view(shape) + norm.bias.view(shape)


@pytest.mark.parametrize(("kind", "size"), [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (3, 4))])
def test_the_formula_channel_by_channel(kind, size):
    torch.manual_seed(0)
    norm = kind(40, momentum=0.3).double()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    norm.running_var.uniform_(0.5, 2)
    plain = kind(40, momentum=0.3).double()
    plain.load_state_dict(norm.state_dict())
    model = AddStochNorm(0.7)(nn.Sequential(norm))
    x, dims = torch.randn(16, 40, *size).double(), [0, *range(2, 2 + len(size))]
    moving = normalised(x, norm.running_mean.clone(), norm.running_var.clone(), norm)
    batch = normalised(x, x.mean(dims), x.var(dims, unbiased=False), norm)
    torch.manual_seed(3)
    chosen = torch.rand(40) < 0.7
    torch.manual_seed(3)
    found = model(x)
    wanted = torch.where(chosen.view(1, -1, *(1,) * len(size)), batch, moving)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    assert 0 < chosen.sum() < 40
    plain(x)  # the moving statistics move as usual
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    remove_stoch_norm(model)
    assert type(norm) is kind and list(vars(norm)) == list(vars(plain))


@pytest.mark.parametrize(("p", "like"), [(1.0, "train"), (0.0, "eval")])
def test_at_the_extremes_it_is_full_fine_tuning_with_either_kind_of_statistics(p, like, tmp_path):
    ours, theirs = tiny_resnet(), tiny_resnet()
    make_trainer(ours, StochNormConfig(p=p), tmp_path).train()
    make_trainer(theirs, "full", tmp_path / "full").train() if like == "train" else None
    weights = dict(ours.named_parameters())
    if like == "train":
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(weights[name], parameter, atol=1e-6, rtol=1e-5)
    assert not any(isinstance(module, StochNorm) for module in ours.modules())


def test_a_model_without_batch_norm_is_refused():
    assert StochNormConfig().adapted(tiny_vit()) is None and StochNormConfig().adapted(tiny_resnet()) is not None
    with pytest.raises(OptionError, match="no BatchNorm layers"):
        set_up(tiny_vit(), "stoch_norm")
    assert StochNormConfig(head_lr=0.1).plan(tiny_resnet(), State()).rates[0].lr == 0.1
