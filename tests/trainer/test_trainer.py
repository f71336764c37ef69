"""FTTrainer: what it shares with Trainer works the same, and Trainer's known pitfalls are fixed."""

import json
import os
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_ft import (
    CheckpointError,
    FTTrainer,
    FullConfig,
    L2SPConfig,
    LinearProbeConfig,
    LPFTConfig,
    OptionError,
    load_delta,
)
from hf_ft.engine.param_groups import STAGE_RATES
from hf_ft.models.norms import batch_norms
from hf_ft.testing import (
    TINY_MODELS,
    same_tensors,
    still,
    tiny_bert,
    tiny_data,
    tiny_inputs,
    tiny_resnet,
    tiny_vit,
    train,
)
from hf_ft.testing.models import tiny_mobilenet_v2, tiny_swin
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments

LINE = [L2SPConfig(), LPFTConfig()]


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in inputs.items() if k != "labels"}).logits


# --- plain fine-tuning is the stock Trainer's ---------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert])
def test_full_is_the_stock_trainer_bit_for_bit(make, tmp_path):
    stock = Trainer(make(), tiny_arguments(tmp_path), train_dataset=tiny_data(make()))
    stock.train()
    ours = train(make(), "full", tmp_path)
    same_tensors(snapshot(ours.model), snapshot(stock.model))
    expected = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in ours.state.log_history if "loss" in entry] == expected


@pytest.mark.slow
def test_weight_zero_is_full_bit_for_bit(tmp_path):
    for decay in (0.0, 0.1):
        full = train(tiny_resnet(), "full", tmp_path, weight_decay=decay)
        none = train(tiny_resnet(), L2SPConfig(alpha=0.0, beta=0.0), tmp_path, weight_decay=decay)
        same_tensors(snapshot(full.model), snapshot(none.model))


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_accumulation_reports_the_same_loss(make, tmp_path):
    """With many models, the stock Trainer's loss is multiplied by the steps (transformers#47688)."""
    losses = []
    for steps in (1, 4):
        arguments = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        trainer = train(still(make()), "l2_sp", tmp_path, **arguments)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_users_model_is_restored(tmp_path):
    model = tiny_resnet()
    model.resnet.embedder.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    stem = snapshot(model.resnet.embedder)
    trainer = train(model, "lp_ft", tmp_path)
    assert trainer.model is model
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    trained = {k: v for k, v in snapshot(model.resnet.embedder).items()}
    same_tensors(stem, trained)  # frozen by the user: neither weights nor statistics moved


class Seen(TrainerCallback):
    def __init__(self):
        self.models, self.counts, self.rates = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.models.append(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.counts.append(sum(p.requires_grad for p in model.parameters()))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.models.append(model)


def test_callbacks_see_the_users_model_and_its_stage(tmp_path):
    model, seen = tiny_resnet(), Seen()
    trainer = make_trainer(model, LPFTConfig(probe=0.25), tmp_path)
    trainer.add_callback(seen)
    trainer.train()
    every = sum(1 for _ in model.parameters())
    assert seen.models == [model, model]  # begin and end fire once
    assert seen.counts == [2, 2] + [every] * 6


# --- stages on one axis -------------------------------------------------------------------------------------


def test_stages_share_one_axis(tmp_path):
    trainer = train(tiny_resnet(), LPFTConfig(probe=0.5, head_lr=0.1), tmp_path, learning_rate=0.01)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == list(range(1, 9))
    assert [entry["stage"] for entry in logs] == [0] * 4 + [1] * 4
    # Each stage runs its own linear schedule: from its rate to 0.
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(
        [0.1, 0.075, 0.05, 0.025, 0.01, 0.0075, 0.005, 0.0025]
    )
    assert all("loss/task" in entry for entry in logs)


def test_a_probe_has_optimizer_state_only_for_the_head(tmp_path):
    class Look(TrainerCallback):
        sizes: list = []

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            self.sizes.append(len(optimizer.state))

    trainer = make_trainer(tiny_resnet(), LPFTConfig(probe=0.5), tmp_path, optim="adamw_torch")
    trainer.add_callback(look := Look())
    trainer.train()
    assert look.sizes[:4] == [2] * 4 and look.sizes[-1] == sum(1 for _ in trainer.model.parameters())


def test_frozen_layers_get_no_backward(tmp_path):
    trainer = make_trainer(tiny_resnet(), "linear_probe", tmp_path)
    run = trainer._start_run()
    objective = run.objective()
    outputs = []
    run.model.resnet.register_forward_hook(lambda module, args, out: outputs.append(out.pooler_output))
    objective(**tiny_inputs(run.model))["loss"].backward()
    assert not outputs[0].requires_grad
    assert [n for n, p in run.model.named_parameters() if p.grad is not None] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]


