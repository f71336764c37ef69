"""DAFT: what it converts, its zero head and rates, each ablation, and that nothing is converted twice."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ResNetForImageClassification

from hf_ft import (
    AMCFConfig,
    BlockwiseConfig,
    CollaborativeModel,
    DAFTConfig,
    FTTrainer,
    L2SPConfig,
    OptionError,
    State,
    set_up,
)
from hf_ft.cli import request as arguments
from hf_ft.models.norms import batch_norms
from hf_ft.strategies.daft import ConvertBatchNorm, ZeroHead
from hf_ft.testing import same_tensors, tiny_data, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.models import (
    tiny_bert,
    tiny_deit,
    tiny_distilbert,
    tiny_mobilenet_v2,
    tiny_roberta,
    tiny_timm,
)
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.0, "lr_scheduler_type": "cosine"}
SAVING = {"save_strategy": "steps", "save_steps": 4}


def shifted(model, samples=32):
    """Data from a different distribution than the model's statistics."""
    rows = tiny_inputs(model, samples)
    rows["pixel_values"] = 2 * rows["pixel_values"] + 1
    return [{key: value[i] for key, value in rows.items()} for i in range(samples)]


def trainer_on_shifted(model, folder, strategy=None, **options):
    args = tiny_arguments(folder, **{**SGD, "learning_rate": 3e-4, **options})
    return FTTrainer(model, args, strategy=strategy or DAFTConfig(), train_dataset=shifted(model))


def started(model, folder, strategy=None, **options):
    """A trainer whose run is set up and whose model is unchanged."""
    trainer = trainer_on_shifted(model, folder, strategy, **options)
    trainer._start_run()
    return trainer


def logits(model, head=None):
    with torch.no_grad():
        return model.eval()(**tiny_inputs(model)).logits if head is None else head(model)


def features(model):
    with torch.no_grad():
        return model.eval().resnet(tiny_inputs(model)["pixel_values"]).pooler_output


# --- the two halves


