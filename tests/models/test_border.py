"""The model's own forward pass from where its head begins: all kinds of source heads, against the original models."""

import copy

import pytest
import torch
from torch import nn
from transformers import HGNetV2Config, HGNetV2ForImageClassification

from hf_ft import CoTuningConfig, LwFConfig, OptionError, SoftConfig, State, set_up
from hf_ft.models.border import run_to_head
from hf_ft.models.source_head import border_head, head_modules, pretrained_logits, renew_head, source_head
from hf_ft.testing import still, tiny_resnet, tiny_vit
from tests.models.heads import OTHERS, TEXTS, headed, padded, without_labels

NAMES = [*TEXTS, *OTHERS]


def pair(name, dtype=torch.float32):
    """A pretrained classifier of five classes, and the same network with a new head of three."""
    source = headed(name, 5, dtype)
    renew_head(model := copy.deepcopy(source), {"num_labels": 3})
    return source, model


@torch.no_grad()
def move(model, *others):
    """Change the backbone of a model, and those of others in the same way."""
    head, random = head_modules(model), torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if not name.startswith(head):
            noise = 0.1 * torch.randn(parameter.shape, generator=random, dtype=torch.float64).to(parameter.dtype)
            for one in (model, *others):
                one.get_parameter(name).add_(noise)


@pytest.mark.parametrize("name", NAMES)
def test_source_logits_are_those_of_the_untouched_model(name):
    """In float64: before training, and with changed backbone weights and a new head with its own weights."""
    source, model = pair(name, torch.float64)
    inputs = without_labels(padded(name), torch.float64)
    for step in range(2):
        expected = source(**inputs).logits.detach()
        assert expected.shape == (4, 5) and model(**inputs).logits.shape == (4, 3)
        assert torch.allclose(pretrained_logits(model, inputs), expected, atol=1e-12, rtol=0), step
        move(model, source)
    assert not torch.allclose(expected, pair(name, torch.float64)[0](**inputs).logits, atol=1e-3)


FORMS = ("lwf", "joint", "separate", "co_tuning")
CASES = [(name, FORMS[place % 4]) for place, name in enumerate(NAMES)]  # and each form on three kinds of heads
CASES += [(name, form) for name in ("gpt2", "deberta_v2", "wav2vec2") for form in FORMS if (name, form) not in CASES]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_terms(name, form):
    """Each summand, from logits of plain models in float64; the gradient reaches backbone and source head."""
    source, model = pair(name)
    still(model)
    teacher = copy.deepcopy(source).double()
    config = {"lwf": LwFConfig(train_source_head=True), "co_tuning": CoTuningConfig()}.get(form)
    config = config or SoftConfig(source_forward=form)
    table = torch.rand(3, 5, generator=torch.Generator().manual_seed(3)).softmax(1)
    states = {"co_tuning": State({"relationship": table})} if form == "co_tuning" else {}
    run = set_up(model, config, states=states)
    objective = run.objective().train()
    move(model, source)
    batch, other = padded(name), padded(name)
    if name in TEXTS and name != "xlnet":  # of another length, except where the last token would then be padding
        other = {key: value[:, :8] if value.dim() == 2 else value for key, value in other.items()}
    model.eval()
    outputs = objective(**batch, **({"stream_source": other} if isinstance(config, SoftConfig) else {}))
    wide, plain = source.double(), copy.deepcopy(model).double()
    student = wide(**without_labels(batch, torch.float64)).logits
    if form == "lwf":
        wanted = (teacher(**without_labels(batch, torch.float64)).logits.detach() / 3).softmax(1)
        expected = 4 * (wanted * (wanted.log() - (student / 3).log_softmax(1))).sum(1).mean()
    elif form == "co_tuning":
        expected = -2.3 * (table.double()[batch["labels"]] * student.log_softmax(1)).sum(1).mean()
    else:
        logits = wide(**without_labels(other, torch.float64)).logits
        expected = nn.functional.cross_entropy(logits, other["labels"])
    task = nn.functional.cross_entropy(plain(**without_labels(batch, torch.float64)).logits, batch["labels"])
    terms = outputs["terms"]
    assert terms["task"].item() == pytest.approx(task.item(), rel=1e-4)
    assert terms.popitem()[1].item() == pytest.approx(expected.item(), rel=1e-4)
    outputs["loss"].backward()
    (task + expected).backward()
    heads = zip(head_modules(model), run.plan.terms[0].fn.head.modules_by_path.values(), strict=True)
    pairs = [(p, wide.get_submodule(n).get_parameter(x), None) for n, m in heads for x, p in m.named_parameters()]
    of_head = len(pairs)
    for path, parameter in model.named_parameters():
        if not path.startswith(head_modules(model)) and parameter.grad is not None:
            pairs.append((parameter, wide.get_parameter(path), plain.get_parameter(path)))
    assert len(pairs) > of_head > 0
    for parameter, *parts in pairs:
        gradient = sum(part.grad for part in parts if part is not None)
        assert torch.allclose(parameter.grad.double(), gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", ["gpt2", "distilbert"])
@pytest.mark.parametrize("config", [LwFConfig(), SoftConfig(source_forward="joint"), CoTuningConfig()])
def test_the_backbone_runs_once(name, config):
    model = pair(name)[1]
    table = State({"relationship": torch.full((3, 5), 0.2)})
    objective = set_up(model, config, states={"co_tuning": table} if isinstance(config, CoTuningConfig) else {})
    objective = objective.objective().train()
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *call: calls.append(len(call[2])))
    batch = padded(name)
    objective(**batch, **({"stream_source": batch} if isinstance(config, SoftConfig) else {}))
    assert calls == [8 if isinstance(config, SoftConfig) else 4]


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_heads_of_one_layer_give_the_same_bits_as_that_layer(make):
    model = make(num_labels=5)
    renew_head(model, {"num_labels": 3})
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    head, border = source_head(model), run_to_head(model, border_head(model), {"pixel_values": images})
    pooled = model.base_model(images)
    pooled = pooled[0][:, 0] if make is tiny_vit else pooled.pooler_output
    assert torch.equal(head(border), head.module(pooled))


