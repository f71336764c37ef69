"""Bi-tuning: both losses, the queues and the averaged network against loops in float64; checkpoints; refusals."""

import copy
import math
import types

import pytest
import torch
from torch import nn
from transformers import default_data_collator

from hf_ft import BiTuningConfig, FTTrainer, OptionError, set_up
from hf_ft.strategies.bi_tuning.loss import enqueue, next_slots
from hf_ft.testing import same_tensors, still, tiny_bert, tiny_data, tiny_inputs, tiny_resnet
from hf_ft.testing.laws import _losses
from hf_ft.testing.models import tiny_deit, tiny_roberta
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments
from hf_ft.trainer.training_batches import TrainingBatches
from tests.models.heads import headed, padded

CONFIG = BiTuningConfig(queue_size=2, momentum=0.6, projection_dim=5, temperature=0.3, batch_norm_momentum="keep")


class Reference:
    """The method, sample by sample, with lists as queues; it takes random draws from the term."""

    def __init__(self, model, term, config, classifier):
        self.config, self.classifier, self.model = config, classifier, model
        self.projector = copy.deepcopy(term.projector)
        self.key_model, self.key_projector = copy.deepcopy(model), copy.deepcopy(term.projector)
        drawn = zip(term.queued_inputs[:-1].clone(), term.queued_projections[:-1].clone(), strict=True)
        self.queues = [list(zip(inputs.detach(), projections.detach(), strict=True)) for inputs, projections in drawn]

    def follow(self):
        m = self.config.momentum
        pairs = [(self.model, self.key_model), (self.projector, self.key_projector)]
        with torch.no_grad():
            for one, other in pairs:
                for weight, average in zip(one.parameters(), other.parameters(), strict=True):
                    average.copy_(m * average + (1 - m) * weight)

    def encoded(self, model, projector, batch):
        seen = []
        layer = model.get_submodule(self.classifier)
        handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        outputs = model(**batch)
        handle.remove()
        inputs = seen[0]
        if inputs.dim() == 3:  # with a head per token, the last token that is not padding decides
            inputs = inputs[torch.arange(len(inputs)), batch["attention_mask"].sum(1) - 1]
        z = projector(inputs)
        return outputs.loss, inputs, z / z.norm(dim=1, keepdim=True)

    def with_one(self, h):
        bias = self.model.get_submodule(self.classifier).bias
        h = h if bias is None else torch.cat([h, h.new_ones(1)])
        return h / h.norm()

    def weights(self, label):
        layer = self.model.get_submodule(self.classifier)
        w = layer.weight[label].detach()
        w = w if layer.bias is None else torch.cat([w, layer.bias[label : label + 1].detach()])
        return w / w.norm()

    def contrast(self, own, same, others):
        logits = torch.stack([own, *same, *others]) / self.config.temperature
        logs = logits - logits.exp().sum().log()
        share = 1 / (1 + len(same))
        return sum(share * (math.log(share) - logs[place]) for place in range(1 + len(same)))

    def __call__(self, batch, second=None):
        loss, inputs, projections = self.encoded(self.model, self.projector, batch)
        with torch.no_grad():
            _, key_inputs, key_projections = self.encoded(self.key_model, self.key_projector, second or batch)
        labels = batch["labels"].tolist()
        before = [[z for _, z in queue] for queue in self.queues]
        for label, h, z in zip(labels, key_inputs, key_projections, strict=True):
            self.queues[label] = [*self.queues[label], (self.with_one(h), z)]
        self.queues = [queue[-self.config.queue_size :] for queue in self.queues]
        total = 0.0
        for row, label in enumerate(labels):
            z, w = projections[row], self.weights(label)
            total += self.contrast(
                z @ key_projections[row],
                [z @ key for key in before[label]],
                [z @ key for c, keys in enumerate(before) for key in keys if c != label],
            )
            total += self.contrast(
                w @ self.with_one(inputs[row]),
                [w @ h for h, _ in self.queues[label]],
                [w @ h for c, queue in enumerate(self.queues) for h, _ in queue if c != label],
            )
        return loss, total / len(labels)


