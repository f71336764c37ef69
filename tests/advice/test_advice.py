"""``hf_ft.advice``: its figures against independent references, its rules, and how it is evaluated."""

import copy
import itertools
import json
import logging
import math
import random
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import ViTImageProcessorPil, default_data_collator

from docs.tools.tables import ROOT, documented
from hf_ft import FTConfig, OptionError, Plan, anatomy, register
from hf_ft.advice import Advice, Shift, Signals, advise, how_often_right, recommend
from hf_ft.advice import measure as measuring
from hf_ft.advice.evidence import RULES_ALONE
from hf_ft.advice.regret import expected_best, fixed_order, judged_table, summary
from hf_ft.advice.rules import declared_rules, neutral_order
from hf_ft.advice.signals import FIGURES, explained
from hf_ft.advice.transferability import (
    cross_validated_probe,
    cross_validated_relationship,
    fit_probe,
    log_evidence,
    logme,
)
from hf_ft.cli import advise as command
from hf_ft.cli import main
from hf_ft.core import config as registry
from hf_ft.core.advising import DEARER, HEAD_ALONE, Rule
from hf_ft.core.config import strategies
from hf_ft.models.batch_norm import convert_batch_norm, estimate_batch_norm
from hf_ft.models.norms import batch_norms
from hf_ft.testing import tiny_data
from hf_ft.testing.models import tiny_bert, tiny_collaborative, tiny_distilbert, tiny_resnet, tiny_roberta, tiny_vit
from hf_ft.testing.training import equipped, same_tensors, snapshot
from tests.functional_dropout import tiny

pytestmark = pytest.mark.usefixtures("shipped_strategies")

# LogME


def direct_evidence(features, target):
    """The highest log density of the target under N(0, I / beta + F F^T / alpha), by direct search."""
    samples, gram = len(features), features @ features.T

    def loss(logs):
        alpha, beta = np.exp(np.clip(logs, -30, 30))
        covariance = np.eye(samples) / beta + gram / alpha
        determinant = np.linalg.slogdet(covariance)[1]
        return (determinant + target @ np.linalg.solve(covariance, target) + samples * np.log(2 * np.pi)) / 2 / samples

    starts = [(0, 0), (5, 0), (-4, 3), (3, 3), (9, 1)]
    options = {"xatol": 1e-7, "fatol": 1e-12, "maxiter": 2000}
    return -min(minimize(loss, start, method="Nelder-Mead", options=options).fun for start in starts)


@pytest.mark.parametrize(
    ("samples", "size", "signal"),
    [(30, 4, 1.0), (30, 4, 0.0), (12, 40, 1.0), (12, 40, 0.0), (15, 15, 0.5), (30, 1, 1.0)],
)
def test_log_evidence_is_the_maximum(samples, size, signal):
    rng = np.random.default_rng(samples + size)
    features = rng.normal(size=(samples, size)) * rng.uniform(0.1, 3, size)
    logits = features @ rng.normal(size=size) * signal + rng.normal(size=samples)
    targets = np.stack([logits > 0, logits > 0.5], axis=1).astype(float)
    wanted = [direct_evidence(features, target) for target in targets.T]
    assert log_evidence(features, targets) == pytest.approx(wanted, abs=1e-6)


def test_logme_of_constant_features():
    labels = np.array([0] * 12 + [1] * 8)
    wanted = np.mean([direct_evidence(np.full((20, 1), 2.0), (labels == c).astype(float)) for c in (0, 1)])
    assert logme(np.full((20, 3), 7.0), labels) == pytest.approx(wanted, abs=1e-6)
    nothing = np.mean([-0.5 * (np.log(2 * np.pi * share) + 1) for share in (0.6, 0.4)])  # the density of noise alone
    assert logme(np.zeros((20, 3)), labels) == pytest.approx(nothing)


def test_logme_does_not_depend_on_what_it_should_not():
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=40)
    features = rng.normal(size=(40, 6)) + labels[:, None]
    value, order = logme(features, labels), rng.permutation(40)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    others = [(features @ rotation, labels), (features * 1e3, labels), (features[order], labels[order])]
    others += [(features, 5 - 2 * labels), (np.hstack([features, np.zeros((40, 4))]), labels)]
    for changed, renamed in others:
        assert logme(changed, renamed) == pytest.approx(value, abs=1e-8)
    assert logme(rng.normal(size=(40, 6)), labels) < value - 0.1


