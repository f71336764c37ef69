"""The soup: the mean of the members' weights as one plain model, where this is meaningful."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from hf_ft import OptionError
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.soup import soup
from hf_ft.testing import same_tensors, tiny_bert, tiny_resnet, tiny_vit
from hf_ft.testing.models import tiny_mobilenet_v2
from hf_ft.testing.training import snapshot


def related(make, count=3, ancestor="org/base", **options):
    """Members of one class with different weights, derived from one model."""
    model = CollaborativeModel.from_members([make(seed=seed, **options) for seed in range(count)])
    model.config.ancestors = [ancestor] * count
    return model


@pytest.mark.parametrize("make", [tiny_resnet, tiny_mobilenet_v2, tiny_vit, tiny_bert])
def test_mean_of_weights_and_statistics(make):
    model = related(make)
    before = snapshot(model)
    made = model.soup()
    states = [member.state_dict() for member in model.members]
    wanted = {}
    for name, first in states[0].items():
        mean = sum(state[name].double().numpy() for state in states) / 3
        wanted[name] = torch.tensor(mean).to(first.dtype) if first.is_floating_point() else first
    same_tensors(snapshot(made), wanted, tolerance=1e-7)
    assert type(made) is type(model.members[0]) and not made.training
    same_tensors(snapshot(model), before)
    nn.init.zeros_(next(made.parameters()))
    same_tensors(snapshot(model), before)


def test_the_mean_is_taken_in_float64():
    """In float32, 2**24 + 1 is lost, and in bfloat16, the sum of 255 and 1."""
    model = related(tiny_vit, dtype=None).float()
    bias = [member.classifier.bias for member in model.members]
    for parameter, value in zip(bias, (2.0**24, 1.0, 1.0), strict=True):
        nn.init.constant_(parameter, value)
    exact = torch.tensor((2.0**24 + 2) / 3, dtype=torch.float64).float()
    assert torch.equal(model.soup().classifier.bias, exact.expand(3))
    half = model.to(torch.bfloat16)
    for parameter, value in zip(bias, (256.0, 1.0, 1.0), strict=True):
        nn.init.constant_(parameter, value)
    made = half.soup()
    assert made.dtype == torch.bfloat16 and torch.equal(made.classifier.bias, torch.full((3,), 86.0).bfloat16())


def test_equal_members_give_the_same_model():
    one = tiny_resnet()
    model = CollaborativeModel.from_members([one, copy.deepcopy(one)])
    same_tensors(snapshot(soup(model.members, model.config.ancestors, same_ancestor=True)), snapshot(one))
    same_tensors(snapshot(CollaborativeModel.from_members([one]).soup()), snapshot(one))


def test_a_soup_is_a_plain_model(tmp_path):
    model = related(tiny_vit)
    model.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    model.members[0].vit.embeddings.requires_grad_(False)
    made = model.soup()
    assert made.config.name_or_path == "org/base" and made.config.id2label[1] == "dog"
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in model.members[0].parameters()]
    made.save_pretrained(tmp_path)
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    same_tensors(snapshot(loaded), snapshot(made))


def test_the_random_state_is_left_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    related(tiny_bert).soup()
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    ("ancestors", "told"),
    [
        ([None, None], "an unknown model, an unknown model"),
        (["org/base", None], "org/base, an unknown model"),
        (["org/base", "org/other"], "org/base, org/other"),
    ],
)
def test_other_ancestors_are_refused_unless_declared_the_same(ancestors, told):
    model = related(tiny_resnet, 2)
    model.config.ancestors = ancestors
    with pytest.raises(OptionError, match=f"the members descend from {told}: .* pass same_ancestor=True"):
        model.soup()
    assert type(model.soup(same_ancestor=True)) is hf.ResNetForImageClassification
    model.config.ancestors = ["org/base"] * 2
    with pytest.raises(OptionError, match="descend from"):
        model.soup(same_ancestor=False)


def test_other_classes_and_shapes_are_refused():
    mixed = CollaborativeModel.from_members([tiny_vit(), tiny_resnet()])
    with pytest.raises(
        OptionError, match="member 0 is a ViT.*, but member 1 is a ResNet.*: only members of the same class"
    ):
        mixed.soup(same_ancestor=True)
    sizes = CollaborativeModel.from_members([tiny_vit(), tiny_vit(intermediate_size=24)])
    with pytest.raises(
        OptionError, match=r"is \(32, 16\) in member 0, but \(24, 16\) in member 1: only members of equal"
    ):
        sizes.soup(same_ancestor=True)
    depths = CollaborativeModel.from_members([tiny_vit(), tiny_vit(num_hidden_layers=4)])
    with pytest.raises(OptionError, match=r"is None in member 0, but \(.*\) in member 1"):
        depths.soup(same_ancestor=True)


def test_members_of_different_processors_are_refused():
    model = CollaborativeModel.from_members([tiny_resnet(), tiny_resnet(seed=1)], inputs=[0, 1])
    with pytest.raises(OptionError, match="the members use 2 different processors"):
        model.soup(same_ancestor=True)
