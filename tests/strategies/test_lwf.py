"""L = CE + 4 KL(softmax(h0_S(f0(x)) / 3) || softmax(h_S(f(x)) / 3)), against a float64 reference."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import log_softmax
from transformers import TrainerCallback

from hf_ft import CoTuningConfig, FTTrainer, LwFConfig, SoftConfig, set_up
from hf_ft.functional import distillation_loss
from hf_ft.models.source_head import has_source_head, source_head
from hf_ft.testing import same_tensors, still, tiny_bert, tiny_data, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import equipped, make_trainer, snapshot, tiny_arguments
from hf_ft.trainer.stage_cache import StageCache
from tests.models.heads import headed, padded
from tests.strategies.perturbed_model import moved
from tests.strategies.pretrained_head import logits_with


def reference(student, teacher, temperature):
    s, t = (log_softmax(logits.double().numpy() / temperature, axis=1) for logits in (student, teacher))
    return float(
        np.mean([sum(np.exp(b) * (b - a) for a, b in zip(*rows, strict=True)) for rows in zip(s, t, strict=True)])
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_formula(temperature):
    student, teacher = torch.randn(6, 10), 3 * torch.randn(6, 10)
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(
        reference(student, teacher, temperature), rel=1e-5
    )
    assert distillation_loss(teacher, teacher.clone(), temperature).item() == 0.0
    student = student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher.double(), temperature), student)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
def test_the_term(make, trains):
    model = equipped(still(make()), LwFConfig())
    start, first = copy.deepcopy(model).eval(), source_head(model)
    run = set_up(model, LwFConfig(weight=2.5, temperature=1.7, train_source_head=trains))
    objective = run.objective().train()
    moved(model)
    head = run.plan.terms[0].fn.head
    moved(head)
    inputs = tiny_inputs(model)
    outputs = objective(**inputs)
    student, teacher = logits_with(model, head, inputs), logits_with(start, first, inputs)
    expected = 2.5 * reference(student, teacher, 1.7)
    assert expected > 1e-3
    assert outputs["terms"]["distillation"].item() == pytest.approx(expected, rel=1e-4)
    outputs["loss"].backward()
    assert all((p.grad is not None) == trains for p in head.parameters())


def test_it_is_soft_fine_tuning_from_the_head_at_a_constant_weight(tmp_path):
    one = train(tiny_resnet(), LwFConfig(), tmp_path / "lwf")
    soft = SoftConfig(source="head", schedule="constant", train_source_head=False, norm_mode="auto")
    other = train(tiny_resnet(), soft, tmp_path / "soft")
    same_tensors(snapshot(one.model), snapshot(other.model))
    full = train(tiny_resnet(), "full", tmp_path / "full")
    assert not torch.equal(full.model.classifier[1].weight, one.model.classifier[1].weight)
    none = train(tiny_resnet(), LwFConfig(weight=0.0), tmp_path / "none")
    same_tensors(snapshot(full.model), snapshot(none.model))


@pytest.mark.parametrize("trains", [True, False])
def test_the_source_head_trains_or_stays_as_in_the_authors_toolkit(trains, tmp_path):
    model = equipped(tiny_resnet(), "lwf")
    before = snapshot(source_head(model))
    trainer = make_trainer(model, LwFConfig(train_source_head=trains), tmp_path)
    heads = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            heads.append(snapshot(trainer._attempt.objective.plan.terms[0].fn.head))

    trainer.add_callback(Keep())
    trainer.train()
    moved_away = any(not torch.equal(before[name], heads[-1][name]) for name in before)
    assert moved_away == trains
    groups = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert groups == len(list(model.parameters())) + (len(before) if trains else 0)


def test_no_source_data_are_needed_and_the_term_decays(tmp_path):
    trainer = train(tiny_vit(), SoftConfig(source="head", until=0.5), tmp_path)
    assert trainer.source_dataset is None
    assert len([1 for entry in trainer.state.log_history if "loss/distillation" in entry]) == 4


def test_predictions_are_recorded_once_before_training(tmp_path):
    """The pretrained network runs over each sample once; with random augmentation, in every step."""
    found = {}
    for kind in ("never", "recorded", "augmented"):
        model = equipped(still(tiny_resnet()), LwFConfig())
        data = tiny_data(model)
        if kind == "augmented":
            data = data.with_transform(
                lambda rows: {
                    **rows,
                    "pixel_values": [torch.as_tensor(x) + torch.rand(()) for x in rows["pixel_values"]],
                }
            )
        args = tiny_arguments(tmp_path / kind, max_steps=12)
        trainer = FTTrainer(
            model, args, strategy=LwFConfig(), train_dataset=data, frozen_cache="never" if kind == "never" else "auto"
        )
        rows = []
        begin = trainer._start_run

        def start(begin=begin, rows=rows):
            run = begin()
            if not run.reference.model.resnet.embedder._forward_pre_hooks:
                run.reference.model.resnet.embedder.register_forward_pre_hook(
                    lambda module, inputs: rows.append(len(inputs[0]))
                )
            return run

        trainer._start_run = start
        trainer.train()
        found[kind] = sum(rows), snapshot(trainer.model)
    assert found["never"][0] == found["augmented"][0] == 12 * 8
    assert found["recorded"][0] == 32
    same_tensors(found["never"][1], found["recorded"][1], 1e-6)


def test_recorded_predictions_are_not_read_once_the_weight_is_0(tmp_path, monkeypatch):
    trainer = make_trainer(tiny_resnet(), SoftConfig(source="head", until=0.5), tmp_path, max_steps=12)
    brought, present = [], StageCache.present_form

    def note(cache, inputs):
        brought.append(any("reference" in name for name in inputs))
        return present(cache, inputs)

    monkeypatch.setattr(StageCache, "present_form", note)
    trainer.train()
    assert brought[:6] == [True] * 6
    assert brought[8:] == [False] * 4  # those of the two previous steps had been fetched


def test_text_of_all_lengths_is_recorded(tmp_path, monkeypatch):
    """The head's input is one vector per sample, however long its batch is."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(1, 64, (int(n),), generator=generator), "labels": int(n) % 3}
        for n in torch.randint(3, 12, (24,), generator=generator)
    ]

    def pad(batch):
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True)
        labels = torch.tensor([row["labels"] for row in batch])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    found = []
    for cache in ("never", "auto"):
        model = equipped(still(tiny_bert()), LwFConfig())
        args = tiny_arguments(tmp_path / cache, optim="sgd")
        given = {"train_dataset": rows, "data_collator": pad, "frozen_cache": cache}
        trainer = FTTrainer(model, args, strategy=LwFConfig(), **given)
        recorded = []

        def begun(cache, steps, recorded=recorded, begin=StageCache.start):
            begin(cache, steps)
            recorded.append(cache.rows is not None and cache.rows.stored)

        with monkeypatch.context() as patch:
            patch.setattr(StageCache, "start", begun)
            trainer.train()
        assert recorded == [cache == "auto"]
        found.append(snapshot(trainer.model))
    same_tensors(*found, 1e-6)