def test_logme_at_the_edges():
    rng = np.random.default_rng(2)
    assert math.isfinite(logme(rng.normal(size=(3, 5)), np.array([0, 1, 2])))  # one sample per class
    assert math.isfinite(logme(rng.normal(size=(2, 1)), np.array([0, 1])))
    labels = np.array([0, 1] * 10)
    exact = logme(np.eye(2)[labels], labels)  # the features are the labels
    assert math.isfinite(exact) and exact > logme(np.eye(2)[labels] + rng.normal(size=(20, 2)) / 10, labels)


# The probe


def clusters(samples=60, classes=3, size=5, distance=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    return rng.normal(size=(samples, size)) + distance * rng.normal(size=(classes, size))[labels], labels


def test_probe_is_logistic_regression_under_cross_validation():
    features, labels = clusters()
    found = cross_validated_probe(features, labels, seed=3)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    scores = cross_val_score(model, features, labels, cv=folds, scoring="balanced_accuracy")
    assert (found.balanced_accuracy, found.std) == pytest.approx((scores.mean(), statistics.stdev(scores)))
    assert found.folds == 5 and 0.5 < found.accuracy < 1
    assert cross_validated_probe(*clusters(distance=30)).balanced_accuracy == 1
    noise = cross_validated_probe(*clusters(samples=600, distance=0))
    assert abs(noise.balanced_accuracy - 1 / 3) < 0.06


def test_probe_of_rare_classes():
    features, labels = clusters(samples=23, classes=2, distance=8)
    labels = labels + 2 * (np.arange(23) == 0)  # one sample of a third class, left out
    found = cross_validated_probe(features, labels)
    assert found.balanced_accuracy == 1 and found.folds == 5
    assert cross_validated_probe(features[:4], np.array([0, 0, 1, 1])).folds == 2
    assert cross_validated_probe(features[:3], np.array([0, 0, 1])) is None
    assert cross_validated_probe(features[:3], np.array([0, 1, 2])) is None


def test_relationship_of_source_classes():
    """Source classes 0 and 1 are the target's class 0, source class 2 is class 1; then without any relation."""
    rng = np.random.default_rng(0)
    labels = np.array([0] * 60 + [1] * 12)
    source = np.where(labels == 1, 2, rng.integers(2, size=72))
    sure = 0.9 * np.eye(4)[source] + 0.025
    assert cross_validated_relationship(sure, labels).balanced_accuracy == 1
    unrelated = cross_validated_relationship(rng.dirichlet(np.ones(50), 600), np.arange(600) % 3)
    assert abs(unrelated.balanced_accuracy - 1 / 3) < 0.06
    # By hand, on two folds of two samples each: means of one sample per class, its shares, and the larger sum.
    theta = np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.9, 0.1]])
    found = cross_validated_relationship(theta, np.array([0, 1, 0, 1]), seed=0)
    right = []
    for train, test in StratifiedKFold(2, shuffle=True, random_state=0).split(theta, [0, 1, 0, 1]):
        first, second = sorted(train, key=lambda row: row % 2)
        for row in test:
            shares = theta[first] / (theta[first] + theta[second])
            right.append(((theta[row] * shares).sum() >= (theta[row] * (1 - shares)).sum()) == (row % 2 == 0))
    assert found.folds == 2 and found.accuracy == np.mean(right)


@pytest.mark.parametrize("classes", [2, 4])
def test_fitted_probe_gives_the_probabilities_of_the_regression(classes):
    features, labels = clusters(classes=classes)
    features[:, 0] = 3.0  # a constant feature causes no division by zero
    scaled = StandardScaler().fit(features)
    wanted = LogisticRegression(max_iter=200).fit(scaled.transform(features), labels)
    probe = fit_probe(features, labels + 5)
    logits = torch.as_tensor(features @ probe.weight.T + probe.bias)
    assert logits.softmax(1).numpy() == pytest.approx(wanted.predict_proba(scaled.transform(features)), abs=1e-6)
    assert probe.classes.tolist() == [5 + c for c in range(classes)]


# On a model


