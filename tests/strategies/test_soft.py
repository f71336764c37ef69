"""L(t) = CE(h_T(f(x_T)), y_T) + lambda(t) CE(h_S(f(x_S)), y_S), against handwritten loops."""

import copy
import dataclasses
import math

import datasets
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    default_data_collator,
)

import hf_ft
from hf_ft import DELTAConfig, FTTrainer, L2SPConfig, LPFTConfig, OptionError, SoftConfig, set_up
from hf_ft.core.schedules import Decay, decay
from hf_ft.models.source_head import has_source_head, head_input, source_head
from hf_ft.testing import same_tensors, still, tiny_bert, tiny_data, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.models import tiny_mobilenet_v2
from hf_ft.testing.training import equipped, make_trainer, snapshot, tiny_arguments, tiny_batch
from hf_ft.trainer.source_streams import SourceStreams

SCHEDULES = ("linear", "cosine", "exponential", "step", "constant")
PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.05}
SOFT = SoftConfig(schedule="constant", weight=0.7)


class Kept:
    """A collator that keeps the batches it made."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append(default_data_collator(rows))
        return self.batches[-1]


def soft_trainer(model, config, folder, source=None, **arguments):
    """A trainer whose two collators keep their batches."""
    equipped(model, config)
    return FTTrainer(
        model,
        tiny_arguments(folder, **{**PLAIN, **arguments}),
        strategy=config,
        train_dataset=tiny_data(model),
        source_dataset=tiny_data(model, 20, seed=2) if source is None else source,
        data_collator=Kept(),
        source_data_collator=Kept(),
    )


def trained_on(trainer, source_steps):
    """The batches of each; one was read before training."""
    source, target = trainer.source_data_collator.batches, trainer.data_collator.batches
    assert (len(source), len(target)) == (source_steps + 1, 9)
    return source[1:], target[1:]


def body(model):
    """Compute the head's input from images."""
    if hasattr(model, "vit"):
        return lambda images: model.vit(images).last_hidden_state[:, 0]
    return lambda images: model.resnet(images).pooler_output


def by_hand(model, head, target, source, weights, joint=True, lr=0.05):
    """SGD on both losses, with a weight for each step; the source is left out if it is 0."""
    model.train()
    parameters = [*model.parameters(), *head.parameters()]
    for batch, weight in zip(target, weights, strict=True):
        images, labels, features = batch["pixel_values"], batch["labels"], body(model)
        if not weight:
            loss = nn.functional.cross_entropy(model.classifier(features(images)), labels)
        else:
            other = source.pop(0)
            if joint:
                both = features(torch.cat([images, other["pixel_values"]]))
                mine, theirs = both[: len(images)], both[len(images) :]
            else:
                mine, theirs = features(images), features(other["pixel_values"])
            loss = nn.functional.cross_entropy(model.classifier(mine), labels)
            loss = loss + weight * nn.functional.cross_entropy(head(theirs), other["labels"])
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad


# --- the schedule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_begin_at_1_end_at_0_and_never_rise(name):
    values = [decay(name, i / 1000) for i in range(1500)]
    assert values[0] == pytest.approx(1.0, abs=1e-15)
    assert all(b <= a for a, b in zip(values, values[1:], strict=False))
    assert all(value == (1.0 if name == "constant" else 0.0) for value in values[1000:])


def test_schedules_are_the_formulas():
    for u in (0.0, 0.1, 0.5, 0.9, 0.999):
        assert decay("linear", u) == pytest.approx(1 - u)
        assert decay("cosine", u) == pytest.approx((1 + math.cos(math.pi * u)) / 2)
        assert decay("exponential", u) == pytest.approx((math.exp(-5 * u) - math.exp(-5)) / (1 - math.exp(-5)))
        assert decay("step", u) == decay("constant", u) == 1.0


@pytest.mark.parametrize("until", [0.1, 0.3, 0.6, 0.7, 1 / 3, 1.0])
def test_the_weight_is_0_from_the_exact_step(until):
    """Whatever the rounding of step / total / until."""
    for total in (10, 30, 70, 90, 110):
        end = round(until * total)
        if abs(end - until * total) < 1e-9:
            for name in SCHEDULES[:4]:
                assert Decay(name, until)(end / total) == 0.0
                assert Decay(name, until)((end - 1) / total) > 0.0