def test_the_source_head_drops_out_where_the_new_head_does():
    model = pair("deberta_v2")[1]
    head = source_head(model)
    head.module[0].dropout.p = 0.5
    border = run_to_head(model, border_head(model), without_labels(padded("deberta_v2")))
    model.train()
    assert not torch.equal(head(border), head(border))
    model.eval()
    assert torch.equal(head(border), head(border)) and not head.module[0].dropout.training


def test_a_head_that_has_two_names():
    """Registered on its own and in a list, through which it is called."""
    config = HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 32], stage_mid_channels=[4, 4, 8, 8],
        stage_out_channels=[8, 16, 32, 64], stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], embedding_size=8, num_labels=5,
    )  # fmt: skip
    source = HGNetV2ForImageClassification(config).eval()
    renew_head(model := copy.deepcopy(source), {"num_labels": 3})
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        assert model(**images).logits.shape == (2, 3)
        for _ in range(2):
            assert torch.equal(pretrained_logits(model, images), source(**images).logits)
            move(model, source)
            model.fc.weight.add_(1.0)


def test_what_is_modified_in_place_is_refused():
    model = pair("distilbert")[1]
    backbone = model.distilbert.forward
    inputs = without_labels(padded("distilbert"))
    head = source_head(model)

    class Doubling(nn.Module):
        def forward(self, states):
            return self.layer(states.mul_(2.0))

    first = Doubling()
    first.layer, model.pre_classifier = model.pre_classifier, first
    border = run_to_head(model, border_head(model), inputs)
    with torch.no_grad(), border.recording():
        first(border.tensors[0])
    with pytest.raises(OptionError, match="'distilbert' is modified in place"):
        head(border)
    assert backbone == model.distilbert.forward


def test_a_head_that_is_not_called_is_refused():
    model = pair("distilbert")[1]
    layer = model.classifier
    model.classifier, model.unused = nn.Identity(), layer
    border = run_to_head(model, ["unused"], without_labels(padded("distilbert")))
    with pytest.raises(OptionError, match=r"\(unused\) are not called.*head="):
        border.forward({})