def batches(model, samples=32, seed=0, size=32):
    data = tiny_data(model, samples, seed)
    return [default_data_collator([data[i] for i in range(k, min(k + size, samples))]) for k in range(0, samples, size)]


def test_shift_of_batch_norm():
    """Compared with the formulas by hand, on the inputs that hooks see."""
    model, inputs = tiny_resnet(), {}
    for name, norm in batch_norms(model):
        norm.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0].double()}))
    statistics_of = estimate_batch_norm(model, batches(model), "pooled")
    found = measuring.shifts(model, statistics_of)
    assert set(found) == set(inputs) and len(found) == 8
    for name, norm in batch_norms(model):
        values = inputs[name].detach().numpy().swapaxes(0, 1).reshape(norm.num_features, -1)
        source, there = norm.running_var.double().numpy() + norm.eps, values.var(1) + norm.eps
        moved = np.abs(values.mean(1) - norm.running_mean.double().numpy()) / np.sqrt((source + there) / 2)
        assert found[name].mean == pytest.approx(moved.mean(), rel=1e-5)
        assert found[name].spread == pytest.approx(np.abs(np.log(np.sqrt(there / source))).mean(), rel=1e-5)
    converted = convert_batch_norm(tiny_resnet(), statistics_of)
    for shift in measuring.shifts(converted, statistics_of).values():
        assert shift.mean == pytest.approx(0, abs=1e-5) and shift.spread == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_bert])
def test_relative_gradients(make):
    """Compared with those of the model itself, with the probe as its classifier."""
    model, parts = make(), anatomy(make())
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    rng = np.random.default_rng(0)
    size, labels = last.in_features, np.arange(60) % 3
    probe = fit_probe(rng.normal(size=(60, size)) + labels[:, None], labels)
    backbone = [part for part in parts.parts if part.name != "head"]
    given = batches(model, 48, size=24)
    found = measuring.relative_gradients(model, probe, iter(given), backbone, parts.head.modules)
    assert all(p.grad is None for p in model.parameters())

    last.weight.data, last.bias.data = torch.tensor(probe.weight).float(), torch.tensor(probe.bias).float()
    ratios = dict.fromkeys([part.name for part in backbone], 0.0)
    for batch in given:
        model.zero_grad()
        model.eval()(**batch).loss.backward()
        for part in backbone:
            inside = [p for n, p in model.named_parameters() if any(f"{n}.".startswith(f"{m}.") for m in part.modules)]
            squares = [
                sum(float((t**2).sum()) for t in ts) for ts in zip(*[(p.grad, p.data) for p in inside], strict=True)
            ]
            ratios[part.name] += math.sqrt(squares[0] / squares[1])
    total = sum(ratios.values())
    assert found == pytest.approx({name: value / total for name, value in ratios.items()}, rel=1e-3)
    assert sum(found.values()) == pytest.approx(1)


def test_gradients_where_little_trains():
    model = tiny_resnet()
    model.resnet.encoder.requires_grad_(False)
    assert list(look(model).signals.gradients) == ["stem"] and look(model).signals.gradient_depth is None
    model.resnet.requires_grad_(False)
    found = look(model)
    assert found.signals.gradients == {} and found.signals.gradient_ratio is None
    assert ("relative gradient", "-", "no part of the backbone is trained") in explained(found.signals)


def test_reversible_layers_have_no_gradients_in_eval_mode():
    """They are not measured, since Reformer would refuse."""
    found = look(tiny("reformer"))
    assert found.signals.gradients == {} and found.signals.probe_accuracy is not None


def look(model, samples=32, **options):
    return advise(model, tiny_data(model, samples), default_data_collator, **options)


