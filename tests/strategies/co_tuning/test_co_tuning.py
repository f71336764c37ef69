"""L = CE(h_T(f(x)), y) + 2.3 CE(h_S(f(x)), p(y_s | y)), against float64 sums written out."""

import copy
import functools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from hf_ft import CoTuningConfig, FTTrainer, OptionError, State, set_up
from hf_ft.models.source_head import SourceHead, attach_source_head, has_source_head, source_head
from hf_ft.strategies.co_tuning.relationship import direct_relationship, fit_temperature, reverse_relationship
from hf_ft.testing import same_tensors, still, tiny_bert, tiny_data, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import equipped, make_trainer, snapshot, tiny_arguments
from tests.strategies.perturbed_model import moved
from tests.strategies.pretrained_head import logits_with


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
def test_the_term(make):
    config = CoTuningConfig(weight=1.7)
    model = equipped(still(make()), config)
    relationship = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    run = set_up(model, config, states={"co_tuning": State({"relationship": relationship})})
    objective = run.objective().train()
    head = moved(run.plan.terms[0].fn.head)
    moved(model)
    inputs = tiny_inputs(model, 8)
    outputs = objective(**inputs)
    logs = log_softmax(logits_with(model, head, inputs).double().numpy(), axis=1)
    rows = relationship.double().numpy()[inputs["labels"].numpy()]
    expected = -1.7 * np.mean([sum(q * p for q, p in zip(*pair, strict=True)) for pair in zip(rows, logs, strict=True)])
    assert outputs["terms"]["co_tuning"].item() == pytest.approx(expected, rel=1e-4)
    outputs["loss"].backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("relationship", ["reverse", "direct"])
def test_the_relationship_is_learned_on_the_training_samples(relationship, tmp_path):
    """Each sample once, without augmentation, in eval mode, before any weight changes."""
    config = CoTuningConfig(relationship=relationship)
    model = equipped(tiny_resnet(), config)
    start, before = copy.deepcopy(model), snapshot(model)
    data = tiny_data(model, 40)
    groups = np.arange(40) // 2
    trainer = FTTrainer(model, tiny_arguments(tmp_path), strategy=config, train_dataset=data, groups=groups)
    found = trainer._states()["co_tuning"]
    same_tensors(before, snapshot(model))
    rows = {name: data[:][name] for name in ("pixel_values", "labels")}
    logits = logits_with(start, source_head(start), rows)
    grouped = functools.partial(reverse_relationship, groups=groups)
    learn = {"reverse": grouped, "direct": direct_relationship}[relationship]
    assert torch.allclose(found.tensors["relationship"], learn(logits, rows["labels"], 3), atol=1e-5)
    assert found.info["temperature"] == 1.0
    probabilities = softmax(logits.double().numpy(), axis=1)
    mean = np.stack([probabilities[rows["labels"].numpy() == c].mean(axis=0) for c in range(3)])
    near = np.abs(found.tensors["relationship"].numpy() - mean).max()
    assert near < 1e-5 if relationship == "direct" else near > 1e-3


@pytest.mark.slow
def test_source_data_calibrate_the_source_head(tmp_path):
    """A head that is five times overconfident gives the same relationship as one that is not."""
    found = []
    for scale in (1.0, 5.0):
        model = equipped(tiny_vit(), CoTuningConfig())
        head = source_head(model)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(scale)
        attach_source_head(model, head)
        source = tiny_data(model, 60, seed=5)
        logits = logits_with(model, head, {"pixel_values": source[:]["pixel_values"]})
        generator = torch.Generator().manual_seed(0)
        labels = torch.multinomial((logits / scale / 2).softmax(1), 1, generator=generator)[:, 0]
        source = source.remove_columns("labels").add_column("labels", labels.tolist())
        given = {"train_dataset": tiny_data(model), "source_dataset": source}
        trainer = FTTrainer(model, tiny_arguments(tmp_path), strategy=CoTuningConfig(relationship="direct"), **given)
        state = trainer._states()["co_tuning"]
        assert state.info["temperature"] == pytest.approx(fit_temperature(logits, labels), rel=1e-3)
        found.append(state)
    assert found[1].info["temperature"] == pytest.approx(5 * found[0].info["temperature"], rel=1e-2)
    assert torch.allclose(found[0].tensors["relationship"], found[1].tensors["relationship"], atol=1e-3)
    fixed = CoTuningConfig(temperature=2.0)
    assert FTTrainer(model, tiny_arguments(tmp_path), strategy=fixed, **given)._states()["co_tuning"].info[
        "temperature"
    ] == pytest.approx(2.0)


@pytest.mark.slow
def test_the_result(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = train(tiny_vit(), CoTuningConfig(), tmp_path, **saving)
    assert not has_source_head(whole.model)
    assert whole.states["co_tuning"].tensors["relationship"].shape == (3, 5)
    card = (tmp_path / "checkpoint-8" / "README.md").read_text()
    assert "source class of each target class" in card and " for 0 (" in card
    assert "Co-Tuning for Transfer Learning" in card
    resumed = make_trainer(tiny_vit(), CoTuningConfig(), tmp_path / "again", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    full, none = (
        train(tiny_vit(), "full", tmp_path / "f"),
        train(tiny_vit(), CoTuningConfig(weight=0.0), tmp_path / "n"),
    )
    same_tensors(snapshot(full.model), snapshot(none.model))


def test_calibrating_disturbs_nothing(tmp_path):
    """Augmented source data draw their own random numbers."""
    drawn = []
    for source in (False, True):
        model = equipped(tiny_resnet(), CoTuningConfig())
        data = tiny_data(model, 20, seed=2).with_transform(
            lambda rows: {**rows, "pixel_values": [torch.as_tensor(x) + torch.rand(()) for x in rows["pixel_values"]]}
        )
        given = {"train_dataset": tiny_data(model)} | ({"source_dataset": data} if source else {})
        trainer = FTTrainer(model, tiny_arguments(tmp_path), strategy="co_tuning", **given)
        torch.manual_seed(0)
        state = trainer._states()["co_tuning"]
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert state.info["temperature"] != 1.0


def test_refused(tmp_path):
    with pytest.raises(OptionError, match="hf_ft.from_pretrained"):
        FTTrainer(tiny_vit(), tiny_arguments(tmp_path), strategy="co_tuning", train_dataset=tiny_data(tiny_vit()))
    model = equipped(tiny_vit(problem_type="regression"), CoTuningConfig())
    with pytest.raises(OptionError, match="one class per sample"):
        make_trainer(model, CoTuningConfig(), tmp_path)
    with pytest.raises(OptionError, match="no relationship was measured"):
        CoTuningConfig().plan(equipped(tiny_vit(), CoTuningConfig()), State())
    model = equipped(tiny_vit(), CoTuningConfig())
    data = tiny_data(model).filter(lambda row: row["labels"] != 1)
    with pytest.raises(OptionError, match="class 1"):
        FTTrainer(model, tiny_arguments(tmp_path), strategy="co_tuning", train_dataset=data).train()
    stream = tiny_data(model).to_iterable_dataset()
    with pytest.raises(OptionError, match="train_dataset must be map-style"):
        FTTrainer(model, tiny_arguments(tmp_path), strategy="co_tuning", train_dataset=stream).train()
    with pytest.raises(OptionError, match=r"temperature=0.0 lies outside \(0, inf\)"):
        CoTuningConfig(temperature=0.0)
    assert isinstance(source_head(model), SourceHead)