def test_the_start_is_the_pretrained_backbone_under_the_target_s_statistics(tmp_path):
    model, pretrained = tiny_resnet(), tiny_resnet()
    started(model, tmp_path)
    assert torch.allclose(features(model), features(pretrained), rtol=1e-4, atol=1e-5)
    # The stem's input does not depend on other norms: its statistics can be taken from its own inputs.
    with torch.no_grad():
        taken = [row["pixel_values"] for row in shifted(pretrained)]
        values = pretrained.resnet.embedder.embedder.convolution(torch.stack(taken)).double()
    norm, old = model.resnet.embedder.embedder.normalization, pretrained.resnet.embedder.embedder.normalization
    assert torch.allclose(norm.running_mean.double(), values.mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(norm.running_var, old.running_var, rtol=0.5)


def test_the_statistics_are_within_batches_or_pooled(tmp_path):
    """Within-batch variances weigh batches equally and are unbiased; pooled ones are over all values."""
    found = {}
    for statistics in ("batch", "pooled"):
        trainer = trainer_on_shifted(tiny_resnet(), tmp_path, DAFTConfig(statistics=statistics))
        found[statistics] = trainer._states()["daft"].tensors
    inputs = torch.stack([row["pixel_values"] for row in shifted(tiny_resnet())])
    order = torch.randperm(32, generator=torch.Generator().manual_seed(42))  # args.seed
    with torch.no_grad():
        values = tiny_resnet().resnet.embedder.embedder.convolution(inputs[order]).double()
    name = "resnet.embedder.embedder.normalization.var"
    within = torch.stack([part.var(dim=(0, 2, 3), correction=1) for part in values.split(8)]).mean(dim=0)
    assert torch.allclose(found["batch"][name], within, rtol=1e-5)
    assert torch.allclose(found["pooled"][name], values.var(dim=(0, 2, 3), correction=0), rtol=1e-5)
    assert not torch.allclose(found["batch"][name], found["pooled"][name], rtol=1e-4)


def test_measuring_draws_no_random_numbers_and_needs_no_gradient(tmp_path):
    trainer = trainer_on_shifted(tiny_resnet(), tmp_path)
    before, state = snapshot(trainer.model), torch.get_rng_state()
    tensors = trainer._states()["daft"].tensors
    assert torch.equal(torch.get_rng_state(), state)
    same_tensors(snapshot(trainer.model), before)
    assert len(tensors) == 2 * len(batch_norms(trainer.model))
    assert not any(tensor.requires_grad for tensor in tensors.values())
    list(trainer.context().batches())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gradient_reaches_the_backbone_at_first(tmp_path):
    trainer = started(tiny_resnet(), tmp_path)
    objective = trainer._run.objective().train()
    body = [p for name, p in trainer.model.named_parameters() if not name.startswith("classifier")]
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for step in range(2):
        objective(**tiny_inputs(trainer.model, 8, step))["loss"].backward()
        assert bool(trainer.model.classifier[1].weight.grad.any())
        largest = max(float(p.grad.abs().max()) for p in body)
        assert largest == 0 if step == 0 else largest > 1e-6
        optimizer.step()
        optimizer.zero_grad()


def displacement(folder, optim, **options):
    """How far the backbone's weights, without norms, are from their start after two steps."""
    trainer = trainer_on_shifted(tiny_resnet(), folder, optim=optim, max_steps=2, **options)
    trainer._start_run()
    before = snapshot(trainer.model)
    trainer.train()
    moved = [
        (value.double() - before[name].double()).square().sum()
        for name, value in snapshot(trainer.model).items()
        if name.endswith("convolution.weight")
    ]
    return float(torch.stack(moved).sum().sqrt())


@pytest.mark.slow
def test_adam_voids_the_gentle_start(tmp_path):
    same = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    sgd = displacement(tmp_path / "sgd", "sgd", **same)
    adam = displacement(tmp_path / "adam", "adamw_torch", **same)
    print(f"\nbackbone displacement after two steps: {sgd:.4f} under SGD, {adam:.4f} under AdamW")
    assert adam > 10 * sgd > 0


def test_an_unset_rate_warns_but_no_optimizer_does(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ft.trainer.checks.logger.warning", said.append)
    for optim in ("adamw_torch", "sgd"):
        trainer_on_shifted(tiny_resnet(), tmp_path, optim=optim)
    assert not said
    trainer_on_shifted(tiny_resnet(), tmp_path, optim="sgd", learning_rate=5e-5, max_grad_norm=1.0)
    assert len(said) == 1 and "learning_rate=5e-05 (recommended: 0.002" in said[0]
    assert "max_grad_norm=1.0 (recommended: 0.0, ours: under SGD, clipping" in said[0]


@pytest.mark.parametrize(("optim", "rate"), [("adamw_torch", 2e-4), ("sgd", 2e-3)])
def test_the_recommended_arguments(optim, rate, tmp_path):
    words = ["--model", "x", "--dataset", "y", "--strategy", "daft", "--output_dir", str(tmp_path)]
    request = arguments.read([*words, "--optim", optim])
    wanted = {key: value.value for key, value in request.recommended().items()}
    assert wanted.pop("learning_rate") == rate
    options = {**wanted, "optim": optim, "learning_rate": rate, "max_steps": 4}
    trainer = trainer_on_shifted(tiny_resnet(), tmp_path, DAFTConfig(head_lr=0.1), **options)
    trainer._start_run()
    trainer.create_optimizer_and_scheduler(4)
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0} and {group["lr"] for group in groups} == {rate, 0.1}
    if optim == "sgd":
        assert {group["momentum"] for group in groups} == {0.9} and trainer.args.max_grad_norm == 0.0
    curve = trainer.lr_scheduler.lr_lambdas[0]
    assert [curve(step) for step in range(5)] == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


# --- norms


def test_norms_run_in_train_mode_with_pytorch_s_momentum(tmp_path):
    model = tiny_mobilenet_v2()
    assert {norm.momentum for _, norm in batch_norms(model)} == {0.997}
    trainer = started(model, tmp_path)
    assert {norm.momentum for _, norm in batch_norms(model)} == {0.1}
    objective = trainer._run.objective()
    before = snapshot(model)
    objective.train()
    assert all(norm.training for _, norm in batch_norms(model))
    objective(**tiny_inputs(model, 8))
    name = "mobilenet_v2.conv_stem.first_conv.normalization"
    with torch.no_grad():
        stem = model.mobilenet_v2.conv_stem.first_conv
        padded = nn.functional.pad(tiny_inputs(model, 8)["pixel_values"], (0, 1, 0, 1))
        values = nn.functional.conv2d(padded, stem.convolution.weight, stride=2)
    expected = 0.9 * before[f"{name}.running_mean"] + 0.1 * values.mean(dim=(0, 2, 3))
    assert torch.allclose(model.get_submodule(name).running_mean, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "auto", "eval"])