@pytest.mark.slow
def test_model_and_random_states_are_left_alone():
    model = tiny_resnet()
    model.train()
    model.resnet.encoder.stages[0].eval()
    modes, before, calls = [m.training for m in model.modules()], snapshot(model), []
    model.register_forward_hook(lambda module, args, kwargs, output: calls.append(0), with_kwargs=True)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    wanted = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    found = look(model, 80).signals
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == wanted
    same_tensors(snapshot(model), before)
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    # Two samples show the layout of the head's input; then all pass, and some again with gradients.
    assert len(calls) == 1 + 3 + 3 and (found.forward_samples, found.backward_samples) == (80, 80)
    assert replace(look(model, 80).signals, seconds=found.seconds) == found  # and the same again


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert, tiny_roberta, tiny_distilbert])
def test_advice_on_images_and_text(make):
    model = make()
    found = look(model, 40)
    s = found.signals
    counts = sorted(np.unique(tiny_data(model, 40)["labels"], return_counts=True)[1])
    assert s.samples == 40 and list(s.class_counts) == counts and s.trainable_parameters == model.num_parameters()
    assert (s.batch_norm == {}) == (make is not tiny_resnet) and s.source_relation is None
    modules = {part.name: [model.get_submodule(m) for m in part.modules] for part in anatomy(model).parts[:-1]}
    assert list(s.gradients) == [name for name, ms in modules.items() if any(list(m.parameters()) for m in ms)]
    assert 0 <= s.probe_balanced_accuracy <= 1 and s.logme < 1 and s.evidence_r2 < 0.9
    assert sorted(found.order) == sorted(strategies()) and len(set(found.order)) == len(found.order)
    assert set(found.order) - set(found.usable) >= {"soft", "lwf", "co_tuning", "amcf"}
    assert ("daft" in found.usable) == (make is tiny_resnet)
    assert set(found.usable) == set(found.order[: len(found.usable)])
    assert Advice.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert all(all(isinstance(cell, str) for cell in row) for row in explained(s))


@pytest.mark.slow
def test_source_head():
    model = equipped(tiny_resnet(), "lwf")
    found = look(model, 60, source_head=True, source_data=True, members=2)
    assert found.signals.source_skill is not None and {"soft", "lwf", "co_tuning"} <= set(found.usable)
    named = [reason.text for one in found.recommendations for reason in one.reasons if one.strategy == "amcf"]
    assert "2 source models are available [Feng et al., 2024]" in named and "amcf" in found.usable
    free = look(model, 60, source_head=True)
    assert "soft" in free.usable  # source-free


def test_more_samples_than_the_limit(monkeypatch):
    monkeypatch.setattr(measuring, "LIMIT", 24)
    model = tiny_resnet()
    s = look(model, 60).signals
    assert (s.forward_samples, s.backward_samples, s.samples, sum(s.class_counts)) == (24, 24, 60, 60)
    data = tiny_data(model, 60)
    s = advise(model, [data[i] for i in range(60)], default_data_collator).signals  # labels that cannot be told apart
    assert s.samples == 60 and abs(sum(s.class_counts) - 60) <= 2