MODELS = {
    "resnet": (tiny_resnet, lambda model: tiny_inputs(model, 7), "classifier.1"),
    "roberta": (lambda: still(tiny_roberta()), lambda model: tiny_inputs(model, 7), "classifier.out_proj"),
    "gpt2": (lambda: still(headed("gpt2")), lambda model: padded("gpt2"), "score"),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_queues_and_average_follow_the_method(name):
    """BatchNorm in train mode, a head of two layers, and a head per token without biases."""
    make, batch_of, classifier = MODELS[name]
    model, other = make().double(), make().double()
    objective = set_up(model, CONFIG).objective().train()
    term = objective.plan.terms[0].fn
    reference = Reference(other.train(), term, CONFIG, classifier)
    batch = {n: v.double() if v.is_floating_point() else v for n, v in batch_of(model).items()}
    optimizer = torch.optim.SGD(objective.trained, lr=0.05)
    other_optimizer = torch.optim.SGD([*other.parameters(), *reference.projector.parameters()], lr=0.05)
    for step in range(3):
        second = {name: value + 0.1 * step if value.is_floating_point() else value for name, value in batch.items()}
        reference.follow()
        losses = []
        for _ in range(2):  # two micro-batches: the average is updated once
            columns = {f"second_view_{name}": value for name, value in second.items() if name != "labels"}
            outputs = objective(**batch, **columns)
            (outputs["loss"] / 2).backward()
            loss, contrast = reference(batch, second)
            ((loss + contrast) / 2).backward()
            losses.append((outputs["terms"]["bi_tuning"], contrast.detach()))
        for ours, theirs in losses:
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
        optimizer.step(), other_optimizer.step()
        optimizer.zero_grad(), other_optimizer.zero_grad()
    same_tensors(snapshot(model), snapshot(other), 1e-9)
    same_tensors(snapshot(term.network), snapshot(reference.key_model), 1e-9)
    same_tensors(snapshot(term.key_projector), snapshot(reference.key_projector), 1e-9)
    for keys, queue in zip(term.queued_projections[:-1], reference.queues, strict=True):
        wanted = torch.stack([z for _, z in queue])
        torch.testing.assert_close(keys[keys[:, 0].argsort()], wanted[wanted[:, 0].argsort()], atol=1e-9, rtol=0)


def test_a_class_that_fills_its_queue_within_a_batch_keeps_the_last_keys():
    labels, keys = torch.tensor([1, 0, 1, 1, 1, 1, 0]), torch.arange(7.0)[:, None]
    queues, position = torch.full((2, 3, 1), -1.0), torch.tensor([2, 0])
    slots, position = next_slots(labels, position, 3)
    enqueue(queues, labels, keys, slots)
    assert queues[..., 0].tolist() == [[6, -1, 1], [4, 5, 3]] and position.tolist() == [1, 2]


class Augmented(torch.utils.data.Dataset):
    """Images that are made brighter or darker whenever they are read."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {**row, "pixel_values": row["pixel_values"] + torch.randn(())}


def trained(folder, resume=None):
    args, model = tiny_arguments(folder, save_strategy="steps", save_steps=2, max_steps=5), tiny_resnet()
    trainer = FTTrainer(model, args, strategy=BiTuningConfig(queue_size=3), train_dataset=Augmented(tiny_data(model)))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_a_resumed_run_has_the_same_views_keys_and_queues(tmp_path):
    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))  # within an epoch
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    one, other = (trainer._run.plan.terms[0].fn.state_dict() for trainer in (resumed, whole))
    same_tensors(one, other)
    assert {"network.classifier.1.weight", "queued_inputs", "position", "key_projector.weight"} <= set(one)
    assert _losses(resumed) == _losses(whole)
    assert "second_view_pixel_values" in next(iter(whole.get_train_dataloader()))


def test_a_batch_has_two_views_of_its_samples_if_they_differ():
    rows, epoch = tiny_data(tiny_resnet()), torch.zeros((), dtype=torch.int64)
    read = TrainingBatches(Augmented(rows), default_data_collator, 3, epoch, twice=True)
    before, batch = torch.get_rng_state(), read([5, 2, 9])
    first, second = batch["pixel_values"], batch["second_view_pixel_values"]
    for view in (first, second):
        shifts = (view - rows[[5, 2, 9]]["pixel_values"]).flatten(1)  # of the same samples: one number per sample
        assert shifts.std(1).max() < 1e-5 and shifts.mean(1).abs().min() > 1e-4
    assert (first - second).abs().amin() > 1e-4 and "second_view_labels" not in batch
    again = read([5, 2, 9])
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    once = TrainingBatches(Augmented(rows), default_data_collator, 3, epoch)([5, 2, 9])
    assert torch.equal(once["pixel_values"], first) and set(once) == {"pixel_values", "labels"}
    assert torch.equal(torch.get_rng_state(), before)
    assert not TrainingBatches(rows, default_data_collator, 3, epoch, twice=True).twice


def test_keys_are_computed_as_precisely_as_the_models_own_features():
    model = still(tiny_bert())
    objective = set_up(model, "bi_tuning").objective().train()
    seen, term = [], objective.plan.terms[0].fn
    for network in (model, term.network):
        network.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        objective(**tiny_inputs(model, 4))
    own, keys = seen
    assert own.dtype == keys.dtype == torch.bfloat16 and torch.equal(own, keys)


def test_a_model_in_half_precision_has_an_average_in_single():
    model = tiny_bert().to(torch.bfloat16)
    objective = set_up(model, "bi_tuning").objective().train()
    term, before = objective.plan.terms[0].fn, model.classifier.weight.detach().float()
    objective(**tiny_inputs(model, 4))
    with torch.no_grad():
        for parameter in model.classifier.parameters():  # as an optimizer does
            parameter.add_(1.0)
    objective(**tiny_inputs(model, 4))["loss"].backward()
    moved = term.network.classifier.weight - before
    torch.testing.assert_close(moved, 0.001 * (model.classifier.weight.float() - before), atol=1e-6, rtol=0)


def test_the_copy_has_the_modes_of_the_model():
    model = tiny_resnet()
    objective = set_up(model, BiTuningConfig(norm_mode="eval")).objective().train()
    term = objective.plan.terms[0].fn
    statistics = {name: value.clone() for name, value in term.network.named_buffers()}
    objective(**tiny_inputs(model, 6))
    same_tensors(dict(term.network.named_buffers()), statistics)
    assert [m.training for m in term.network.modules()] == [m.training for m in model.modules()]


def test_it_acts_if_the_input_of_the_logits_changes(monkeypatch):
    for make, active in ((tiny_resnet, [False, True]), (tiny_roberta, [True, True])):  # its head has another layer
        objective = set_up(make(), ["lp_ft", "bi_tuning"]).objective()
        acts = []
        for stage in objective.plan.stages:
            objective.enter(stage)
            acts.append(bool(objective.terms) and objective.wants_inputs)
        assert acts == active
    said = []
    monkeypatch.setattr("hf_ft.engine.run.logger.warning_once", said.append)
    set_up(tiny_resnet(), ["linear_probe", "bi_tuning"]).objective()
    assert [message.partition(":")[0] for message in said] == ["bi_tuning has no effect"]


@pytest.mark.slow
def test_a_probe_before_it_may_be_recorded(tmp_path):
    """Its last batch is read again in the next stage's form; a run can be resumed where that stage begins."""
    arguments = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    found = []
    for use, resume in (("always", None), ("never", None), ("always", str(tmp_path / "always" / "checkpoint-5"))):
        folder = tmp_path / (f"{use}-resumed" if resume else use)
        trainer = make_trainer(tiny_resnet(), ["lp_ft", CONFIG], folder, use, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        found.append(snapshot(trainer.model) | trainer._run.plan.term_modules.state_dict())
    same_tensors(found[0], found[1], 1e-5)
    same_tensors(found[0], found[2])


def test_with_adapters_it_compares_with_the_trained_head():
    run = set_up(tiny_bert(), ["peft", "bi_tuning"])
    objective, term = run.objective().train(), run.plan.terms[0].fn
    for stage in run.plan.stages:
        objective.enter(stage)
    objective(**tiny_inputs(tiny_bert(), 4))["loss"].backward()
    layer = run.model.get_submodule(term._classifier)
    assert type(layer) is nn.Linear and layer.weight.requires_grad and term.projector.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("labels", [torch.rand(4, 3), torch.rand(4)])
def test_mixed_labels_are_refused(labels):
    model = tiny_resnet()
    objective = set_up(model, "bi_tuning").objective().train()
    objective.task_loss = lambda model, batch: (model(pixel_values=batch["pixel_values"]).logits.sum(), {})
    with pytest.raises(OptionError, match="bi_tuning .* needs one class per sample"):
        objective(**{**tiny_inputs(model, 4), "labels": labels})


def test_what_cannot_work_is_refused_before_training(tmp_path):
    model = tiny_resnet()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(OptionError, match="bi_tuning needs one class per sample"):
        set_up(model, "bi_tuning")
    deit = tiny_deit()
    deit.second = nn.Linear(*deit.classifier.weight.shape[::-1])
    with pytest.raises(OptionError, match="bi_tuning .* not from one linear layer. Name it with head="):
        set_up(deit, BiTuningConfig(head="classifier, second"))
    args = types.SimpleNamespace(world_size=2, accelerator_config=types.SimpleNamespace(even_batches=False))
    with pytest.raises(OptionError, match="even_batches=False with bi_tuning"):
        BiTuningConfig().check_arguments(args)
    assert not BiTuningConfig(weight=0.0).plan(model, None).terms


def test_samples_without_a_label_are_left_out():
    values, queued = [], []
    for rows in (slice(0, 4), slice(0, 6)):
        model = still(tiny_bert())
        objective = set_up(model, CONFIG).objective().train()
        batch = {name: column[rows] for name, column in tiny_inputs(model, 6).items()}
        batch["labels"][4:] = -100
        values.append(objective(**batch)["terms"]["bi_tuning"])
        queued.append(objective.plan.terms[0].fn.queued_inputs[:-1])
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    torch.testing.assert_close(*queued)