def test_norm_mode(mode, tmp_path):
    model = tiny_resnet()
    frozen = dict(batch_norms(model))["resnet.embedder.embedder.normalization"]
    frozen.requires_grad_(False)
    objective = started(model, tmp_path, DAFTConfig(norm_mode=mode))._run.objective().train()
    others = [norm for _, norm in batch_norms(objective) if norm is not frozen]
    assert frozen.training is (mode == "train") and all(norm.training is (mode != "eval") for norm in others)


# --- ablations: one flag each


def kinds(plan):
    return [type(operation) for operation in plan.surgery]


def rates(plan):
    return [(rate.names, rate.lr) for rate in plan.stages[0].rates]


def test_each_ablation_is_one_flag(tmp_path):
    def plan(**options):
        trainer = trainer_on_shifted(tiny_resnet(), tmp_path, DAFTConfig(**options))
        return trainer._start_run().plan

    [fitted] = rates(plan())
    assert fitted[0] == ("classifier",) and 0 < fitted[1] < 1
    head = [(("classifier",), 0.1)]
    assert (kinds(whole := plan(head_lr=0.1)), rates(whole)) == ([ConvertBatchNorm, ZeroHead], head)
    assert (kinds(bare := plan(convert_batch_norm=False, head_lr=0.1)), rates(bare)) == ([ZeroHead], head)
    assert (kinds(warm := plan(zero_head=False, head_lr=0.1)), rates(warm)) == ([ConvertBatchNorm], head)
    assert (kinds(even := plan(head_lr=None)), rates(even)) == ([ConvertBatchNorm, ZeroHead], [])
    assert {p.stages[0].norm_mode for p in (whole, bare, warm, even)} == {"auto"}


@pytest.mark.parametrize("flag", [{"convert_batch_norm": False}, {"zero_head": False}])
def test_an_ablation_leaves_the_rest_unchanged(flag, tmp_path):
    model, pretrained = tiny_resnet(), snapshot(tiny_resnet())
    started(model, tmp_path, DAFTConfig(**flag))
    changed = {name for name, value in snapshot(model).items() if not torch.equal(value, pretrained[name])}
    assert changed and {"classifier" in name for name in changed} == {"convert_batch_norm" in flag}


# --- the head


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_resnet, {"classifier.1"}),
        (tiny_mobilenet_v2, {"classifier"}),
        (tiny_vit, {"classifier"}),
        (tiny_deit, {"classifier"}),
        (tiny_bert, {"classifier"}),
        (tiny_distilbert, {"classifier"}),
        (tiny_roberta, {"classifier.out_proj"}),
        (tiny_timm, {"timm_model.head"}),
    ],
)
def test_the_layer_that_gives_the_logits_is_zero(make, expected, tmp_path):
    model, pretrained = make(), snapshot(make())
    with torch.no_grad():
        model.get_submodule(next(iter(expected))).bias.add_(1.0)
    run = set_up(model, DAFTConfig(convert_batch_norm=False))
    changed = {n.rpartition(".")[0] for n, v in snapshot(run.model).items() if not torch.equal(v, pretrained[n])}
    assert changed == expected and float(logits(model).abs().max()) == 0