# --- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
@pytest.mark.parametrize("joint", [True, False])
def test_constant_is_a_joint_loop(make, joint, tmp_path):
    forward = "joint" if joint else "separate"
    config = SoftConfig(schedule="constant", weight=0.7, source_forward=forward, norm_mode="auto")
    trainer = soft_trainer(make(), config, tmp_path)
    model, head = copy.deepcopy(trainer.model), source_head(trainer.model).module
    before = snapshot(model)
    trainer.train()
    source, target = trained_on(trainer, 8)
    by_hand(model, head, target, source, [0.7] * 8, joint)
    assert not source
    same_tensors(snapshot(trainer.model), snapshot(model), 1e-6)
    trained = trainer._run.plan.terms[0].fn.head.module
    same_tensors(trained.state_dict(), head.state_dict(), 1e-6)
    moved = [name for name, value in snapshot(model).items() if not torch.equal(value, before[name])]
    assert len(moved) > len(before) / 2


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_abrupt_is_two_runs_glued(make, tmp_path):
    trainer = soft_trainer(make(), SoftConfig(schedule="step", until=0.5, norm_mode="auto"), tmp_path)
    model, head = copy.deepcopy(trainer.model), source_head(trainer.model).module
    trainer.train()
    source, target = trained_on(trainer, 4)
    by_hand(model, head, target[:4], source, [1.0] * 4)
    by_hand(model, head, target[4:], source, [0.0] * 4)
    assert not source
    same_tensors(snapshot(trainer.model), snapshot(model), 1e-6)