def test_classes_of_a_single_group_are_neither_probed_nor_guessed():
    model = tiny_resnet(num_labels=4)
    labels = [i // 20 for i in range(80)]
    data = tiny_data(model, 80).remove_columns("labels").add_column("labels", labels).with_format("torch")
    groups = [i if i < 40 else f"of class {labels[i]}" for i in range(80)]
    s = advise(model, data, default_data_collator, groups=list(map(str, groups))).signals
    assert (s.classes, s.probe_classes, s.chance) == (4, 2, 0.5)
    assert s.probe_skill == pytest.approx(2 * s.probe_balanced_accuracy - 1)


@pytest.mark.parametrize("as_list", [False, True])
def test_samples_without_label_count_for_nothing_but_batch_norm(as_list):
    model = tiny_resnet()
    data = tiny_data(model, 90)
    labels = [-100 if i % 3 == 0 else int(label) for i, label in enumerate(data["labels"])]
    some = data.remove_columns("labels").add_column("labels", labels).with_format("torch")
    counts = sorted(labels.count(c) for c in range(3))
    s = advise(model, [some[i] for i in range(90)] if as_list else some, default_data_collator).signals
    assert (s.samples, list(s.class_counts), s.forward_samples, s.backward_samples) == (60, counts, 90, 60)


def test_what_is_refused(monkeypatch):
    model = tiny_resnet()
    data = [tiny_data(model)[i] for i in range(32)]
    cases = [
        ([{**row, "labels": torch.tensor(0)} for row in data], "the same label, but at least two classes"),
        ([{**row, "labels": torch.tensor(0.5)} for row in data], r"'labels' are torch.float32 \(32,\)"),
        ([{"pixel_values": row["pixel_values"]} for row in data], "'labels' are NoneType"),
        ([{**row, "pixel_values": row["pixel_values"] / 0} for row in data], "not finite"),
        (iter(data), "map-style"),
    ]
    for bad, message in cases:
        with pytest.raises(OptionError, match=message):
            advise(model, bad, default_data_collator)
    with pytest.raises(OptionError, match="members=<number of members"):
        look(tiny_collaborative())


# Rules


def signals(skill=0.5, each=50, classes=2, **changed):
    """Signals for which only the rules of the baseline and of partly good features hold, unless changed."""
    chance = 1 / classes
    usual = {
        "samples": each * classes,
        "class_counts": (each,) * classes,
        "trainable_parameters": each * classes,
        "feature_size": 8,
        "logme": 0.0,
        "logme_constant": 0.0,
        "probe_accuracy": 0.5,
        "probe_balanced_accuracy": None if skill is None else chance + skill * (1 - chance),
        "probe_std": 0.0,
        "probe_folds": 5,
        "batch_norm": {"norm": Shift(0.3, 0.0)},
        "gradients": {"stem": 0.25, "block0": 0.5, "block1": 0.25},
        "source_head": True,
        "source_data": False,
    }
    return Signals(**{**usual, **changed})


def shifted(mean, spread=0.0):
    return {"norm": Shift(mean, spread)}


def order(*args, **changed):
    return [found.strategy for found in recommend(signals(*args, **changed), RULES_ALONE)]


def points(name, *args, **changed):
    return next(found.score for found in recommend(signals(*args, **changed), RULES_ALONE) if found.strategy == name)


def test_good_features_and_few_samples_try_the_head_first():
    assert order(0.9)[:2] == ["linear_probe", "lp_ft"]
    assert points("blockwise", 0.9) > points("blockwise", 0.5)
    assert order(0.9, each=500)[0] == "lp_ft"


def test_poor_features_and_enough_samples_train_everything():
    found = order(0.1, each=500)
    assert found[:3] == ["full", "layer_decay", "daft"] and found.index("linear_probe") > found.index("soft")


@pytest.mark.slow
def test_shifted_batch_norm_tries_daft_early_and_everything_before_the_head():
    concentrated = {"stem": 0.02, "block0": 0.03, "block1": 0.95}
    for skill, each, spread in itertools.product((None, 0.0, 0.5, 1.0), (5, 50, 500), (0.0, 2.0)):
        more = {"gradients": concentrated, "trainable_parameters": 10**8}
        found = order(skill, each, batch_norm=shifted(0.6, spread), **more)
        assert found.index("full") < found.index("linear_probe") and found.index("daft") < 4
    assert order(0.5, batch_norm=shifted(0.6))[:2] == ["full", "daft"]


@pytest.mark.slow
def test_other_rules_move_their_strategies():
    assert points("daft", batch_norm=shifted(0.1)) < points("daft")
    concentrated = {"stem": 0.05, "block0": 0.05, "block1": 0.9, "block2": 0.0}
    assert points("blockwise", gradients=concentrated) > points("blockwise")
    low, high = {"stem": 0.6, "block0": 0.3, "block1": 0.1}, {"stem": 0.1, "block0": 0.3, "block1": 0.6}
    assert points("layer_decay", gradients=low) < points("layer_decay") < points("layer_decay", gradients=high)
    for name in ("l2_sp", "delta", "bss", "tred", "attention_transfer", "co_tuning"):
        assert points(name, each=10) > points(name, each=50)
    related = {"source_relation": 0.9, "source_data": True}
    assert order(0.5, **related)[0] == "soft" and points("co_tuning", **related) > points("co_tuning")
    assert points("lwf", source_relation=0.5) < points("lwf")
    assert points("amcf", members=2) > 0 and order()[-1] == "amcf"  # it cannot run on a single model
    assert points("l2_sp", 0.1, each=50) < points("l2_sp", 0.5, each=50)  # nothing to preserve


def test_what_cannot_run_is_ranked_below_what_can():
    found = recommend(signals(batch_norm={}, source_head=False))
    assert [one.strategy for one in found if not one.usable] == [one.strategy for one in found][-6:]
    reasons = {one.strategy: one.reasons[0] for one in found if not one.usable}
    assert set(reasons) == {"daft", "soft", "lwf", "co_tuning", "amcf", "stoch_norm"}
    assert "convert_batch_norm=False" in reasons["daft"].text and reasons["daft"].figure_name == "batch_norm_layers"
    assert reasons["lwf"].figure_name == "source_head"


def test_full_names_kept_statistics_where_there_are_any():
    def reasons(**measured):
        return [one.reasons for one in recommend(signals(**measured)) if one.strategy == "full"][0]

    said = [one for one in reasons(batch_norm=shifted(0.3)) if one.figure_name == "batch_norm_layers"]
    assert len(said) == 1 and "--full.norm_mode eval" in said[0].text and said[0].points == 0
    assert not any(one.figure_name == "batch_norm_layers" for one in reasons(batch_norm={}))


def test_ties_are_in_the_neutral_order():
    found = recommend(signals(None, batch_norm=shifted(0.3)), RULES_ALONE)
    same = [one.strategy for one in found if one.score == 0]
    assert len(same) > 5 and same == [name for name in neutral_order() if name in same]
    assert set(documented()) == set(neutral_order()) and set(fixed_order()) == set(neutral_order())


def test_every_rule_can_hold_and_reports_its_figure():
    figures = signals().figures()
    assert set(figures) == set(FIGURES)
    for rule, by_strategy in declared_rules().items():
        assert set(by_strategy) <= set(neutral_order()) and {name for name, _, _ in rule.when} <= set(FIGURES)
        lower = {name: threshold for name, sign, threshold in rule.when if sign == ">="}
        upper = {name: threshold for name, sign, threshold in rule.when if sign == "<"}
        assert all(lower[name] < upper[name] for name in set(lower) & set(upper))
        holding = figures | upper | lower
        holding |= {name: threshold - 1e-9 for name, threshold in upper.items() if name not in lower}
        assert rule.holds(holding)
        assert any(f"{{{name}:" in rule.because for name, _, _ in rule.when)
        for name, sign, threshold in rule.when:
            assert not rule.holds({**holding, name: threshold - 1e-9 if sign == ">=" else threshold})
            assert not rule.holds({**holding, name: None})
    for found in recommend(signals()):
        assert found.reasons and found.score == sum(reason.points for reason in found.reasons)
        assert all(reason.value is not None and reason.figure_name for reason in found.reasons)


def test_third_party_strategies_are_ranked_last(monkeypatch):
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))

    @register("new_one")
    @dataclass(frozen=True, kw_only=True)
    class NewConfig(FTConfig):
        def plan(self, model, state):
            return Plan()

    last = recommend(signals())[-1]
    assert last.strategy == "new_one" and last.usable and [r.text for r in last.reasons] == ["no rule covers it"]


