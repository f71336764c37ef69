"""General discrimination compared with folds, means and a regression computed here; its callback."""

import builtins
import math
import random
import warnings

import numpy as np
import pytest
import torch
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_ft import OptionError, diagnostics
from hf_ft.diagnostics.discrimination import (
    Discrimination,
    GeneralDiscriminationCallback,
    _NearestMean,
    general_discrimination,
    plot_discrimination,
)
from hf_ft.errors import AnatomyError
from hf_ft.testing import same_tensors, tiny_bert, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.models import tiny_distilbert, tiny_efficientnet, tiny_roberta
from hf_ft.testing.training import make_trainer, snapshot

CLASSES = torch.tensor([907, -3, 40])  # none of them a class of a tiny model's head


def samples(model, count=45, shift=0.0, seed=0, classes=CLASSES):
    """Inputs with 15 samples per class; ``shift`` is the distance between the images of consecutive classes."""
    inputs = tiny_inputs(model, count, seed)
    numbers = torch.arange(count) % len(classes)
    if "pixel_values" in inputs:
        inputs["pixel_values"] += shift * numbers[:, None, None, None]
    return {**inputs, "labels": classes[numbers]}


def batches(inputs, size=16):
    count = len(inputs["labels"])
    return [{name: v[start : start + size] for name, v in inputs.items()} for start in range(0, count, size)]


# --- the figures


def features_of(model, inputs):
    """The input of the head, by the names of Transformers."""
    inputs = {name: values for name, values in inputs.items() if name != "labels"}
    with torch.no_grad():
        out = model.base_model(**inputs)
    if model.config.model_type == "vit":
        return out.last_hidden_state[:, 0].double().numpy()
    return out.pooler_output.flatten(1).double().numpy()