def test_linear_is_the_formula(tmp_path):
    trainer = soft_trainer(tiny_vit(), SoftConfig(weight=2.0, until=0.5), tmp_path)
    model, head = copy.deepcopy(trainer.model), source_head(trainer.model).module
    trainer.train()
    source, target = trained_on(trainer, 4)
    by_hand(model, head, target, source, [2.0, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    same_tensors(snapshot(trainer.model), snapshot(model), 1e-6)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_terms_in_float64(make, forward):
    """Each term separately, from logits of the plain models."""
    config = SoftConfig(weight=0.3, source_forward=forward)
    model = equipped(still(make()), config)
    objective = set_up(model, config).objective().train()
    batch = tiny_batch(objective)
    outputs = objective(**batch)
    source, plain = batch.pop("stream_source"), copy.deepcopy(model).double().eval()
    other = copy.deepcopy(plain)  # the pretrained network: the same body under the source head
    name = head_input(model).removeprefix("input:")
    other.set_submodule(name, source_head(model).module.double())
    other.config.num_labels = other.num_labels = 5

    def entropy(network, inputs):
        labels = inputs["labels"]
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items() if k != "labels"}
        logits = network(**wide).logits.detach()
        return -sum(float(logits[i].log_softmax(0)[labels[i]]) for i in range(len(labels))) / len(labels)

    assert outputs["terms"]["task"].item() == pytest.approx(entropy(plain, batch), rel=1e-5)
    assert outputs["terms"]["source"].item() == pytest.approx(0.3 * entropy(other, source), rel=1e-5)
    assert outputs["loss"].item() == pytest.approx(sum(t.item() for t in outputs["terms"].values()), rel=1e-6)
    assert outputs["logits"].shape == (8, 3)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
def test_weight_0_is_full_fine_tuning(make, tmp_path):
    full = train(make(), "full", tmp_path / "full")
    config = SoftConfig(weight=0.0, norm_mode="auto")
    soft = train(make(), config, tmp_path / "soft")
    same_tensors(snapshot(full.model), snapshot(soft.model))
    model = equipped(make(), SOFT)
    args = tiny_arguments(tmp_path / "data")
    given = {"train_dataset": tiny_data(model), "source_dataset": tiny_data(model, 20, seed=2)}
    unused = FTTrainer(model, args, strategy=config, **given)
    unused.train()
    same_tensors(snapshot(full.model), snapshot(unused.model))


def test_texts_of_other_lengths_are_padded():
    config = SoftConfig(schedule="constant")
    model = equipped(still(tiny_bert()), config)
    found = []
    for forward in ("joint", "separate"):
        chosen = SoftConfig(schedule="constant", source_forward=forward)
        objective = set_up(model, chosen).objective().train()
        batch, source = tiny_inputs(model, 6), tiny_inputs(model, 4, seed=1)
        source = {name: value[:, :5] if value.dim() == 2 else value for name, value in source.items()}
        found.append(objective(**batch, stream_source=source)["terms"])
    assert source["input_ids"].shape[1] < batch["input_ids"].shape[1]
    for name in ("task", "source"):
        assert found[0][name].item() == pytest.approx(found[1][name].item(), rel=1e-5)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_both_parts_in_bf16(make, forward, tmp_path):
    """The first step's terms equal float32's to bf16's precision; the last step's are finite."""
    config = SoftConfig(source_forward=forward, until=1.0)
    logged = []
    for bf16 in (False, True):
        trainer = soft_trainer(make(), config, tmp_path / str(bf16), bf16=bf16)
        trainer.train()
        logged.append([entry for entry in trainer.state.log_history if "loss/source" in entry])
    for name in ("loss/task", "loss/source"):
        assert logged[1][0][name] == pytest.approx(logged[0][0][name], rel=3e-2)
        assert logged[1][0][name] != logged[0][0][name]  # the precision differed
        assert math.isfinite(logged[1][-1][name])


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_accumulated_logs_are_of_both_parts(make, tmp_path):
    """One batch of 8, or four micro-batches of 2 with 2 source samples each: the same terms are logged."""
    logged = []
    for steps in (1, 4):
        more = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        trainer = soft_trainer(still(make()), SoftConfig(until=1.0), tmp_path / str(steps), **more)
        trainer.train()
        logged.append([entry for entry in trainer.state.log_history if "loss/source" in entry])
    for one, other in zip(*logged, strict=True):
        for name in ("loss", "loss/task", "loss/source"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
        assert one["loss"] == pytest.approx(one["loss/task"] + one["loss/source"], rel=1e-5)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_targets_of_other_kinds(kind):
    """The target's loss is the model's own, whatever kind it is; the source's labels are classes."""
    config = SoftConfig(schedule="constant")
    labels = torch.rand(4, 3) if kind == "regression" else (torch.rand(4, 3) > 0.5).float()
    found = []
    for forward in ("joint", "separate"):
        model = equipped(still(tiny_vit(problem_type=kind)), config)
        objective = set_up(model, SoftConfig(schedule="constant", source_forward=forward)).objective().train()
        batch = {**tiny_inputs(tiny_vit()), "labels": labels}
        found.append(objective(**batch, stream_source=tiny_inputs(tiny_vit(), 6, 1))["terms"])
        plain = model.eval()(**batch).loss
        assert found[-1]["task"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert found[0]["source"].item() == pytest.approx(found[1]["source"].item(), rel=1e-5)


# --- what the normalisation layers see ----------------------------------------------------------------------


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_what_moves_which_statistics(forward):
    """Joint: one update, with the moments of both batches together. Separate: one per batch, the source's last."""
    config = SoftConfig(schedule="constant", source_forward=forward, norm_mode="auto")
    model = equipped(tiny_resnet(), config)
    objective = set_up(model, config).objective().train()
    batch = tiny_batch(objective)
    batch["stream_source"]["pixel_values"] = 3 * batch["stream_source"]["pixel_values"] + 1  # another domain
    stem = model.resnet.embedder.embedder
    old = stem.normalization.running_mean.double().clone()
    with torch.no_grad():
        both = (batch["pixel_values"], batch["stream_source"]["pixel_values"])
        maps = [stem.convolution(images).double() for images in both]
    objective(**batch)
    means = [m.mean(dim=(0, 2, 3)) for m in maps]
    if forward == "joint":
        wanted = 0.9 * old + 0.1 * (means[0] + means[1]) / 2
    else:
        wanted = 0.9 * (0.9 * old + 0.1 * means[0]) + 0.1 * means[1]
    assert torch.allclose(stem.normalization.running_mean.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("source", ["data", "head"])
def test_by_default_no_statistics_move(source, tmp_path):
    config = SoftConfig(source=source)
    trainer = soft_trainer(tiny_resnet(), config, tmp_path)
    before = snapshot(trainer.model)
    trainer.train()
    after = snapshot(trainer.model)
    statistics = [name for name in before if "running" in name]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(before["classifier.1.weight"], after["classifier.1.weight"])


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_the_target_sees_the_source_in_a_joint_forward_only(forward):
    config = SoftConfig(schedule="constant", source_forward=forward, norm_mode="auto")
    model = equipped(tiny_resnet(), config)
    objective = set_up(model, config).objective().train()
    batch, found = tiny_batch(objective), []
    for scale in (1.0, 4.0):
        batch["stream_source"]["pixel_values"] = scale * batch["stream_source"]["pixel_values"]
        found.append(objective(**batch)["logits"])
    assert torch.equal(found[0], found[1]) == (forward == "separate")


# --- nothing else once the weight is 0 ----------------------------------------------------------------------


class Counted(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset, self.read = dataset, []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        self.read.append(row)
        return self.dataset[row]


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_nothing_is_loaded_or_computed_once_the_weight_is_0(forward, tmp_path, monkeypatch):
    model = tiny_resnet()
    source = Counted(tiny_data(model, 20, seed=2))
    config = SoftConfig(schedule="cosine", until=0.5, source_forward=forward, source_ratio=0.5)
    trainer = soft_trainer(model, config, tmp_path, source, eval_strategy="no")
    rows, reads = [], []
    trainer.model.resnet.embedder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    add = SourceStreams.add
    monkeypatch.setattr(
        SourceStreams, "add", lambda streams, *args: (reads.append(len(source.read)), add(streams, *args))[1]
    )
    trainer.train()
    first = [12] * 4 if forward == "joint" else [8, 4] * 4
    assert rows == first + [8] * 4
    looked_at = reads[0]  # one batch, to see whether it fits
    assert looked_at == 4
    assert [n - looked_at for n in reads] == [0, 4, 8, 12, 16, 16, 16, 16]
    assert len(source.read) == reads[-1]
    assert not trainer._attempt.streams._opened
    terms = [entry["loss/source"] for entry in trainer.state.log_history if "loss/source" in entry]
    assert len(terms) == 4  # and it is not logged


def test_evaluation_runs_no_source(tmp_path):
    model = tiny_resnet()
    source = Counted(tiny_data(model, 20, seed=2))
    trainer = soft_trainer(model, SOFT, tmp_path, source)
    loss = trainer.evaluate(tiny_data(model, 16, seed=1))["eval_loss"]
    assert not source.read
    trainer.train()
    seen = len(source.read)
    assert trainer.evaluate(tiny_data(model, 16, seed=1))["eval_loss"] != loss
    assert len(source.read) == seen


# --- the result ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_mobilenet_v2])
def test_the_result_is_a_plain_checkpoint(make, tmp_path):
    trainer = train(make(), SOFT, tmp_path, save_strategy="steps", save_steps=4)
    trainer.save_model(str(tmp_path / "saved"))
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "ft_config.json"} <= files and "ft_modules.safetensors" not in files
    assert (tmp_path / "checkpoint-4" / "ft_modules.safetensors").is_file()
    for folder in ("saved", "checkpoint-8"):
        loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        inputs = tiny_inputs(trainer.model)
        with torch.no_grad():
            logits = loaded.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits
        assert torch.allclose(*logits, atol=1e-5)
    with pytest.raises(OptionError, match="no source head"):
        source_head(trainer.model)


def test_further_training_continues_with_the_source(tmp_path):
    """From the current weights, including the source head's, as a separate run."""
    trainer = train(tiny_resnet(), SoftConfig(until=0.5), tmp_path, save_strategy="steps", save_steps=4)
    head = copy.deepcopy(trainer._run.plan.terms[0].fn.head)
    trainer.train()
    log = trainer.state.log_history
    assert [entry["step"] for entry in log if "loss/source" in entry] == [1, 2, 3, 4]
    assert not torch.equal(head.module[1].weight, trainer._run.plan.terms[0].fn.head.module[1].weight)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}


@pytest.mark.parametrize("strategy", ["full", "l2_sp", SoftConfig(weight=0.0), SoftConfig(source="head")])
def test_the_source_head_is_gone_whatever_was_trained(strategy, tmp_path):
    model = equipped(tiny_resnet(), SOFT)
    make_trainer(model, strategy, tmp_path).train()
    assert not has_source_head(model)


def test_the_best_model_is_loaded(tmp_path):
    """From a step before the source was dropped, with the saved source head."""
    kept = {}
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(
        tiny_vit(), SoftConfig(), tmp_path, load_best_model_at_end=True, metric_for_best_model="goal", **saving
    )

    def metrics(prediction):
        kept[trainer.state.global_step] = snapshot(trainer.model)
        return {"goal": float(trainer.state.global_step == 2)}

    trainer.compute_metrics = metrics
    trainer.train()
    same_tensors(snapshot(trainer.model), kept[2])
    with pytest.raises(AssertionError):
        same_tensors(kept[2], kept[8])


def test_smaller_batches_after_running_out_of_memory(tmp_path, monkeypatch):
    trainer = soft_trainer(tiny_resnet(), SOFT, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8)
    draw, failed = SourceStreams._next_of, []

    def first_fails(streams, name, *more):
        if not failed:
            failed.append(name)
            raise RuntimeError("CUDA out of memory.")
        return draw(streams, name, *more)

    monkeypatch.setattr(SourceStreams, "_next_of", first_fails)
    trainer.train()
    assert failed and trainer.state.global_step == 8
    assert len(trainer.source_data_collator.batches[-1]["labels"]) < 8


def test_a_last_batch_of_one(tmp_path):
    """In a network whose maps have several positions, one sample has a variance."""
    model = equipped(tiny_resnet(), SOFT)
    given = {"train_dataset": tiny_data(model, 33), "source_dataset": tiny_data(model, 20, seed=2)}
    trainer = FTTrainer(model, tiny_arguments(tmp_path), strategy=SoftConfig(), **given)
    trainer.train()
    assert trainer.state.global_step == 8


def test_a_custom_optimizer_leaves_the_source_head_unchanged(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(hf_ft.trainer.checks.logger, "warning", told.append)
    model = equipped(tiny_vit(), SOFT)
    before = source_head(model).module.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = {"train_dataset": tiny_data(model), "source_dataset": tiny_data(model, 20, seed=2)}
    trainer = FTTrainer(model, tiny_arguments(tmp_path), strategy=SOFT, optimizers=(optimizer, None), **data)
    trainer.train()
    assert any(
        "this optimizer does not contain the extra parameters that source would train" in message for message in told
    )
    assert torch.equal(trainer._run.plan.terms[0].fn.head.module.weight, before)


def test_the_source_head_decays_as_other_weights_do(tmp_path):
    """By args.weight_decay, except for its bias; not by the optimizer's own default."""
    for strength in (0.0, 0.3):
        trainer = make_trainer(tiny_vit(), SOFT, tmp_path, optim="adamw_torch", weight_decay=strength)
        trainer.train()
        head = trainer._run.plan.terms[0].fn.head.module
        found = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
        assert (found[id(head.weight)], found[id(head.bias)]) == (strength, 0.0)


@pytest.mark.slow
def test_composes(tmp_path):
    for others in ([L2SPConfig()], [DELTAConfig(weights="uniform")], [LPFTConfig()], ["daft"], ["lwf"]):
        trainer = train(tiny_resnet(), [SoftConfig(until=0.9), *others], tmp_path / str(others)[:12])
        logged = {key for entry in trainer.state.log_history for key in entry}
        assert "loss/source" in logged
        assert bool(torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"])))


@pytest.mark.parametrize(("until", "idle"), [(0.5, True), (0.75, False)])
def test_a_source_loss_without_effect_is_reported(until, idle, monkeypatch):
    """LP-FT's probe stage, in which everything in the source loss is frozen, takes half of the run."""
    told = []
    monkeypatch.setattr(hf_ft.engine.run.logger, "warning_once", told.append)
    config = SoftConfig(until=until)
    set_up(equipped(tiny_resnet(), config), [config, LPFTConfig()]).objective()
    assert [message for message in told if message.startswith("source has no effect")] == told
    assert len(told) == idle


def test_terms_on_layers_see_only_the_target():
    configs = [SoftConfig(schedule="constant"), DELTAConfig(weights="uniform")]
    found = []
    for chosen in (configs, configs[1:]):
        model = equipped(still(tiny_resnet()), SOFT)
        objective = set_up(model, chosen).objective().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        found.append(objective(**tiny_batch(objective))["terms"]["delta"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] > 0


def test_head_modules_take_part_as_the_model_has_them():
    """Dropout before the last layer also drops the source's features, once."""
    config = SoftConfig(schedule="constant")
    model = equipped(tiny_mobilenet_v2(classifier_dropout_prob=1.0), config)
    objective = set_up(model, config).objective().train()
    batch = tiny_batch(objective)
    term = objective(**batch)["terms"]["source"]
    bias = source_head(model).module.bias
    labels = batch["stream_source"]["labels"]
    assert term.item() == pytest.approx(nn.functional.cross_entropy(bias.expand(8, -1), labels).item(), rel=1e-5)


# --- refused before training --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_ratio": 0.0}, r"source_ratio=0.0 lies outside \(0, inf\)"),
        ({"until": 1.5}, r"until=1.5 lies outside \(0, 1\].*To keep the source loss, set schedule='constant'"),
        ({"until": 2}, "To keep the source loss, set schedule='constant'"),
        ({"until": 0.0}, r"until=0.0 lies outside"),
        ({"schedule": "slow"}, "schedule='slow' is not"),
        ({"source": "teacher"}, "source='teacher' is not"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        SoftConfig(**options)


def test_no_source_data(tmp_path):
    model = equipped(tiny_resnet(), SOFT)
    with pytest.raises(OptionError, match="source_dataset=.*or set source='head', which needs none"):
        FTTrainer(model, tiny_arguments(tmp_path), strategy=SOFT, train_dataset=tiny_data(model))


def test_no_source_head(tmp_path):
    model = tiny_resnet()
    data = {"train_dataset": tiny_data(model), "source_dataset": tiny_data(model, 20, seed=2)}
    with pytest.raises(OptionError, match="hf_ft.from_pretrained"):
        FTTrainer(model, tiny_arguments(tmp_path), strategy=SOFT, **data)


def test_empty_source(tmp_path):
    with pytest.raises(OptionError, match="source_dataset contains no samples"):
        soft_trainer(tiny_resnet(), SOFT, tmp_path, tiny_data(tiny_resnet()).select([]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            datasets.DatasetDict({"train": 1}),
            r"source_dataset is a DatasetDict of the splits \['train'\]: pass a single",
        ),
        ("mnist", "source_dataset is a str 'mnist': pass a single data set"),
        (
            [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0.5}],
            r"'labels' are torch.float32 \(1,\), but one integer class per sample",
        ),
        ([{"pixel_values": torch.zeros(3, 32, 32), "labels": [0, 1]}], r"'labels' are torch.int64 \(1, 2\)"),
        ([{"labels": 0}], "train_dataset has a column 'pixel_values', but source_dataset does not"),
        ([{"pixel_values": torch.zeros(3, 32, 32), "labels": 0, "size": 3.0}], "source_dataset has a column 'size'"),
    ],
)
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_no_source_dataset(source, message, forward, tmp_path):
    with pytest.raises(OptionError, match=message):
        config = SoftConfig(source_forward=forward)
        soft_trainer(tiny_resnet(), config, tmp_path, source, remove_unused_columns=False).train()


def test_unused_source_data_are_reported(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(hf_ft.trainer.checks.logger, "warning", told.append)
    model = tiny_resnet()
    given = {"train_dataset": tiny_data(model), "source_dataset": tiny_data(model)}
    FTTrainer(model, tiny_arguments(tmp_path), strategy="l2_sp", **given)
    assert told == ["source_dataset is ignored: l2_sp does not use source data."]
    for strategy in (SOFT, "co_tuning", SoftConfig(source="head")):
        FTTrainer(equipped(model, SOFT), tiny_arguments(tmp_path, warmup_steps=0.1), strategy=strategy, **given)
    assert len(told) == 1


def test_texts_without_masks_are_not_padded():
    config = SoftConfig(schedule="constant")
    objective = set_up(equipped(tiny_bert(), config), config).objective().train()
    batch = {"input_ids": torch.randint(1, 64, (4, 7)), "labels": torch.tensor([0, 1, 0, 1])}
    objective(**batch, stream_source=batch)
    with pytest.raises(OptionError, match="no 'attention_mask' to mark padding"):
        objective(**batch, stream_source={**batch, "input_ids": batch["input_ids"][:, :5]})
    with pytest.raises(OptionError, match="source_dataset has a column 'token_type_ids', but train_dataset does not"):
        objective(**batch, stream_source={**batch, "token_type_ids": batch["input_ids"]})


def test_layers_that_a_joint_forward_cannot_divide():
    """The head's output has only the target's rows."""
    config = SoftConfig(schedule="constant")
    run = set_up(equipped(tiny_resnet(), config), config)
    term = dataclasses.replace(run.plan.terms[0], layers=("classifier",))
    run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, terms=(term,)))
    objective = run.objective().train()
    with pytest.raises(OptionError, match="layer 'classifier' is in the head.*source_forward='separate'"):
        objective(**tiny_batch(objective))


def test_labels_may_come_first():
    config = SoftConfig(schedule="constant")
    objective = set_up(equipped(still(tiny_vit()), config), config).objective().train()
    batch = tiny_batch(objective)
    turned = dict(reversed(batch.items()))
    turned["stream_source"] = dict(reversed(batch["stream_source"].items()))
    assert torch.equal(objective(**batch)["loss"], objective(**turned)["loss"])


def test_too_small_a_share(tmp_path):
    with pytest.raises(OptionError, match=r"source_ratio=0.01 of per_device_train_batch_size=8.*at least 0.125"):
        soft_trainer(tiny_resnet(), SoftConfig(source_ratio=0.01), tmp_path)


def test_another_image_size(tmp_path):
    model = tiny_resnet()
    rows = [{"pixel_values": torch.zeros(3, 16, 16), "labels": 0}] * 20
    trainer = soft_trainer(model, SOFT, tmp_path, rows)
    with pytest.raises(
        OptionError, match=r"\(3, 16, 16\), but train_dataset yields \(3, 32, 32\).*source_forward='separate'"
    ):
        trainer.train()
    separate = SoftConfig(schedule="constant", source_forward="separate")
    soft_trainer(tiny_resnet(), separate, tmp_path / "separate", rows).train()


def test_no_labels_in_the_source(tmp_path):
    trainer = soft_trainer(tiny_resnet(), SOFT, tmp_path, [{"pixel_values": torch.zeros(3, 32, 32)}] * 20)
    with pytest.raises(OptionError, match="without 'labels'"):
        trainer.train()


def test_gradient_checkpointing(tmp_path):
    """The same weights, although the second forward pass ends before the head."""
    found = []
    for checkpointing in (False, True):
        config = SoftConfig(schedule="constant", source_forward="separate")
        more = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = soft_trainer(tiny_vit(), config, tmp_path / str(checkpointing), **more)
        trainer.train()
        found.append(snapshot(trainer.model))
    same_tensors(*found, 1e-6)


def test_make_trainer_needs_nothing_for_weight_0(tmp_path):
    trainer = make_trainer(tiny_resnet(), SoftConfig(weight=0.0), tmp_path)
    assert trainer.source_dataset is None