def test_too_few_steps_for_the_stages(tmp_path):
    with pytest.raises(OptionError, match="stage 'probe'.*gets no step.*Train longer"):
        train(tiny_resnet(), LPFTConfig(probe=0.01), tmp_path)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "polynomial"])
def test_schedules_of_one_stage_are_the_stock_trainers(kind, tmp_path):
    arguments = {"lr_scheduler_type": kind, "warmup_steps": 2}
    stock = Trainer(tiny_bert(), tiny_arguments(tmp_path, **arguments), train_dataset=tiny_data(tiny_bert()))
    stock.train()
    ours = train(tiny_bert(), "l2_sp", tmp_path, **arguments)
    rates = [[e["learning_rate"] for e in t.state.log_history if "loss" in e] for t in (ours, stock)]
    assert rates[0] == rates[1]


def test_plateau_runs_in_one_stage_and_is_refused_in_two(tmp_path):
    arguments = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 4}
    train(tiny_resnet(), "l2_sp", tmp_path, metric_for_best_model="loss", **arguments)
    with pytest.raises(OptionError, match="lr_scheduler_type='reduce_lr_on_plateau'"):
        make_trainer(tiny_resnet(), "lp_ft", tmp_path, metric_for_best_model="loss", **arguments)


# --- what is saved and loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_swin])
@pytest.mark.parametrize("strategy", ["full", LPFTConfig(probe=0.25)])
def test_best_model_is_loaded(make, strategy, tmp_path):
    """The stock Trainer leaves the last weights of a ViT or Swin in the model, with only a warning."""
    best = 4
    kept = {}

    def metrics(prediction):
        step = trainer.state.global_step
        kept[step] = snapshot(trainer.model)
        return {"goal": float(step == best)}

    arguments = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "goal", "save_total_limit": 1}
    trainer = make_trainer(make(), strategy, tmp_path, **arguments)
    trainer.compute_metrics = metrics
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    same_tensors(snapshot(trainer.model), kept[best])
    with pytest.raises(AssertionError):
        same_tensors(kept[best], kept[8])


@pytest.mark.slow
@pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS.keys())
def test_delta_reloads_bit_for_bit(make, tmp_path):
    trainer = train(make(), "l2_sp", tmp_path / "run")
    trainer.save_delta(tmp_path / "delta")
    inputs = tiny_inputs(trainer.model)
    other_head = make()
    head = trainer.configs[0].anatomy(other_head).head.modules[-1]
    for parameter in other_head.get_submodule(head).parameters():
        nn.init.ones_(parameter.data)
    assert torch.equal(logits(load_delta(other_head, tmp_path / "delta"), inputs), logits(trainer.model, inputs))


def test_delta_of_a_probe_is_the_head(tmp_path):
    trainer = train(tiny_resnet(), "linear_probe", tmp_path / "run")
    trainer.save_delta(tmp_path / "delta")
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "delta" / "ft_delta.safetensors")) == {"classifier.1.weight", "classifier.1.bias"}
    with pytest.raises(CheckpointError, match="is not the base"):
        load_delta(tiny_resnet(seed=1), tmp_path / "delta")


