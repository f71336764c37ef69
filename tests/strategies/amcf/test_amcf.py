"""AMCF: its loss, what stays frozen, and that members learn as if alone, except for the term between them."""

import copy
import math

import pytest
import torch
import transformers as hf
from torch import nn

from docs.tools.tables import documented
from hf_ft import (
    AMCFConfig,
    AnatomyError,
    CollaborativeModel,
    FTConfig,
    L2SPConfig,
    OptionError,
    collaborative_loss,
    config_class,
    set_up,
)
from hf_ft.functional import disagreement
from hf_ft.models.norms import batch_norms
from hf_ft.models.weight_layers import main_path_layers
from hf_ft.testing import LAWS, TINY_MODELS, tiny_bert, tiny_collaborative, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import make_trainer, same_tensors, snapshot

FROZEN = AMCFConfig(frozen=[2, 10])


def logits(members=3, batch=5, classes=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(batch, classes, generator=random, dtype=torch.float64) for _ in range(members)]
    return drawn, torch.randint(classes, (batch,), generator=random)


def reference(members, labels, consistency):
    """The formula in plain Python, in float64."""
    total = 0.0
    for z in members:
        for row, label in zip(z.tolist(), labels.tolist(), strict=True):
            total += (math.log(sum(math.exp(value) for value in row)) - row[label]) / len(labels)
    apart = 0.0
    for sample in range(len(labels)):
        rows = [z[sample].tolist() for z in members]
        mean = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
        apart += sum(math.dist(row, mean) for row in rows) / len(rows)
    return total + consistency * apart / len(labels)


# --- the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consistency", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("members", [1, 2, 3])
def test_the_loss_is_the_papers(members, consistency):
    drawn, labels = logits(members)
    assert collaborative_loss(drawn, labels, consistency).item() == pytest.approx(
        reference(drawn, labels, consistency), rel=1e-12
    )


def test_one_member_is_plain_cross_entropy():
    (alone,), labels = logits(1)
    assert torch.equal(collaborative_loss([alone], labels), nn.functional.cross_entropy(alone, labels))


def test_the_gradient_is_right_and_finite_where_members_agree():
    drawn, labels = logits(2)
    drawn = [z.requires_grad_() for z in drawn]
    assert torch.autograd.gradcheck(lambda *z: collaborative_loss(z, labels, 0.7), drawn)
    same = [drawn[0].detach().clone().requires_grad_() for _ in range(3)]
    assert disagreement(same).item() == 0.0
    loss = collaborative_loss(same, labels, 5.0)
    assert loss.item() == pytest.approx(reference(same, labels, 0.0), rel=1e-12)
    loss.backward()
    alone = drawn[0].detach().clone().requires_grad_()
    nn.functional.cross_entropy(alone, labels).backward()
    for z in same:
        assert torch.allclose(z.grad, alone.grad, atol=1e-15), "nothing but the cross-entropy pulls"


def test_the_mean_is_not_detached():
    """With two members, each pulls the other by the same force."""
    drawn, _ = logits(2)
    one, other = (z.requires_grad_() for z in drawn)
    disagreement([one, other]).backward()
    assert torch.allclose(one.grad, -other.grad) and one.grad.abs().max() > 0
    # |z_1 - mean| = |z_2 - mean| = |z_1 - z_2| / 2, so the mean over both has the gradient of the latter.
    apart = (one - other).detach()
    expected = apart / apart.norm(dim=1, keepdim=True) / 2 / len(apart)
    assert torch.allclose(one.grad, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], torch.zeros(2, dtype=torch.long)), "not \\[\\]"),
        (([torch.zeros(2, 3), torch.zeros(2, 4)], torch.zeros(2, dtype=torch.long)), r"\(2, 3\), \(2, 4\)"),
        (([torch.zeros(2, 3)], torch.zeros(2, dtype=torch.long), -1.0), "consistency=-1.0"),
        (([torch.zeros(2, 3)], torch.zeros(2, dtype=torch.long), math.nan), "consistency=nan"),
        (([torch.zeros(2, 3)], torch.zeros(2, dtype=torch.long), math.inf), "consistency=inf"),
    ],
)
def test_bad_losses(arguments, message):
    with pytest.raises(OptionError, match=message):
        collaborative_loss(*arguments)