def test_third_party_strategies_can_declare_rules_and_a_cost(monkeypatch):
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    few = Rule((("class_median", "<", 60),), "{class_median:.0f} samples a class")

    @register("new_one")
    @dataclass(frozen=True, kw_only=True)
    class NewConfig(FTConfig):
        cost = HEAD_ALONE - DEARER
        advice = {few: 9, Rule((("members", ">=", 2),), "{members:.0f} are too many", source=""): None}

        def plan(self, model, state):
            return Plan()

    first = recommend(signals(), RULES_ALONE)[0]
    assert (first.strategy, first.score, first.reasons[0].text) == ("new_one", 9, "50 samples a class [ours]")
    assert neutral_order()[0] == "new_one" and declared_rules()[few] == {"new_one": 9}
    refused = next(found for found in recommend(signals(members=2)) if found.strategy == "new_one")
    assert not refused.usable and refused.reasons[0].text == "2 are too many"
    assert order(None, each=500, batch_norm=shifted(0.3), gradients={})[0] != "new_one"  # the baseline has a point


def test_figures():
    s = signals(0.5, class_counts=(1, 4, 20), samples=25, logme=-0.5, logme_constant=-1.0)
    assert (s.classes, s.class_min, s.class_median, s.imbalance, s.majority) == (3, 1, 4, 20, 0.8)
    assert s.evidence_r2 == pytest.approx(1 - math.exp(-1)) and signals(logme=-2.0).evidence_r2 == 0
    assert s.chance == 0.5 and s.probe_skill == 0.5  # the probe leaves out the class of one sample
    assert s.gradient_top == "block0" and s.gradient_ratio == 1.5 and s.gradient_depth == 0.5
    wide = signals(batch_norm={"a": Shift(0.2, 0.4), "b": Shift(0.6, 0.0)})
    assert (wide.mean_shift, wide.spread_shift) == pytest.approx((0.4, 0.2))
    assert Signals.from_dict(json.loads(json.dumps(wide.to_dict()))) == wide
    frozen = signals(trainable_parameters=0)
    assert json.loads(json.dumps(frozen.to_dict(), allow_nan=False))["figures"]["samples_per_parameter"] is None
    with pytest.raises(ValueError, match="not signals: 'class_counts' is missing"):
        Signals.from_dict({"samples": 3})
    with pytest.raises(ValueError, match="recommendations of an advice: 'recommendations' is missing"):
        Advice.from_dict({"signals": {}})


