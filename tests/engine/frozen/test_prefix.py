"""Replaying a frozen prefix gives the whole model's results, bit for bit, or is refused."""

import pytest
import torch
from torch import nn

from hf_ft import AMCFConfig, CollaborativeModel, anatomy, set_up
from hf_ft.engine.frozen.find_prefix import PrefixFinder, find_prefix
from hf_ft.models.feature_hooks import activations
from hf_ft.models.parts import Chain, Part
from hf_ft.testing import TINY_MODELS, tiny_collaborative, tiny_inputs, tiny_resnet, tiny_vit


def borders(model):
    """What is alive behind each border between two parts."""
    parts = anatomy(model).parts
    return [[Chain("", parts[index:])] for index in range(1, len(parts))]


def test_samples_without_a_label_have_no_loss():
    model, small = tiny_resnet(), []
    for samples in (2, 3):
        batch = tiny_inputs(model, samples, seed=samples)
        small.append({**batch, "labels": torch.full_like(batch["labels"], -100)})
    for live in borders(model):
        labelled = find_prefix(model, live, tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))
        assert find_prefix(model, live, *small).borders == labelled.borders


HEAD = [Chain("", (Part("head", ("head",)),))]


def rows(prefix, batch):
    return {name: batch[name] for name in prefix.kept}


@pytest.mark.slow
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
        model.requires_grad_(False)  # as in training: some kernels depend on whether their input needs a gradient
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
        batch["pixel_values"] = None  # never requested
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
    """The head reads the first layer's output again, so only a border before that layer captures everything."""

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


# --- several borders, several members --------------------------------------------------------------------------


def after_layers(model, *frozen):
    """What is alive if this many layers of each member are frozen, and the plan's run."""
    run = set_up(model, AMCFConfig(frozen=list(frozen)))
    objective = run.objective()
    objective.enter(run.plan.stages[0])
    model.eval()
    return run, objective.alive.chains


def ran(model, call):
    """The convolutions that run during a call."""
    names = []
    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(lambda *_, name=name: names.append(name)) for name, module in convolutions]
    outputs = call()
    for hook in hooks:
        hook.remove()
    return outputs, names


@pytest.mark.parametrize("k", [3, 4, 5, 6, 30, 31, 32, 51])
def test_inside_of_a_residual_block_no_frozen_layer_runs(k):
    model = TINY_MODELS["mobilenet_v2"]()
    run, live = after_layers(model, k)
    prefix = find_prefix(model, live, tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))
    batch = tiny_inputs(model, 6, seed=2)
    at_borders = prefix.record(batch)
    outputs, names = ran(model, lambda: prefix(at_borders, rows(prefix, batch)))
    assert torch.allclose(outputs.logits, model(**batch).logits, atol=1e-5)
    trained = {name.removesuffix(".weight") for name in run.trained if name.endswith("convolution.weight")}
    assert set(names) == trained and prefix.kept == ("labels",)


def test_a_shortcut_across_the_border_needs_two():
    model = TINY_MODELS["mobilenet_v2"]()
    _, live = after_layers(model, 7)  # in the third block, whose input is added to its output
    prefix = find_prefix(model, live, tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))
    assert len(prefix.borders) == 2
    batch = tiny_inputs(model, 4)
    wrong = [prefix.record(batch)[0], torch.zeros_like(prefix.record(batch)[1])]
    assert not torch.allclose(prefix(wrong, rows(prefix, batch)).logits, model(**batch).logits, atol=1e-3)


class Adapted(nn.Module):
    """An adapter that reads the values before the border, and has no effect yet."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 2)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        low = self.first(x)
        return self.head(self.second(low)) + self.up(self.down(low))


def test_what_feeds_an_adapter_without_effect_is_not_lost():
    torch.manual_seed(0)
    live = [Chain("", (Part("head", ("head", "down", "up")),))]
    x = torch.randn(2, 4), torch.randn(3, 4)
    prefix = find_prefix(Adapted(), live, {"x": x[0]}, {"x": x[1]}, varying={"x"})
    assert prefix is None or prefix.borders == ("first",), "the outputs alone would allow 'second'"
    assert prefix is not None


@pytest.mark.parametrize("frozen", [(2, 10), (0, 10), (6, 0), (3, 21)])
def test_each_member_is_cut_separately(frozen):
    model = tiny_collaborative()
    _, live = after_layers(model, *frozen)
    prefix = find_prefix(model, live, tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))
    images = [name for name, k in zip(model.input_names, frozen, strict=True) if k == 0]
    assert [name for name in prefix.kept if name != "labels"] == images, "pixels of what runs whole are kept"
    assert {border.split(".")[1] for border in prefix.borders} == {str(j) for j, k in enumerate(frozen) if k}
    batch = tiny_inputs(model, 5, seed=3)
    outputs = prefix(prefix.record(batch), rows(prefix, batch))
    for one, other in zip(outputs.member_logits, model(**batch).member_logits, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_members_that_share_their_images():
    """Images are kept as long as one member needs them."""
    for frozen, kept in (((2, 10), ()), ((2, 0), ("pixel_values",))):
        model = CollaborativeModel.from_members(list(tiny_collaborative().members))
        _, live = after_layers(model, *frozen)
        prefix = find_prefix(model, live, tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))
        assert tuple(name for name in prefix.kept if name != "labels") == kept


@pytest.mark.slow
def test_a_finder_serves_many_stages():
    model = tiny_collaborative()
    finder = PrefixFinder.of(model, tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))
    for frozen in ((2, 10), (2, 12), (4, 12), (2, 10)):
        _, live = after_layers(tiny_collaborative(), *frozen)
        alone = find_prefix(model, live, tiny_inputs(model, 2), tiny_inputs(model, 3, seed=1))
        assert finder.find(live).borders == alone.borders


class InPlace(nn.Module):
    """A block whose own code changes its first layer's output."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x + self.conv2(nn.functional.silu(self.conv1(x), inplace=True))


def test_what_changes_in_place_is_recorded_before_the_change():
    torch.manual_seed(0)
    model, x = nn.Sequential(InPlace(), InPlace()), torch.randn(2, 3, 4, 4)
    model.forward = lambda pixel_values: nn.Sequential.forward(model, pixel_values)
    alone = activations(model, ["0.conv1"], {"pixel_values": x})["0.conv1"]
    together = activations(model, ["0.conv1", "1.conv1"], {"pixel_values": x})["0.conv1"]
    assert torch.equal(alone, together)


class Dropping(nn.Module):
    """A function of the model itself drops values between two layers."""

    def __init__(self, p):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.p = p

    def forward(self, x):
        return self.head(self.second(nn.functional.dropout(self.first(x), self.p, self.training)))


@pytest.mark.parametrize(("p", "border"), [(0.0, "second"), (0.5, "first")])
def test_dropout_by_a_function_is_not_lost(p, border):
    torch.manual_seed(0)
    x = torch.randn(2, 4), torch.randn(3, 4)
    prefix = find_prefix(Dropping(p).train(), HEAD, {"x": x[0]}, {"x": x[1]}, varying={"x"})
    assert prefix.borders == (border,)