def test_delta_loads_its_base_by_name(tmp_path):
    tiny_vit(num_labels=7).save_pretrained(tmp_path / "base")  # another head than the fine-tuned one
    model = type(tiny_vit()).from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    trainer = train(model, "full", tmp_path / "run")
    trainer.save_delta(tmp_path / "delta")
    loaded = load_delta(str(tmp_path / "base"), tmp_path / "delta")
    assert torch.equal(logits(loaded, tiny_inputs(model)), logits(trainer.model, tiny_inputs(model)))


def test_delta_before_training_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="call train"):
        make_trainer(tiny_resnet(), "full", tmp_path).save_delta(tmp_path / "delta")


def test_card_names_strategy_paper_and_no_local_path(tmp_path):
    tiny_resnet().save_pretrained(tmp_path / "base")
    model = type(tiny_resnet()).from_pretrained(tmp_path / "base")
    trainer = train(model, L2SPConfig(alpha=0.125), tmp_path / "out", eval_strategy="epoch")
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "l2_sp" in card and "0.125" in card and "1802.01483" in card and "eval_loss" in card
    assert str(tmp_path) not in card and "base_model:" not in card


# --- the task's loss ----------------------------------------------------------------------------------------


def test_label_smoothing_is_the_stock_trainers(tmp_path):
    stock = Trainer(
        tiny_vit(), tiny_arguments(tmp_path, label_smoothing_factor=0.2), train_dataset=tiny_data(tiny_vit())
    )
    stock.train()
    ours = train(tiny_vit(), "full", tmp_path, label_smoothing_factor=0.2)
    same_tensors(snapshot(ours.model), snapshot(stock.model))


def test_class_weights(tmp_path):
    weights = [0.2, 1.0, 3.0]
    trainer = make_trainer(tiny_vit(), "full", tmp_path)
    data = tiny_data(tiny_vit())
    trainer = FTTrainer(
        tiny_vit(), tiny_arguments(tmp_path), class_weights=weights, train_dataset=data, eval_dataset=data
    )
    batch = {key: data[key][:] for key in data.column_names}
    with torch.no_grad():
        out = trainer.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.double()
    log_p = out.log_softmax(-1)[torch.arange(len(data)), batch["labels"]]
    w = torch.tensor(weights).double()[batch["labels"]]
    # evaluation batches are averaged, so one batch of everything
    trainer.args.per_device_eval_batch_size = len(data)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(-(w * log_p).sum() / w.sum()), rel=1e-5)


@pytest.mark.parametrize("strategy", ["full", "l2_sp"])
def test_class_weights_with_accumulation_of_uneven_batches(strategy, tmp_path):
    """30 samples in batches of 8, or in two micro-batches of 4: the last update has 6 samples, as 4 and 2."""
    ends = []
    for steps in (1, 2):
        arguments = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        args = tiny_arguments(tmp_path, optim="sgd", max_grad_norm=0.0, **arguments)
        data = tiny_data(tiny_vit(), 30)
        trainer = FTTrainer(
            still(tiny_vit()), args, strategy=strategy, class_weights=[0.2, 1.0, 9.0], train_dataset=data
        )
        trainer.train()
        losses = [{k: v for k, v in e.items() if "loss" in k} for e in trainer.state.log_history if "loss" in e]
        ends.append((snapshot(trainer.model), losses))
    same_tensors(ends[0][0], ends[1][0], 1e-6)
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_class_weights_are_relative(tmp_path):
    """Doubled weights are the same weights; their mean over the samples is 1."""
    data = tiny_data(tiny_vit())
    given = [FTTrainer(tiny_vit(), tiny_arguments(tmp_path), class_weights=[w, 2 * w, 5 * w], train_dataset=data)
             for w in (1.0, 2.0)]  # fmt: skip
    one, other = (trainer.task_loss.class_weights for trainer in given)
    assert one.tolist() == pytest.approx(other.tolist()) and float(one[data["labels"][:]].mean()) == pytest.approx(1.0)
    with pytest.raises(OptionError, match="are 0 for all classes that occur"):
        absent = [0.0, 0.0, 0.0]
        FTTrainer(tiny_vit(), tiny_arguments(tmp_path), class_weights=absent, train_dataset=data)


