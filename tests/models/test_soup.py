"""Uniform and greedy soups against sums in float64, and which models can be in one."""

import copy

import pytest
import torch

import hf_ft
from hf_ft import OptionError, soup
from hf_ft.testing import same_tensors, tiny_bert, tiny_data, tiny_resnet
from hf_ft.testing.training import snapshot
from tests.strategies.test_wise_ft import reference_statistics

KEY = "classifier.weight"


def moved(make, count, size=0.1):
    """Models on opposite sides of the same one."""
    models = [make() for _ in range(count)]
    for seed, model in enumerate(models):
        random = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=random)
    return models


def marked(*values):
    """Models whose classifier has these values."""
    models = [tiny_bert() for _ in values]
    for model, value in zip(models, values, strict=True):
        model.classifier.weight.data.fill_(value)
    return models


def test_uniform_is_the_mean_of_all_and_of_folders(tmp_path):
    models = moved(tiny_bert, 3)
    before = [snapshot(model) for model in models]
    made = soup(models, "uniform")
    assert made.members == (0, 1, 2) and made.score is None and not made.model.training
    for key, value in made.model.state_dict().items():
        if value.is_floating_point():
            wanted = torch.stack([state[key].double() for state in before]).mean(0).float()
            torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    for model, state in zip(models, before, strict=True):
        same_tensors(snapshot(model), state)
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index))
    same_tensors(snapshot(soup([tmp_path / str(i) for i in range(3)], "uniform").model), snapshot(made.model))


def test_statistics_that_differ_are_measured(tmp_path):
    models = moved(tiny_resnet, 2)
    norms = [name for name in models[0].state_dict() if name.endswith("running_mean")]
    models[1].state_dict()[norms[0]].add_(0.5)
    data = tiny_data(models[0], 32)
    batches = [data[:16], data[16:]]
    made = soup(models, "uniform", batches=batches)
    found, first = made.model.state_dict(), models[0].state_dict()
    assert all(torch.equal(found[name], first[name]) for name in norms[1:])
    layer = norms[0].removesuffix(".running_mean")
    # The first layer, so that the normalisation of others does not matter.
    mean, var = reference_statistics(made.model, batches)[layer]
    torch.testing.assert_close(found[f"{layer}.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[f"{layer}.running_var"].double(), var, rtol=1e-5, atol=1e-6)
    with pytest.raises(OptionError, match=r"statistics of 1 BatchNorm layers .*batches=\.\.\."):
        soup(models, "uniform")
    with pytest.raises(OptionError, match="no batch of more than one sample"):
        soup(models, "uniform", batches=[data[:1]])


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_greedy_adds_what_does_not_lower_the_score(greater_is_better):
    sign = 1 if greater_is_better else -1
    # Best first: 0.4, then 0.2 (mean 0.3: equally good, so added), 0.8 (mean 0.467: worse), 0.0 (mean 0.2: better).
    values = {0.0: 0.5, 0.2: 0.7, 0.4: 0.8, 0.8: 0.6}
    values = {key: sign * value for key, value in values.items()}
    models = marked(0.0, 0.2, 0.4, 0.8)
    after = {0.3: 0.8, 0.467: 0.7, 0.2: 0.9}

    class Evaluation:
        calls = 0

        def __call__(self, model):
            self.calls += 1
            value = round(float(model.state_dict()[KEY][0, 0]), 3)
            return values[value] if self.calls <= 4 else sign * after[value]

    evaluation = Evaluation()
    made = soup(models, "greedy", evaluation, greater_is_better=greater_is_better)
    assert made.members == (2, 1, 0) and made.score == sign * 0.9
    assert made.tried == {1: sign * 0.8, 3: sign * 0.7, 0: sign * 0.9}
    assert evaluation.calls == 7
    torch.testing.assert_close(made.model.state_dict()[KEY], torch.full_like(models[0].classifier.weight, 0.2))
    # With known scores, only averages are evaluated.
    known = [values[float(f"{m.classifier.weight[0, 0]:.1f}")] for m in models]
    again = soup(models, "greedy", evaluation, scores=known, greater_is_better=greater_is_better)
    assert again.members == made.members and evaluation.calls == 10
    same_tensors(snapshot(again.model), snapshot(made.model))


def test_a_score_that_is_not_finite_never_leads():
    models = marked(0.1, 0.2)
    made = soup(models, "greedy", lambda model: 0.0, scores=[float("nan"), 0.5])
    assert made.members == (1,) and made.score == 0.5
    same_tensors(snapshot(made.model), snapshot(models[1]))


def test_only_compatible_models_go_in(tmp_path):
    odd_classes = tiny_bert()
    odd_classes.config.id2label = {0: "b", 1: "a", 2: "c"}
    wide, half = tiny_bert(intermediate_size=24), copy.deepcopy(tiny_bert()).half()
    (tmp_path / "adapter").mkdir()
    models = [tiny_resnet(), *moved(tiny_bert, 2), odd_classes, wide, half, tmp_path / "adapter"]
    made = soup(models, "uniform")
    assert made.members == (1, 2) and list(made.left_out) == [0, 3, 4, 5, 6]
    assert made.left_out[0].startswith("it is a ResNetForImageClassification")
    assert made.left_out[3] == "its classes have other names or another order"
    assert made.left_out[4].startswith("its weights differ in bert.encoder.layer.0.intermediate.dense.weight: (24, ")
    assert "in float16 instead of" in made.left_out[5]
    assert (
        made.left_out[6]
        == "it cannot be loaded as a plain model: adapter holds no config.json; is it an adapter that was not merged?"
    )


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(OptionError, match="no model to average"):
        soup([], "uniform")
    with pytest.raises(OptionError, match="kind='best' is unknown"):
        soup([tiny_bert()], "best")
    with pytest.raises(OptionError, match=r"needs evaluate=\.\.\."):
        soup([tiny_bert()])
    with pytest.raises(OptionError, match="there are 1 models, but 2 scores"):
        soup([tiny_bert()], scores=[1.0, 2.0])
    assert hf_ft.soup is soup
