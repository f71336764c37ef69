"""Replaying a frozen prefix gives what the whole model gives, bit for bit, or is refused."""

import pytest
import torch
from torch import nn

from hf_ft import anatomy
from hf_ft.frozen_prefix import activations
from hf_ft.parts import Chain, Part
from hf_ft.prefix_search import find_prefix
from hf_ft.testing import TINY_MODELS, tiny_inputs, tiny_resnet, tiny_vit


def borders(model):
    """What is alive behind each border between two parts."""
    parts = anatomy(model).parts
    return [[Chain("", parts[index:])] for index in range(1, len(parts))]


HEAD = [Chain("", (Part("head", ("head",)),))]


def rows(prefix, batch):
    return {name: batch[name] for name in prefix.kept}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_outputs_and_gradients_are_those_of_the_whole_model(name):
    model = TINY_MODELS[name]()
    batch = tiny_inputs(model, 6, seed=2)
    for live in borders(model):
        prefix = find_prefix(model, live, tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))
        assert prefix is not None, live
        activation = prefix.record(batch)
        assert len(activation) == 1 and not activation[0].requires_grad and not model.training
        suffix = [p for part in live[0].parts for m in part.modules for p in model.get_submodule(m).parameters()]
        model.requires_grad_(False)  # as in training: some kernels are chosen by whether their input needs a gradient
        for parameter in suffix:
            parameter.requires_grad_(True)
        results = []
        for outputs in (model(**batch), prefix(activation, rows(prefix, batch))):
            gradients = torch.autograd.grad(outputs.loss, suffix, allow_unused=True)
            results.append((outputs.logits, outputs.loss, *(g for g in gradients if g is not None)))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other), live


@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_nothing_before_the_border_runs(name):
    model = TINY_MODELS[name]()
    parts = anatomy(model).parts
    prefix = find_prefix(model, [Chain("", parts[-1:])], tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))
    batch = tiny_inputs(model, 4)
    activation = prefix.record(batch)
    for part in parts[:-1]:
        for module in part.modules:
            with torch.no_grad():
                for parameter in model.get_submodule(module).parameters():
                    parameter.fill_(float("nan"))
    if "pixel_values" in batch:
        batch["pixel_values"] = None  # never asked for
        assert "pixel_values" in prefix.skipped
    assert prefix(activation, rows(prefix, batch)).logits.isfinite().all()


def test_the_model_is_as_it_was():
    model = tiny_resnet().train()
    model.resnet.embedder.eval()
    before = [(module, module.training, set(module.__dict__)) for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    prefix = find_prefix(model, borders(model)[1], tiny_inputs(model, 2), tiny_inputs(model, 3))
    activation = prefix.record(tiny_inputs(model, 4))
    with pytest.raises(RuntimeError, match="within"), prefix.replaying(activation):
        raise RuntimeError("within")
    for module, mode, names in before:
        assert module.training == mode and set(module.__dict__) == names
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_a_forward_that_was_patched_stays_patched():
    model = tiny_resnet()
    calls, plain = [], model.resnet.embedder.forward
    model.resnet.embedder.forward = lambda *args: calls.append(1) or plain(*args)
    prefix = find_prefix(model, borders(model)[1], tiny_inputs(model, 2), tiny_inputs(model, 3))
    prefix(prefix.record(tiny_inputs(model, 4)), {})
    calls.clear()
    model(**tiny_inputs(model))
    assert calls == [1]


class Skipping(nn.Module):
    """The head reads the first layer's output again, so that only a border before it can stand for the rest."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x):
        low = self.first(x)
        return self.head(torch.cat([low, self.second(low)], 1))


class Sharing(nn.Module):
    """One layer is called before and after the border."""

    def __init__(self):
        super().__init__()
        self.shared, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.shared(self.second(self.shared(x))))


class Counting(nn.Module):
    """Functional code between the layers that depends on the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.first(x)) + x.mean()


@pytest.mark.parametrize("kind", [Sharing, Counting])
def test_a_model_that_cannot_be_cut_is_refused(kind):
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(2, 4), torch.randn(3, 4)
    # (x, 4) is kept as a small column: drop it, as pixels are.
    found = find_prefix(model, HEAD, {"x": x[0]}, {"x": x[1]}, varying={"x"})
    assert found is None


def test_the_border_lies_before_what_is_read_again():
    prefix = find_prefix(Skipping(), HEAD, {"x": torch.randn(2, 4)}, {"x": torch.randn(3, 4)}, varying={"x"})
    assert prefix.borders == ("first",)


def test_several_borders_in_one_pass():
    model, batch = tiny_vit(), tiny_inputs(tiny_vit(), 3)
    first, last, after = (part.modules[0] for part in anatomy(model).parts[:4] if part.name != "block0")
    names = [first, last]
    model.get_submodule(after).forward = lambda *args: pytest.fail("ran past the last border")
    found = activations(model, names, batch)
    assert list(found) == names and all(found[name].shape == (3, 17, 16) for name in names)