def test_balanced_class_weights_and_their_refusals(tmp_path):
    data = tiny_data(tiny_vit())
    counts = torch.bincount(data["labels"][:], minlength=3)
    trainer = FTTrainer(tiny_vit(), tiny_arguments(tmp_path), class_weights="balanced", train_dataset=data)
    assert trainer.task_loss.class_weights.tolist() == pytest.approx((len(data) / (3 * counts)).tolist())
    for bad in ([1.0, 2.0], [-1.0, 1.0, 1.0], "even"):
        with pytest.raises(OptionError, match="class_weights="):
            FTTrainer(tiny_vit(), tiny_arguments(tmp_path), class_weights=bad, train_dataset=data)
    with pytest.raises(OptionError, match="compute_loss_func"):
        FTTrainer(
            tiny_vit(), tiny_arguments(tmp_path), class_weights=[1, 1, 1], compute_loss_func=print, train_dataset=data
        )


def test_balanced_class_weights_ignore_rows_without_label(tmp_path):
    labels = [0, 0, 0, 1, 1, 2, -100, -100]
    data = tiny_data(tiny_vit(), 8).remove_columns("labels").add_column("labels", labels).with_format("torch")
    trainer = FTTrainer(tiny_vit(), tiny_arguments(tmp_path), class_weights="balanced", train_dataset=data)
    assert trainer.task_loss.class_weights.tolist() == pytest.approx([6 / (3 * n) for n in (3, 2, 1)])


@pytest.mark.parametrize("divide", [True, False])
def test_compute_loss_func_means_the_same_with_accumulation(divide, tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        if divide:
            return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch
        return nn.functional.cross_entropy(outputs["logits"], labels)

    weights = []
    for steps in (1, 2):
        args = tiny_arguments(
            tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, optim="sgd"
        )
        trainer = FTTrainer(still(tiny_vit()), args, compute_loss_func=loss, train_dataset=tiny_data(tiny_vit()))
        trainer.train()
        weights.append(snapshot(trainer.model))
    same_tensors(*weights, 2e-6)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problem_types(problem, tmp_path):
    labels = 1 if problem == "regression" else 3
    model = tiny_vit(num_labels=labels, problem_type=problem)
    rows = tiny_inputs(tiny_vit(), 16)
    target = torch.rand(16, 3).round() if labels == 3 else torch.rand(16, 1)
    data = datasets.Dataset.from_dict({"pixel_values": rows["pixel_values"].numpy(), "labels": target.numpy()})
    args = tiny_arguments(tmp_path, max_steps=2)
    trainer = FTTrainer(model, args, strategy=LINE, train_dataset=data.with_format("torch"))
    assert trainer.train().training_loss > 0


def test_eval_loss_is_the_task_alone(tmp_path):
    trainer = train(tiny_resnet(), L2SPConfig(alpha=100.0, beta=100.0), tmp_path, learning_rate=1e-3)
    stock = Trainer(trainer.model, tiny_arguments(tmp_path), eval_dataset=trainer.eval_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-6)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    parts = logged["loss/task"] + logged["loss/l2_sp"] + logged["loss/l2_head"]
    assert parts == pytest.approx(logged["loss"], rel=1e-3) and logged["loss/l2_head"] > 0.1


# --- what else the Trainer can do ---------------------------------------------------------------------------


def test_model_init_makes_a_new_model_each_time(tmp_path):
    args = tiny_arguments(tmp_path)
    trainer = FTTrainer(
        None, args, strategy=LINE, model_init=lambda: tiny_resnet(), train_dataset=tiny_data(tiny_resnet())
    )
    first = trainer.train()
    kept = snapshot(trainer.model)
    second = trainer.train()
    same_tensors(kept, snapshot(trainer.model))
    assert first.training_loss == second.training_loss


def test_training_again_continues_from_the_weights(tmp_path):
    trainer = train(tiny_resnet(), LINE, tmp_path, save_strategy="steps", save_steps=4)
    anchors = trainer._run.anchors
    trainer.train()
    assert trainer._run.anchors is anchors  # the reference is still the pretrained model
    assert trainer.state.global_step == 8


def test_bf16(tmp_path):
    trainer = train(tiny_resnet(), LINE, tmp_path, bf16=True)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.train().training_loss > 0
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(trainer.evaluate()["eval_loss"])


def test_evaluation_in_half_precision_leaves_the_weights_as_they_are(tmp_path):
    trainer = train(tiny_bert(), "full", tmp_path, bf16_full_eval=True)
    before, data = snapshot(trainer.model), tiny_data(trainer.model)
    rounded = trainer.evaluate(data)["eval_loss"]
    trainer.predict(data)
    same_tensors(snapshot(trainer.model), before)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer.args.bf16_full_eval = False
    assert 0 < abs(trainer.evaluate(data)["eval_loss"] - rounded) < 0.01


def test_activation_checkpointing_changes_nothing(tmp_path):
    results = []
    for on in (False, True):
        key = (
            "activation_checkpointing"
            if hasattr(tiny_arguments(tmp_path), "activation_checkpointing")
            else "gradient_checkpointing"
        )
        trainer = train(still(tiny_vit()), LPFTConfig(probe=0.5), tmp_path, **{key: on})
        results.append(snapshot(trainer.model))
    same_tensors(*results, 1e-6)


def test_auto_find_batch_size(tmp_path, monkeypatch):
    trainer = make_trainer(tiny_resnet(), LINE, tmp_path, auto_find_batch_size=True)
    step, tries = FTTrainer.training_step, []

    def fails_once(self, *args, **kwargs):
        tries.append(self._train_batch_size)
        if len(tries) == 1:
            raise RuntimeError("CUDA out of memory.")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FTTrainer, "training_step", fails_once)
    trainer.train()
    assert tries[0] == 8 and tries[1] < 8 and trainer.state.global_step == 8