class TwoHeads(nn.Module):
    """Like distilled models in training: the logits are the mean of two heads'."""

    def __init__(self, features, classes, shared=8):
        super().__init__()
        self.dense, self.dropout = nn.Linear(features, shared), nn.Dropout(0.0)
        self.one, self.two = nn.Linear(shared, classes), nn.Linear(shared, classes)

    def forward(self, x):
        hidden = self.dense(x.flatten(1))
        return (self.one(hidden) + self.two(hidden)) / 2


@pytest.mark.parametrize(("shared", "zero"), [(8, {"one", "two"}), (3, {"two"})])
def test_parallel_heads_are_zero_and_a_square_layer_counts_alone(shared, zero):
    model = tiny_resnet()
    model.classifier = TwoHeads(16, 3, shared)
    set_up(model, DAFTConfig(convert_batch_norm=False))
    assert {n for n, m in model.classifier.named_children() if n != "dropout" and not m.weight.any()} == zero


def test_a_head_that_cannot_train_is_refused():
    model = tiny_resnet()
    model.classifier.requires_grad_(False)
    with pytest.raises(
        OptionError, match=r"zero_head: no layer of the head \(classifier\) is trainable.*zero_head=False"
    ):
        set_up(model, DAFTConfig(convert_batch_norm=False))
    set_up(model, DAFTConfig(convert_batch_norm=False, zero_head=False))


# --- not twice


@pytest.mark.slow
def test_a_second_train_continues_from_the_trained_head(tmp_path):
    model = tiny_resnet()
    trainer = trainer_on_shifted(model, tmp_path)
    trainer.train()
    first, kept = trainer._run, snapshot(model)
    seen = []
    trainer._attempt = None
    enter = type(first).objective

    def objective(run, *args):
        seen.append(snapshot(run.model))
        return enter(run, *args)

    type(first).objective, restore = objective, enter
    try:
        trainer.train()
    finally:
        type(first).objective = restore
    assert trainer._run is first and len(seen) == 1 and bool(kept["classifier.1.weight"].any())
    same_tensors(seen[0], kept)