# --- the members ----------------------------------------------------------------------------------------------


def gradients(model, config, batch):
    run = set_up(model, config)
    objective = run.objective()
    objective.enter(run.plan.stages[0])
    objective.train()
    torch.manual_seed(0)
    outputs = objective(**batch)
    outputs["loss"].backward()
    return run.model, outputs


def test_without_the_term_identical_members_learn_as_if_alone():
    alone = tiny_resnet()
    batch = tiny_inputs(alone, 8)
    gradients(alone, AMCFConfig(frozen=[0]), batch)
    both = CollaborativeModel.from_members([tiny_resnet(), tiny_resnet()])
    gradients(both, AMCFConfig(frozen=[0, 0], consistency=0.0), batch)
    for member in both.members:
        for (name, one), (_, other) in zip(member.named_parameters(), alone.named_parameters(), strict=True):
            assert torch.equal(one.grad, other.grad), name


def test_the_objective_adds_up_to_the_loss():
    model = tiny_collaborative()
    _, outputs = gradients(model, AMCFConfig(frozen=[1, 3], consistency=0.7), tiny_inputs(model, 8))
    members = [z.detach().double() for z in outputs["member_logits"]]
    expected = reference(members, tiny_inputs(model, 8)["labels"], 0.7)
    assert outputs["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert set(outputs["terms"]) == {"task", "consistency"}
    assert outputs["terms"]["task"].item() == pytest.approx(
        reference(members, tiny_inputs(model, 8)["labels"], 0.0), rel=1e-6
    )
    assert torch.allclose(outputs["logits"], sum(outputs["member_logits"]))


@pytest.mark.slow
def test_permuting_members_permutes_everything(tmp_path):
    first, second = tiny_resnet(), TINY_MODELS["mobilenet_v1"](seed=3)
    models = [CollaborativeModel.from_members(copy.deepcopy(members)) for members in ([first, second], [second, first])]
    ends = [
        train(model, AMCFConfig(frozen=list(frozen), consistency=0.5), tmp_path / str(place), optim="sgd")
        for place, (model, frozen) in enumerate(zip(models, [(2, 9), (9, 2)], strict=True))
    ]
    for one, other in ((0, 1), (1, 0)):
        same_tensors(snapshot(ends[0].model.members[one]), snapshot(ends[1].model.members[other]), 1e-6)
    assert [e["loss"] for e in ends[0].state.log_history if "loss" in e] == pytest.approx(
        [e["loss"] for e in ends[1].state.log_history if "loss" in e], rel=1e-5
    )


def test_label_smoothing_and_class_weights_are_summed_over_members(tmp_path):
    model = tiny_collaborative()
    batch = tiny_inputs(model, 8)
    labels = batch["labels"]
    weights = torch.tensor([1.0, 2.0, 0.5])
    for arguments, expected in (
        ({"label_smoothing_factor": 0.1}, lambda z: nn.functional.cross_entropy(z, labels, label_smoothing=0.1)),
        ({}, lambda z: nn.functional.cross_entropy(z, labels, weight=weights, reduction="sum") / len(labels)),
    ):
        trainer = make_trainer(model, FROZEN, tmp_path, **arguments)
        if not arguments:
            trainer.task_loss.class_weights = weights
        loss, outputs = trainer.task_loss(model.eval(), batch)
        assert loss.item() == pytest.approx(sum(expected(z).item() for z in outputs["member_logits"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["sum", "mean_probability"])
def test_the_prediction_is_set_in_the_model(prediction, tmp_path):
    config = AMCFConfig(frozen=[6, 21], prediction=prediction)
    trainer = train(tiny_collaborative(), config, tmp_path, save_strategy="steps", save_steps=8)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config.prediction == prediction
    outputs = loaded(**tiny_inputs(loaded))
    stacked = torch.stack(outputs.member_logits)
    expected = stacked.sum(0) if prediction == "sum" else stacked.softmax(-1).mean(0).log()
    assert torch.allclose(outputs.logits, expected, atol=1e-5)


# --- what stays frozen ----------------------------------------------------------------------------------------


def test_layers_count_the_main_path():
    with torch.device("meta"):
        resnet50 = hf.ResNetForImageClassification(hf.ResNetConfig())
    assert len(main_path_layers(resnet50)) == 49, "as the authors count"
    assert len(main_path_layers(TINY_MODELS["mobilenet_v2"]())) == 52
    # A shortcut belongs to the first layer of its block, a gate to the layer before it.
    layers = [layer.modules for layer in main_path_layers(TINY_MODELS["regnet"]())]
    shortcut = next(modules for modules in layers if any("shortcut" in name for name in modules))
    assert any(name.endswith("layer.0.convolution") for name in shortcut)
    gate = next(modules for modules in layers if any("attention" in name for name in modules))
    assert any(name.endswith("layer.1.convolution") for name in gate)
    swin = TINY_MODELS["swin"]()
    merging = "swin.encoder.layers.0.downsample.reduction"
    assert any(merging in layer.modules for layer in main_path_layers(swin)), "on the main path, whatever its name"


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert, TINY_MODELS["efficientnet"]])
def test_the_first_layers_stay_and_all_after_them_train(make, tmp_path):
    model = make()
    layers = main_path_layers(model)
    for k in (0, 1, len(layers) // 2, len(layers) - 1):
        model = make()
        before = snapshot(model)
        trainer = train(model, AMCFConfig(frozen=[k]), tmp_path / str(k), max_steps=3, weight_decay=0.1)
        after = snapshot(trainer.model)
        still = {name for name in before if torch.equal(before[name], after[name])}
        first = [module for layer in layers[:k] for module in layer.modules]
        for name in before:
            if any(name == module or name.startswith(f"{module}.") for module in first):
                assert name in still, f"{name} moved with {k} layers frozen"
        for layer in layers[k:]:
            names = [n for n in before for m in layer.modules if n.startswith(f"{m}.")]
            assert not set(names) <= still, f"{layer.modules} did not train with {k} layers frozen"
        head = [name for name in before if name.startswith("classifier")]
        assert not set(head) & still


def test_a_class_token_stays_with_the_first_layer(tmp_path):
    for k, stays in ((0, False), (1, True)):
        model = tiny_vit()
        token = model.vit.embeddings.cls_token.detach().clone()
        train(model, AMCFConfig(frozen=[k]), tmp_path / str(k), max_steps=2)
        assert torch.equal(model.vit.embeddings.cls_token, token) == stays


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, (False, False)),
        ({"norm_mode": "auto"}, (False, True)),
        ({"norm_mode": "train"}, (True, True)),
        ({"freeze_norm_statistics": False}, (True, True)),
    ],
)
def test_which_statistics_move(options, moves, tmp_path):
    model = tiny_collaborative()
    before = snapshot(model)
    trainer = train(model, AMCFConfig(frozen=[3, 20], **options), tmp_path, max_steps=3)
    after = snapshot(trainer.model)
    names = [name for name, _ in batch_norms(model)]
    frozen, last = [n for n in names if n.startswith("members.0.resnet.embedder")], names[-1]
    assert frozen and last not in frozen
    for name, wanted in [(name, moves[0]) for name in frozen] + [(last, moves[1])]:
        assert torch.equal(before[f"{name}.running_mean"], after[f"{name}.running_mean"]) != wanted, name
    for name in frozen:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])