# Judging


def test_how_often_right():
    task = {"task": "cells", "advice": ["b", "x", "a", "c", "d"], "full_std": 0.01}
    scores = {"a": 0.9, "b": 0.6, "c": 0.8, "d": 0.7}
    (row,) = how_often_right([{**task, "scores": scores}], fixed=("d", "c", "nothing"))
    assert (row["task"], row["strategies"], row["best"], row["rank"], row["in_top_3"]) == ("cells", 4, "a", 2, True)
    assert [row[f"regret_{k}"] for k in (1, 3, 5)] == pytest.approx([0.3, 0, 0])
    assert [row[f"fixed_{k}"] for k in (1, 3, 5)] == pytest.approx([0.2, 0, 0])
    # One of four: the mean 0.75. Three of four: only {b, c, d} lacks a, and has 0.8.
    assert [row[f"random_{k}"] for k in (1, 3, 5)] == pytest.approx([0.15, 0.025, 0])
    assert row["full_std"] == 0.01
    (tie,) = how_often_right([{"task": "t", "advice": ["a", "b", "c"], "scores": {"c": 1.0, "b": 1.0, "a": 0.0}}])
    assert (tie["best"], tie["rank"], tie["full_std"]) == ("b", 2, None)
    total = summary([row, tie])
    assert (total["first"], total["in_top_3"], total["regret_1"]) == (0, 1, pytest.approx(0.65))
    headers, shown = judged_table([row, tie])
    assert shown[0] == (
        "cells",
        "a",
        "2 of 4",
        "0.300, 0.000, 0.000",
        "0.150, 0.025, 0.000",
        "0.200, 0.000, 0.000",
        "0.010",
    )
    assert shown[2][2] == "first 0 %, in the top three 100 %" and {len(cells) for cells in shown} == {len(headers)}
    with pytest.raises(ValueError, match="'t' has scores of z"):
        how_often_right([{"task": "t", "advice": ["a"], "scores": {"z": 1.0}}])
    with pytest.raises(ValueError, match="'t' has no scores"):
        how_often_right([{"task": "t", "advice": ["a"], "scores": {}}])
    with pytest.raises(ValueError, match="no task"):
        summary([])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_expected_best_of_a_random_order(k):
    scores = [0.1, 0.5, 0.5, 0.9]
    wanted = statistics.fmean(max(found[:k]) for found in itertools.permutations(scores))
    assert expected_best(scores, k) == pytest.approx(wanted)


# The command


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Images in class folders and a checkpoint; no cache and none of our log handlers are left behind."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for index, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(100 * index)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    tiny_resnet().save_pretrained("model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("model")
    yield tmp_path
    logging.getLogger("hf_ft").handlers.clear()