def regression(features, targets, classes):
    """Multinomial regression, penalised by half the squared norm of its weights, (d + 1, classes)."""
    x = torch.cat([torch.from_numpy(features), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    weights = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = nn.functional.cross_entropy(x @ weights, torch.from_numpy(targets), reduction="sum")
        value = value + 0.5 * weights[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weights.detach().numpy()


def reference(features, labels, folds=5, seed=0):
    """Both accuracies, counted fold by fold."""
    names = sorted(set(labels.tolist()))
    targets = np.array([names.index(label) for label in labels.tolist()])
    right, seen = np.zeros(2), np.zeros(len(labels), dtype=int)
    for fit, held in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, targets):
        seen[held] += 1
        centre, spread = features[fit].mean(axis=0), features[fit].std(axis=0)
        spread[spread == 0] = 1
        weights = regression((features[fit] - centre) / spread, targets[fit], len(names))
        means = [features[fit][targets[fit] == target].mean(axis=0) for target in range(len(names))]
        for row in held:
            logits = (features[row] - centre) / spread @ weights[:-1] + weights[-1]
            distances = [float(((features[row] - mean) ** 2).sum()) for mean in means]
            right += [logits.argmax() == targets[row], np.argmin(distances) == targets[row]]
    assert (seen == 1).all()
    return right / len(labels)


@pytest.mark.parametrize(("make", "folds", "seed"), [(tiny_resnet, 5, 0), (tiny_vit, 3, 7), (tiny_bert, 5, 1)])
def test_figures_against_folds_worked_out_by_hand(make, folds, seed):
    model = make()
    inputs = samples(model, shift=0.05)
    found = general_discrimination(model, batches(inputs), folds=folds, seed=seed)
    expected = reference(features_of(model, inputs), inputs["labels"], folds, seed)
    assert [found.linear_probe, found.nearest_class_mean] == pytest.approx(expected, abs=1e-12)
    assert (found.samples, found.classes) == (45, 3)
    assert 0 < found.linear_probe < 1 and found.linear_probe != found.nearest_class_mean


def test_separated_classes_are_all_recognised():
    model = tiny_resnet()
    assert general_discrimination(model, batches(samples(model, shift=5.0))) == Discrimination(1.0, 1.0, 45, 3)


def test_random_labels_are_guessed():
    model = tiny_resnet()
    inputs = samples(model, 300, classes=CLASSES[:2])
    found = general_discrimination(model, batches(inputs, 100))
    assert abs(found.linear_probe - 0.5) < 0.12 and abs(found.nearest_class_mean - 0.5) < 0.12  # 4 deviations


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
def test_batches_of_any_size_give_the_same(make):
    model = make()
    inputs = samples(model, shift=0.05)
    whole = general_discrimination(model, [inputs])
    for size in (1, 7, 44):
        assert general_discrimination(model, batches(inputs, size)) == whole


@pytest.mark.parametrize("make", [tiny_roberta, tiny_distilbert, tiny_efficientnet])
def test_heads_of_several_modules(make):
    found = general_discrimination(make(), batches(samples(make())))
    assert (found.samples, found.classes) == (45, 3)


def test_parts_can_be_named():
    model = tiny_distilbert()
    found = general_discrimination(model, batches(samples(model)))
    assert general_discrimination(model, batches(samples(model)), head="pre_classifier,classifier") == found
    assert general_discrimination(model, batches(samples(model)), head="classifier") != found
    with pytest.raises(AnatomyError, match="no module 'top'"):
        general_discrimination(model, batches(samples(model)), head="top")
    with pytest.raises(AnatomyError, match="Found no blocks by blocks='x'"):
        general_discrimination(model, batches(samples(model)), blocks="x")


def test_labels_may_be_lists_and_half_precision_is_widened():
    model = tiny_resnet()
    listed = [{**batch, "labels": batch["labels"].tolist()} for batch in batches(samples(model))]
    assert general_discrimination(model, listed) == general_discrimination(model, batches(samples(model)))
    half = [{**b, "pixel_values": b["pixel_values"].bfloat16()} for b in batches(samples(model, shift=5.0))]
    assert general_discrimination(model.bfloat16(), half).linear_probe == 1.0


def test_nearest_mean_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(200, 6)), generator.integers(-2, 3, 200)
    mine, theirs = (kind.fit(features[:150], labels[:150]) for kind in (_NearestMean(), NearestCentroid()))
    assert (mine.predict(features) == theirs.predict(features)).all()


def test_a_collapsed_network_is_measured_without_a_warning():
    model = tiny_resnet()
    with torch.no_grad():
        for parameter in model.resnet.parameters():
            parameter.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = general_discrimination(model, batches(samples(model)))
    assert found == Discrimination(1 / 3, 1 / 3, 45, 3), "every prediction is the same class"


def test_model_and_random_states_are_left_as_they_were():
    model = tiny_efficientnet().train()
    rows = [dict(zip(samples(model), row, strict=True)) for row in zip(*samples(model).values(), strict=True)]
    loader = DataLoader(rows, batch_size=8, shuffle=True)
    weights = snapshot(model)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = general_discrimination(model, loader)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    torch.manual_seed(99)
    assert general_discrimination(model, loader) == first, "dropout ran, or the loader drew other numbers"
    assert all(module.training for module in model.modules())
    same_tensors(snapshot(model), weights)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- what is refused


class Tokens(nn.Module):
    """A classifier whose head takes whole sequences, or is not called."""

    def __init__(self, call=True):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])
        self.classifier, self.call = nn.Linear(4, 3), call

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x) if self.call else x


def test_bad_input_is_refused():
    model = tiny_resnet()
    inputs = samples(model)
    fine = batches(inputs)

    def refused(match, loader=fine, model=model, **options):
        with pytest.raises(OptionError, match=match):
            general_discrimination(model, loader, **options)

    def labelled(labels):
        return [{"pixel_values": inputs["pixel_values"], "labels": torch.as_tensor(labels)}]

    refused("yielded no samples", [])
    refused("yielded no samples", [{name: values[:0] for name, values in inputs.items()}])
    used = iter(fine)
    list(used)
    refused("an iterator can only be used once", used)
    refused("a batch is a tuple", [(1, 2)])
    refused(r"no 'labels', only 'pixel_values'", [{"pixel_values": inputs["pixel_values"]}])
    refused(r"labels are torch.float32 of shape \(45,\)", labelled(inputs["labels"].float()))
    refused(r"labels are torch.int64 of shape \(45, 1\)", labelled(inputs["labels"][:, None]))
    refused(r"head's input is \(45, 16\), not one vector for each of 44 samples", labelled(inputs["labels"][:44]))
    refused("all 45 samples belong to class 8", labelled([8] * 45))
    refused(r"class 5 has 3 samples, fewer than folds=5: .* or set folds=3", labelled([4] * 42 + [5] * 3))
    refused(r"class -5 has 1 sample, fewer than folds=2: add more or remove it", labelled([4] * 44 + [-5]), folds=2)
    refused("class 40 has 15 samples, fewer than folds=16", folds=16, loader=labelled([40] * 15 + [3] * 30))
    refused("folds=1 leaves nothing", folds=1)
    tokens = [{"x": torch.randn(6, 5, 4), "labels": torch.arange(6) % 2}]
    refused(r"head's input is \(6, 5, 4\), not one vector", tokens, Tokens())
    refused("head's input is None, not one vector", tokens, Tokens(call=False))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_named(value):
    model = tiny_resnet()
    inputs = samples(model)
    inputs["pixel_values"][[3, 20]] = value
    with pytest.raises(OptionError, match="features of 2 of 45 samples are not finite: the model has diverged"):
        general_discrimination(model, batches(inputs))