@pytest.mark.slow
def test_resumed_it_is_neither_measured_nor_converted_again(tmp_path, monkeypatch):
    whole = trainer_on_shifted(tiny_resnet(), tmp_path, **SAVING)
    whole.train()
    monkeypatch.setattr(DAFTConfig, "measure", lambda *args: pytest.fail("measured again"))
    for start in (tiny_resnet(), ResNetForImageClassification.from_pretrained(tmp_path / "checkpoint-4")):
        resumed = trainer_on_shifted(start, tmp_path / "again", **SAVING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        same_tensors(snapshot(resumed.model), snapshot(whole.model))
        same_tensors(resumed._run.states["daft"].tensors, whole._run.states["daft"].tensors)


@pytest.mark.slow
def test_best_model_and_reload_have_the_converted_norms(tmp_path):
    arguments = {**SAVING, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    model = tiny_resnet()
    args = tiny_arguments(tmp_path, **SGD, **arguments)
    data = shifted(model)
    trainer = FTTrainer(model, args, strategy=DAFTConfig(), train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = ResNetForImageClassification.from_pretrained(tmp_path / "saved")
    same_tensors(snapshot(loaded), snapshot(trainer.model))
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_converting_a_converted_model_again_moves_it_by_rounding_only(tmp_path):
    """Reloaded before any training and measured again, it already has its target's statistics."""
    once = started(tiny_resnet(), tmp_path).model
    once.save_pretrained(tmp_path / "saved")
    twice = started(ResNetForImageClassification.from_pretrained(tmp_path / "saved"), tmp_path).model
    for name, value in snapshot(twice).items():
        assert torch.allclose(value, snapshot(once)[name], rtol=1e-4, atol=1e-5), name
    assert not torch.allclose(
        once.resnet.embedder.embedder.normalization.weight, tiny_resnet().resnet.embedder.embedder.normalization.weight
    )


# --- together with others


@pytest.mark.slow
def test_l2_sp_pulls_to_the_converted_weights(tmp_path):
    trainer = started(tiny_resnet(), tmp_path, [DAFTConfig(), L2SPConfig(alpha=0.5, beta=0.5)])
    norm = trainer.model.resnet.embedder.embedder.normalization
    anchor = trainer._run.anchors["resnet.embedder.embedder.normalization.weight"]
    assert torch.equal(anchor, norm.weight) and not torch.equal(anchor, torch.ones_like(anchor))
    terms = trainer._run.objective().train()(**tiny_inputs(trainer.model, 8))["terms"]
    assert float(terms["l2_sp"]) == 0 and float(terms["l2_head"]) == 0 and float(terms["task"]) > 0
    trainer.train()
    logged = [entry["loss/l2_sp"] for entry in trainer.state.log_history if "loss/l2_sp" in entry]
    assert logged[0] == 0 and logged[-1] > 0


@pytest.mark.parametrize("order", [1, -1])
def test_with_block_wise_fine_tuning_it_converts_the_network_and_one_block_trains(order, tmp_path):
    """Where nothing trains, conversion changes nothing; the block starts from its pretrained function, as in DAFT."""
    block, pretrained = "resnet.encoder.stages.1", tiny_resnet()
    configs = [BlockwiseConfig(block="stage1"), DAFTConfig()][::order]
    trainer = started(model := tiny_resnet(), tmp_path, configs, num_train_epochs=3)
    [stage] = trainer._run.plan.stages
    assert [rate.names for rate in stage.rates] == [("classifier",)]  # both fit the same
    assert torch.allclose(features(model), features(pretrained), rtol=1e-4, atol=1e-5)
    assert not logits(model).any()
    before = snapshot(model)
    trainer.train()
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith((block, "classifier")) for name in moved)
    assert f"{block}.layers.0.layer.0.normalization.running_mean" in moved
    batch = tiny_inputs(model)["pixel_values"]
    with torch.no_grad():
        inputs = [net.eval().resnet.encoder.stages[0](net.resnet.embedder(batch)) for net in (model, pretrained)]
    assert torch.allclose(*inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_a_search_trains_its_candidates_in_the_converted_network(order, tmp_path, monkeypatch):
    """With the head's seed too: a head that starts at zero is not drawn anew."""
    starts = []
    begun = BlockwiseConfig.start

    def start(self, model, candidate):
        starts.append(snapshot(model))
        return begun(self, model, candidate)

    monkeypatch.setattr(BlockwiseConfig, "start", start)
    search = BlockwiseConfig(search_epochs=1, search_seeds=2, validation=0.5, baselines=False, storage="memory")
    trainer = trainer_on_shifted(model := tiny_resnet(), tmp_path, [search, DAFTConfig()][::order])
    states = trainer.measure()  # and set up the run
    assert len(starts) >= 6
    for one in starts:
        same_tensors(one, snapshot(model))
    alone = trainer_on_shifted(tiny_resnet(), tmp_path / "alone", search).measure()["blockwise"]
    scores = [[one.scores for one in search.scores(state).scores] for state in (states["blockwise"], alone)]
    assert scores[0] != scores[1]


@pytest.mark.parametrize("order", [1, -1])
def test_with_amcf_it_converts_all_members(order, tmp_path):
    model = CollaborativeModel.from_members([tiny_resnet(), tiny_resnet(depths=[1, 1], seed=1)])
    configs = [AMCFConfig(source_models=("one", "other"), frozen=(1, 1)), DAFTConfig()][::order]
    plan = started(model, tmp_path, configs)._run.plan
    [convert] = [part for part in plan.surgery if isinstance(part, ConvertBatchNorm)]
    assert {name.split(".")[1] for name in convert.names} == {"0", "1"}
    assert [rate.names for rate in plan.stages[0].rates] == [("members.0.classifier", "members.1.classifier")]
    assert plan.stages[0].name == "collaborative" and len(plan.terms) == 1


# --- refused, before anything changes


@pytest.mark.slow
def test_the_error_for_a_model_without_batch_norm_names_the_fix(tmp_path):
    model = tiny_vit()
    before = snapshot(model)
    trainer = make_trainer(model, "daft", tmp_path)
    with pytest.raises(
        OptionError, match=r"no BatchNorm.*DAFTConfig\(convert_batch_norm=False\) keeps the rest of the method"
    ):
        trainer.train()
    same_tensors(snapshot(model), before)
    train(model, DAFTConfig(convert_batch_norm=False), tmp_path)
    with pytest.raises(AssertionError):
        same_tensors(snapshot(model), before)


def test_without_a_measured_state_there_is_no_plan():
    for run in (
        lambda: DAFTConfig().plan(tiny_resnet(), State()),
        lambda: set_up(tiny_resnet(), "daft", states={}),
    ):
        with pytest.raises(OptionError, match="the state holds no BatchNorm statistics"):
            run()


def test_data_that_are_not_finite_are_refused_by_layer(tmp_path):
    trainer = trainer_on_shifted(tiny_resnet(), tmp_path)
    trainer.train_dataset[3]["pixel_values"][0, 0, 0] = torch.nan
    with pytest.raises(OptionError, match="'resnet.embedder.embedder.normalization' is not finite"):
        trainer.train()


def test_an_adapter_that_would_lose_the_conversion_is_refused(tmp_path):
    def adapted(**modules):
        config = LoraConfig(
            r=2, target_modules=["convolution"], modules_to_save=["classifier", *modules.get("save", ())]
        )
        return get_peft_model(tiny_resnet(), config)

    with pytest.raises(OptionError, match="the PEFT adapter does not save.*modules_to_save.*convert_batch_norm=False"):
        trainer_on_shifted(adapted(), tmp_path).train()
    trainer = started(adapted(), tmp_path, DAFTConfig(convert_batch_norm=False))
    assert float(logits(trainer.model).abs().max()) == 0
    # As whole trained modules, norms are converted and saved; the originals, which do not run, are unchanged.
    model = adapted(save=["normalization"])
    untouched = {n: v for n, v in snapshot(model).items() if "original_module" in n}
    trainer = started(model, tmp_path)
    assert len(trainer._run.states["daft"].tensors) == 2 * len(batch_norms(tiny_resnet()))
    same_tensors({n: v for n, v in snapshot(model).items() if "original_module" in n}, untouched)


def test_an_adapter_on_the_head_is_refused(tmp_path):
    model = get_peft_model(tiny_vit(), LoraConfig(r=2, target_modules=["classifier"]))
    with pytest.raises(OptionError, match="the head .* carries an adapter.*zero_head=False"):
        set_up(model, DAFTConfig(convert_batch_norm=False))


@pytest.mark.slow
def test_data_without_length_are_refused_only_where_they_are_measured(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny_data(tiny_resnet()))

    args = tiny_arguments(tmp_path, **SGD)
    with pytest.raises(OptionError, match="daft measures the training data first.*map-style"):
        FTTrainer(tiny_resnet(), args, strategy="daft", train_dataset=Stream()).train()
    FTTrainer(
        tiny_resnet(), args, strategy=DAFTConfig(convert_batch_norm=False), train_dataset=Stream(), overwrite=True
    ).train()