@pytest.mark.slow
def test_torch_compile(tmp_path):
    results = [
        snapshot(
            train(
                still(tiny_vit(num_hidden_layers=1)),
                LPFTConfig(probe=0.5),
                tmp_path,
                torch_compile=on,
                torch_compile_backend=back,
            ).model
        )
        for on, back in ((False, None), (True, "aot_eager"))
    ]
    same_tensors(*results, 1e-5)


class Perceptron(nn.Module):
    """Two layers and a head: so small that the default compiler takes only seconds."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_labels=3, problem_type="single_label_classification")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.ModuleList([nn.Linear(3 * 32 * 32, 8), nn.Linear(8, 8)])
            self.classifier = nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        state = pixel_values.flatten(1)
        for layer in self.body:
            state = torch.tanh(layer(state))
        logits = self.classifier(state)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_stage_that_only_unfreezes_parameters_compiles_again(backend, tmp_path):
    """Otherwise the first stage's graph would be reused, and what the second unfreezes would never train."""
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("no C++ compiler")
    strategy = LPFTConfig(head="classifier", blocks=r"body\.\d+")  # no dropout and no BatchNorm: only one flag changes
    start, found = snapshot(Perceptron()), []
    for compiled in (False, True):
        arguments = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1}
        arguments |= {"torch_compile": True, "torch_compile_backend": backend} if compiled else {}
        args = tiny_arguments(tmp_path, **arguments)
        trainer = FTTrainer(Perceptron(), args, strategy=strategy, train_dataset=tiny_data(tiny_vit()))
        trainer.train()
        found.append(snapshot(trainer.model))
    same_tensors(*found, 1e-5)
    assert not any(torch.equal(found[1][name], start[name]) for name in start)


def test_hyperparameter_search_arguments_reach_the_stages(tmp_path):
    trainer = train(tiny_resnet(), LPFTConfig(head_lr=0.5), tmp_path, learning_rate=0.125)
    rates = {group[STAGE_RATES] for group in trainer.optimizer.param_groups}
    assert rates == {(0.0, 0.125), (0.5, 0.125)}