def test_the_teacher_survives_a_resume(tmp_path):
    """It is the head at the start, not at the checkpoint."""
    saving = {"save_strategy": "steps", "save_steps": 4}
    config = LwFConfig(train_source_head=True)
    whole = train(tiny_vit(), config, tmp_path, **saving)
    resumed = make_trainer(equipped(tiny_vit(), config, seed=8), config, tmp_path / "again", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    terms = [trainer._run.plan.terms[0].fn for trainer in (whole, resumed)]
    same_tensors(snapshot(terms[0]), snapshot(terms[1]))
    assert not torch.equal(terms[0].head.module.weight, terms[0].teacher.module.weight)


@pytest.mark.parametrize("name", ["gpt2", "distilbert"])
@pytest.mark.parametrize("config", [LwFConfig(train_source_head=True), CoTuningConfig(), SoftConfig()])
def test_heads_per_token_and_of_several_modules(name, config, tmp_path):
    """The same weights with and without recorded predictions, and after resuming; nothing of the head is left."""
    found = []
    for kind in ("never", "auto", "resumed"):
        model = equipped(headed(name, 3), config)
        more = {"save_strategy": "steps", "save_steps": 4, "frozen_cache": "never" if kind == "never" else "auto"}
        trainer = make_trainer(model, config, tmp_path / kind, **more)
        trainer.train(resume_from_checkpoint=str(tmp_path / "auto" / "checkpoint-4") if kind == "resumed" else None)
        found.append(snapshot(trainer.model))
        assert not has_source_head(trainer.model) and not any("source" in key for key in found[-1])
    same_tensors(found[0], found[1], 1e-5)
    same_tensors(found[1], found[2])


def test_half_precision_compares_like_with_like():
    """Under autocast, the loss is exactly 0 at the start: pretrained predictions are computed like the head's own."""
    model = equipped(headed("gpt2"), LwFConfig())
    objective = set_up(model, LwFConfig()).objective().train()
    for module in model.modules():
        module.training = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = objective(**padded("gpt2"))
    assert outputs["terms"]["distillation"].item() == 0.0 and outputs["logits"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "distilbert"])
def test_with_adapters(name, tmp_path):
    model = equipped(headed(name), LwFConfig(train_source_head=True))
    targets = ["c_attn"] if name == "gpt2" else ["q_lin"]
    kept = ["score"] if name == "gpt2" else ["pre_classifier", "classifier"]
    lora = get_peft_model(model, LoraConfig(target_modules=targets, r=2, modules_to_save=kept))
    before = snapshot(lora)
    trainer = make_trainer(lora, LwFConfig(train_source_head=True), tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["loss/distillation"] != trainer.state.log_history[4]["loss/distillation"]
    moved = [name for name, value in snapshot(trainer.model).items() if not torch.equal(value, before[name])]
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