# --- plot


def history(*values):
    return [(4 * n, {"birds": Discrimination(v, v / 2, 9, 3)}) for n, v in enumerate(values)]


@pytest.fixture
def drawn(monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file: (figures.append(self), save(self, file)))
    return figures


def test_plot_has_a_line_per_run(tmp_path, drawn):
    plot_discrimination({"soft": history(0.8, 0.6), "full": history(0.8, 0.2)}, tmp_path / "plot.png")
    lines = [[(list(x.get_xdata()), list(x.get_ydata())) for x in axis.get_lines()] for axis in drawn[0].axes]
    assert lines[0] == [([0, 4], [0.8, 0.6]), ([0, 4], [0.8, 0.2])]
    assert lines[1] == [([0, 4], [0.4, 0.3]), ([0, 4], [0.4, 0.1])]
    assert [axis.get_title() for axis in drawn[0].axes] == ["linear probe", "nearest class mean"]
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["soft", "full"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_has_a_style_per_loader(tmp_path, drawn):
    both = [(step, {**found, "cars": Discrimination(0.1, 0.1, 9, 3)}) for step, found in history(0.8, 0.6)]
    plot_discrimination({"soft": both, "full": history(0.5)}, tmp_path / "plot.svg")
    lines = drawn[0].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["soft, birds", "soft, cars", "full, birds"]
    assert [(line.get_color(), line.get_linestyle()) for line in lines] == [("C0", "-"), ("C0", "--"), ("C1", "-")]


def test_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(OptionError, match="contain no measurements"):
        plot_discrimination({"soft": []}, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_plot_names_the_extra(monkeypatch, tmp_path):
    find = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"plot_discrimination needs matplotlib: .*hf-ft\[report\]"):
        plot_discrimination({"soft": history(0.8)}, tmp_path / "plot.png")


# --- callback


class Keep(TrainerCallback):
    """Keeps the metrics of each evaluation, and the weights that were evaluated."""

    def __init__(self):
        self.metrics, self.weights = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(snapshot(model))

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        self.metrics.append(dict(metrics))
        self.weights.append(snapshot(model))


def trained(folder, *callbacks, model=None, resume=None, **arguments):
    arguments = {"eval_strategy": "steps", "eval_steps": 4, **arguments}
    trainer = make_trainer(tiny_resnet() if model is None else model, "full", folder, **arguments)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def loaders(model):
    shifted = samples(model, 30, shift=0.05, seed=5, classes=CLASSES[:2])
    return {"birds": batches(samples(model, shift=0.05)), "cars": batches(shifted)}


@pytest.mark.slow
def test_callback_logs_what_the_function_gives(tmp_path):
    callback, keep = GeneralDiscriminationCallback(loaders(tiny_resnet()), folds=3, seed=2), Keep()
    trainer = trained(tmp_path, callback, keep)
    assert [step for step, _ in callback.history] == [0, 4, 8]
    model = tiny_resnet()
    for (_, found), weights in zip(callback.history, keep.weights, strict=True):
        model.load_state_dict(weights)
        expected = {n: general_discrimination(model, x, folds=3, seed=2) for n, x in callback.loaders.items()}
        assert found == expected
    assert callback.history[0][1] != callback.history[-1][1]
    entries = [entry for entry in trainer.state.log_history if "discrimination/birds/linear_probe" in entry]
    assert [entry["step"] for entry in entries] == [0, 4, 8] and [entry["epoch"] for entry in entries] == [0, 1, 2]
    for (_, found), entry in zip(callback.history, entries, strict=True):
        for name, result in found.items():
            assert entry[f"discrimination/{name}/linear_probe"] == result.linear_probe
            assert entry[f"discrimination/{name}/nearest_class_mean"] == result.nearest_class_mean
    for entry, metrics in zip(entries[1:], keep.metrics, strict=True):
        assert "eval_loss" in metrics
        figures = {name: value for name, value in metrics.items() if name.startswith("discrimination/")}
        assert len(figures) == 4 and figures.items() <= entry.items()


@pytest.mark.slow
def test_training_is_the_same_with_the_callback(tmp_path):
    """With dropout, whose masks are random, and BatchNorm, whose statistics follow its inputs."""
    model = tiny_efficientnet()
    assert any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    rows = [dict(zip(samples(model), row, strict=True)) for row in zip(*samples(model).values(), strict=True)]
    callback = GeneralDiscriminationCallback({"birds": DataLoader(rows, batch_size=16, shuffle=True)})
    watched = trained(tmp_path, callback, model=model, eval_steps=2)
    alone = trained(tmp_path, model=tiny_efficientnet(), eval_steps=2)
    assert len(callback.history) == 5
    same_tensors(snapshot(watched.model), snapshot(alone.model))


@pytest.mark.slow
def test_a_resumed_run_measures_from_where_it_is(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole, resumed = (GeneralDiscriminationCallback(loaders(tiny_resnet())) for _ in range(2))
    trained(tmp_path, whole, **saving)
    trained(tmp_path, resumed, resume=str(tmp_path / "checkpoint-4"), **saving)
    assert resumed.history == whole.history[2:]


@pytest.mark.slow
def test_an_evaluation_at_the_start_is_the_first_measurement(tmp_path):
    callback, keep = GeneralDiscriminationCallback(loaders(tiny_resnet())), Keep()
    trained(tmp_path, callback, keep, eval_on_start=True)
    assert [step for step, _ in callback.history] == [0, 4, 8]
    assert keep.metrics[0]["discrimination/cars/linear_probe"] == callback.history[0][1]["cars"].linear_probe


def test_only_the_first_process_measures(tmp_path):
    callback = GeneralDiscriminationCallback(loaders(tiny_resnet()))
    trainer = trained(tmp_path)
    trainer.state.is_world_process_zero, trainer.state.global_step, metrics = False, 0, {}
    callback.on_train_begin(trainer.args, trainer.state, None, model=trainer.model)
    callback.on_evaluate(trainer.args, trainer.state, None, model=trainer.model, metrics=metrics)
    assert not callback.history and not metrics


def test_a_run_that_diverges_is_measured_to_its_end(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ft.diagnostics.discrimination.logger.warning", said.append)
    callback = GeneralDiscriminationCallback({"birds": batches(samples(tiny_resnet()))})
    trainer = trained(tmp_path, callback, learning_rate=1e30)
    assert trainer.state.global_step == 8
    assert not said[0].startswith("general") and "birds: " in said[0] and "diverged" in said[0]
    last = callback.history[-1][1]["birds"]
    assert math.isnan(last.linear_probe) and math.isnan(last.nearest_class_mean) and len(callback.history) == 3


def test_a_bad_loader_stops_the_run_before_its_first_step(tmp_path):
    with pytest.raises(OptionError, match="give each a name"):
        GeneralDiscriminationCallback(loaders(tiny_resnet())["birds"])
    few = {"birds": batches(samples(tiny_resnet(), 12))}
    with pytest.raises(OptionError, match="has 4 samples"):
        trained(tmp_path, GeneralDiscriminationCallback(few))


def test_names_are_among_the_diagnostics():
    for name in ("Discrimination", "GeneralDiscriminationCallback", "general_discrimination", "plot_discrimination"):
        assert (
            name in diagnostics.__all__ and getattr(diagnostics, name).__module__ == "hf_ft.diagnostics.discrimination"
        )