def test_users_optimizer(tmp_path):
    model = tiny_resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = FTTrainer(
        model,
        tiny_arguments(tmp_path),
        strategy=LPFTConfig(head_lr=0.01),
        train_dataset=tiny_data(model),
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert {group[STAGE_RATES] for group in optimizer.param_groups} == {(0.0, 0.05), (0.01, 0.05)}
    lacking = torch.optim.SGD(model.classifier.parameters(), lr=0.05)
    args = tiny_arguments(tmp_path)
    trainer = FTTrainer(model, args, strategy="lp_ft", train_dataset=tiny_data(model), optimizers=(lacking, None))
    with pytest.raises(OptionError, match="lacks .* of the parameters"):
        trainer.train()


@pytest.mark.slow
def test_batch_norm_momentum_is_set_and_can_be_kept(tmp_path, caplog):
    trainer = train(tiny_mobilenet_v2(), "full", tmp_path)
    assert {norm.momentum for _, norm in batch_norms(trainer.model)} == {0.1}
    kept = train(tiny_mobilenet_v2(), FullConfig(batch_norm_momentum="keep"), tmp_path)
    assert {norm.momentum for _, norm in batch_norms(kept.model)} == {0.997}
    chosen = train(tiny_resnet(), FullConfig(batch_norm_momentum=0.25), tmp_path)
    assert {norm.momentum for _, norm in batch_norms(chosen.model)} == {0.25}


def test_norms_are_not_decayed(tmp_path):
    trainer = make_trainer(tiny_resnet(), "full", tmp_path, weight_decay=0.5)
    trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    decayed = {names[id(p)] for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed and not any("normalization" in name or name.endswith("bias") for name in decayed)


def test_l2_sp_replaces_the_optimizers_decay(tmp_path):
    trainer = make_trainer(tiny_resnet(), L2SPConfig(beta=0.0), tmp_path, weight_decay=0.5)
    trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    decayed = {names[id(p)] for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {"classifier.1.weight"}


@pytest.mark.slow
def test_a_last_batch_of_one_sample_is_refused_before_training(tmp_path):
    model = tiny_mobilenet_v2()  # its last maps are 1x1
    data = tiny_data(model, 33)
    trainer = FTTrainer(model, tiny_arguments(tmp_path), train_dataset=data)
    before = snapshot(model)
    with pytest.raises(OptionError, match="per_device_train_batch_size=8.*dataloader_drop_last"):
        trainer.train()
    same_tensors(snapshot(model), before)
    FTTrainer(model, tiny_arguments(tmp_path, dataloader_drop_last=True), train_dataset=data).train()
    FTTrainer(model, tiny_arguments(tmp_path), strategy=LinearProbeConfig(), train_dataset=data).train()
    for dropped in (False, True):
        single = tiny_arguments(tmp_path, per_device_train_batch_size=1, dataloader_drop_last=dropped)
        with pytest.raises(OptionError, match="per_device_train_batch_size=1: each batch has a single sample"):
            FTTrainer(model, single, train_dataset=data).train()


def test_recommended_arguments_are_warned_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ft.trainer.checks.logger.warning", said.append)
    make_trainer(tiny_resnet(), "l2_sp", tmp_path, learning_rate=5e-5)
    assert len(said) == 1 and "learning_rate=5e-05" in said[0] and "l2_sp" in said[0]
    make_trainer(tiny_resnet(), "l2_sp", tmp_path, learning_rate=0.02)  # set by the user: no warning
    assert len(said) == 1


def test_saved_config_is_readable_json(tmp_path):
    train(tiny_resnet(), LINE, tmp_path).save_model()
    saved = json.loads((tmp_path / "ft_config.json").read_text())
    assert [s["ft_type"] for s in saved["strategies"]] == ["l2_sp", "lp_ft"] and saved["strategies"][0]["alpha"] == 0.01