@pytest.mark.slow
def test_command(photos, capsys):
    where = ["--model", "model", "--dataset", "photos", "--use_cpu", "true"]
    assert main(["advise", *where, "--source_models", "other", "--all"]) == 0
    printed = capsys.readouterr().out
    found = Advice.from_dict(json.loads((photos / "runs/advice/advice.json").read_text()))
    assert found.signals.samples == 16 and found.signals.members == 2 and found.signals.source_relation is not None
    for name, figure, _ in explained(found.signals):
        assert any(line.startswith(name) and figure in line for line in printed.splitlines())
    places = [printed.index(f"\n{place:<4}{name} ") for place, name in enumerate(found.order, 1)]
    assert places == sorted(places)
    first = next(name for name in found.usable if name != "amcf")
    assert f"hf-ft train --strategy {first} --model model --dataset photos" in printed
    if "amcf" in found.usable[:3]:
        assert "--strategy amcf --dataset photos --amcf.source_models model,other" in printed

    for _ in range(2):  # its own file may be replaced
        capsys.readouterr()
        assert main(["advise", *where, "--json", "--output_dir", "elsewhere", "--max_train_samples", "10"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((photos / "elsewhere/advice.json").read_text()) and content["signals"]["samples"] == 10


def test_first_strategies_are_printed_with_the_baseline():
    found = Advice(signals(), recommend(signals()))
    names = [row[1] for row in command.order_rows(found, 5) if row[1]]
    assert names[:5] == list(found.order[:5]) and set(names[5:]) <= {"full"} and "full" in names
    assert [row[1] for row in command.order_rows(found) if row[1]] == list(found.order)
    told = command._left_out(found, 5)
    assert told.startswith(f"{len(found.order) - len(names)} more with --all")
    assert "amcf cannot run: 1 source model is available" in told


def test_command_prints_source_free_forms(photos, monkeypatch, capsys):
    """What is recommended without source data must train without source data."""
    from hf_ft.cli import COMMANDS
    from hf_ft.cli.flags import DataFlags

    found = recommend(signals())
    soft = next(one for one in found if one.strategy == "soft")
    lines = command._next(Advice(signals(), (soft,)), DataFlags(model="m", dataset="d", train_split="my rows"), ())
    wanted = "hf-ft train --strategy soft --model m --dataset d --train_split 'my rows' --soft.source head"
    assert lines[0] == f"{wanted} --output_dir runs/soft"
    flags = DataFlags(model="m", dataset="d", source_dataset="s")
    assert "--soft.source" not in command._next(Advice(signals(), (soft,)), flags, ())[0]
    monkeypatch.setitem(COMMANDS, "compare", ("compare", ""))
    assert command._next(Advice(signals(), ()), DataFlags(model="m", dataset="d"), ()) == [
        "hf-ft compare --model m --dataset d --advise True"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "photos"], "--model is missing"),
        (["--model", "model"], "--dataset is missing"),
        (["--model", "model", "--dataset", "nowhere"], "cannot read the data 'nowhere'"),
        (["--model", "nowhere", "--dataset", "photos"], "cannot read the model 'nowhere'"),
        (["--model", "model", "--dataset", "photos", "--strategy", "full"], "leave --strategy out"),
        (["--model", "model", "--dataset", "photos", "--augment", "basic"], "--augment basic"),
        (["--model", "model", "--dataset", "photos", "--image_size", "big"], "image_size"),
        (["--model", "model", "--dataset", "photos", "--modle", "x"], "--modle is unknown. Did you mean"),
        (["--model", "model", "--dataset", "photos", "--output_dir", "model/config.json"], "is a file"),
        (["--model", "model", "--dataset", "photos", "--output_dir", "mine"], "this command did not write it"),
        (["--model", "model", "--dataset", "scores.csv", "--text_column", "text"], "read as regression"),
    ],
)
def test_command_refuses(arguments, message, photos, capsys):
    rows = [f"film {i},{i / 10}" for i in range(12)]
    Path("scores.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    Path("mine").mkdir()
    Path("mine/advice.json").write_text('{"mine": 1}')
    assert main(["advise", *arguments]) == 2
    assert Path("mine/advice.json").read_text() == '{"mine": 1}'
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_help(capsys):
    assert main(["advise", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("example:", "--source_models", "--json", "--max_train_samples", "advice.json")
    )


def test_docs_name_the_figures():
    page = (ROOT / "docs" / "advise.md").read_text()
    assert all(f"`{name}`" in page for name in FIGURES)


@pytest.mark.slow
def test_copies_of_a_model_are_not_needed():
    """The figures are the same on a copy: the first measurement leaves nothing behind."""
    model = tiny_vit()
    first = look(copy.deepcopy(model)).signals
    look(model)
    assert replace(look(model).signals, seconds=first.seconds) == first