@pytest.mark.slow
def test_frozen_parameters_cost_no_gradient_and_no_optimizer_state(tmp_path):
    trainer = make_trainer(tiny_collaborative(), FROZEN, tmp_path, optim="adamw_torch")
    seen = []
    step = trainer.training_step

    def spy(*args, **kwargs):
        loss = step(*args, **kwargs)
        seen.append({n for n, p in trainer.model.named_parameters() if p.grad is not None})
        return loss

    trainer.training_step = spy
    trainer.train()
    trained = set(trainer._run.trained)
    everything = {name for name, _ in trainer.model.named_parameters()}
    assert seen[0] == trained and trained < everything
    assert len(trainer.optimizer.state) == len(trained)


@pytest.mark.slow
def test_composes_with_a_penalty(tmp_path):
    trainer = train(tiny_collaborative(), [FROZEN, L2SPConfig()], tmp_path)
    logged = trainer.state.log_history[0]
    assert {"loss/task", "loss/consistency"} <= set(logged) and any(key.startswith("loss/l2_sp") for key in logged)


# --- laws, on a model of two members --------------------------------------------------------------------------


def resnet_and_vit():
    """Depthwise convolutions round differently with weights elsewhere in memory; these models' logits are equal."""
    return CollaborativeModel.from_members([tiny_resnet(), tiny_vit()], inputs=[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_law_with_several_members(law, tmp_path):
    LAWS[law](FROZEN, resnet_and_vit, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("use", ["never", "always"])
def test_bfloat16_and_the_best_model(use, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = train(
        tiny_collaborative(), FROZEN, tmp_path, bf16=True, frozen_cache=use, load_best_model_at_end=True, **arguments
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(map(math.isfinite, losses))
    best = CollaborativeModel.from_pretrained(trainer.state.best_model_checkpoint)
    same_tensors(snapshot(best), snapshot(trainer.model))


@pytest.mark.slow
def test_recorded_members_train_as_computed_ones(tmp_path):
    """Also if one member is frozen up to its last layer and the other not at all."""
    for frozen in ([2, 10], [0, 21], [6, 0]):
        config = AMCFConfig(frozen=frozen)
        ends = {
            use: train(tiny_collaborative(), config, tmp_path / use, frozen_cache=use, max_steps=12, optim="sgd")
            for use in ("never", "always")
        }
        assert ends["always"]._attempt.cache.rows is not None
        same_tensors(snapshot(ends["never"].model), snapshot(ends["always"].model), 1e-5)


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": [7, 0]}, r"frozen=\[7, 0\]: member 0 has 7 layers, so 0 to 6 of them can be frozen, not 7"),
        ({"frozen": [0, -1]}, r"member 1 has 22 layers, so 0 to 21 of them can be frozen, not -1"),
        ({"frozen": [1]}, r"has 1 values for 2 members"),
        ({"frozen": [0, 0], "source_models": ["a"]}, "names 1 models, but the model has 2 members"),
        ({"source_models": ["a", "b", "c"]}, "names 3 models, but the model has 2 members"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_training(options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        make_trainer(tiny_collaborative(), AMCFConfig(**options), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": "some"}, "frozen='some'"),
        ({"consistency": -0.1}, "consistency=-0.1"),
        ({"prediction": "vote"}, "prediction='vote'"),
        ({"particles": 0}, "particles=0"),
        ({"metric": "bleu"}, "metric='bleu' is unknown"),
        ({"validation": 1.0}, "validation=1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        AMCFConfig(**options)


def test_statistics_cannot_move_if_there_are_none(tmp_path):
    model = CollaborativeModel.from_members([tiny_resnet(), tiny_vit()])
    with pytest.raises(OptionError, match=r"freeze_norm_statistics=False: members.1 has no BatchNorm"):
        make_trainer(model, AMCFConfig(frozen=[0, 0], freeze_norm_statistics=False), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", documented())
def test_only_strategies_for_several_members_accept_them(name, tmp_path):
    """The others depend on the depth, or the head, of one network; a single member is such a network."""
    options = {"particles": 2, "iterations": 1, "search_epochs": 1, "storage": "memory"} if name == "amcf" else {}
    kind = documented()[name]
    if kind(**options).needs().several_members:
        before = snapshot(tiny_collaborative())
        trainer = train(tiny_collaborative(), kind(**options), tmp_path)
        after = snapshot(trainer.model)
        for member in ("members.0", "members.1"):
            moved = [n for n in before if n.startswith(member) and n in after and not torch.equal(before[n], after[n])]
            assert any("classifier" in n for n in moved), f"the head of {member} did not train"
    else:
        with pytest.raises(OptionError, match=f"{name} needs the layers and the head of a single network"):
            set_up(tiny_collaborative(), kind(**options), states={})


def test_a_named_head_is_used_where_it_fits():
    model = CollaborativeModel.from_members([tiny_resnet(), tiny_vit()])
    assert AMCFConfig(frozen=[1, 2], head="classifier.1").layers(model) == (7, 19)
    with pytest.raises(AnatomyError, match="members.0: head='nothing'"):
        AMCFConfig(frozen=[1, 2], head="nothing").layers(model)


def test_lists_are_restored_from_a_file(tmp_path):
    config = AMCFConfig(source_models=["a", "b"], frozen=[3, 4])
    config.save_pretrained(tmp_path)
    assert FTConfig.from_pretrained(tmp_path) == config and config.frozen == (3, 4)
    assert config_class("amcf") is AMCFConfig
