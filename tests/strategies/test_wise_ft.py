"""The final weights are on the line between the initial and the trained ones, and validation determines where."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import TrainerCallback

from hf_ft import FTConfig, FTTrainer, LPFTConfig, OptionError, Plan, Stage, WiSEFTConfig, set_up
from hf_ft.engine.checkpoint import read_states
from hf_ft.models.norms import batch_norms
from hf_ft.testing import TINY_MODELS, tiny_data
from hf_ft.testing.training import make_trainer, same_tensors, snapshot, tiny_arguments

EVERY = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


class Told(TrainerCallback):
    evaluations = 0

    def on_evaluate(self, *args, **kwargs):
        self.evaluations += 1


@dataclass(frozen=True, kw_only=True)
class HeadLast(FTConfig):
    """Everything trains, then only the head, on recorded outputs of the rest."""

    ft_type = "head_last"

    def plan(self, model, state):
        head = self.anatomy(model).head.modules
        return Plan(stages=(Stage("all", duration=0.25), Stage("head", trains=head, duration=0.75)))


def trained_alone(make, folder, strategy="full", **arguments):
    """Weights before and after the same training without an average."""
    model = make()
    before = snapshot(model)
    trainer = make_trainer(model, strategy, folder, **arguments)
    trainer.train()
    return before, snapshot(trainer.model), trainer


def reference_statistics(model, batches):
    """Means of batch means and unbiased batch variances, layer by layer, in float64, with other layers in eval mode."""
    model = copy.deepcopy(model).double().eval()
    norms = dict(batch_norms(model))
    seen = {name: [] for name in norms}

    def by_batch(name, norm):
        def forward(values):
            axes = [axis for axis in range(values.dim()) if axis != 1]
            mean, var = values.mean(axes), values.var(axes, correction=0)
            seen[name].append((mean, values.var(axes, correction=1)))
            shape = (1, -1, *(1,) * (values.dim() - 2))
            normal = (values - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
            return normal * norm.weight.view(shape) + norm.bias.view(shape)

        return forward

    for name, norm in norms.items():
        norm.forward = by_batch(name, norm)
    with torch.no_grad():
        for batch in batches:
            model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items() if k != "labels"})
    return {name: [torch.stack(values).mean(0) for values in zip(*pairs, strict=True)] for name, pairs in seen.items()}


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_weights_and_statistics_are_those_of_the_formula(name, tmp_path):
    make = TINY_MODELS[name]
    before, after, _ = trained_alone(make, tmp_path / "full")
    trainer = make_trainer(make(), WiSEFTConfig(alpha=0.3), tmp_path / "wise")
    trainer.train()
    found = snapshot(trainer.model)
    buffers = {key for key, _ in trainer.model.named_buffers()}
    for key, value in found.items():
        if key not in buffers:
            head = key.startswith("classifier")
            wanted = after[key].double() if head else 0.7 * before[key].double() + 0.3 * after[key].double()
            torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
    statistics = reference_statistics(trainer.model, trainer.context().batches())
    assert bool(statistics) is (name == "resnet")
    for layer, (mean, var) in statistics.items():
        assert not torch.equal(found[f"{layer}.running_mean"], after[f"{layer}.running_mean"])
        torch.testing.assert_close(found[f"{layer}.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"{layer}.running_var"].double(), var, rtol=1e-5, atol=1e-6)


def test_statistics_that_did_not_move_stay(tmp_path):
    strategy = [LPFTConfig(norm_mode="eval", head_lr=0.1), WiSEFTConfig(alpha=0.5)]
    model = TINY_MODELS["resnet"]()
    before = snapshot(model)
    trainer = make_trainer(model, strategy, tmp_path)
    trainer.train()
    after = snapshot(trainer.model)
    assert all(torch.equal(before[key], after[key]) for key in before if "running" in key)
    assert not torch.equal(
        before["resnet.embedder.embedder.convolution.weight"], after["resnet.embedder.embedder.convolution.weight"]
    )


def test_the_best_by_the_trainers_metric_is_chosen_and_recorded(tmp_path):
    """Independently: each candidate is trained with a fixed share, and evaluated by the Trainer."""
    make = TINY_MODELS["resnet"]
    scores = {}
    for alpha in (1.0, 0.5, 0.0):
        trainer = make_trainer(make(), WiSEFTConfig(alpha=alpha), tmp_path / str(alpha))
        trainer.train()
        scores[alpha] = trainer.evaluate()["eval_loss"]
    trainer = make_trainer(make(), WiSEFTConfig(steps=2), tmp_path / "auto")
    told = Told()
    trainer.add_callback(told)
    trainer.train()
    assert not told.evaluations  # the scores of candidates are not logged
    best = min(scores, key=scores.get)
    choice = trainer.states["wise_ft"].info["choice"]
    assert choice["value"] == best and choice["metric"] == "eval_loss"
    assert {alpha: score for alpha, score in choice["scores"]} == pytest.approx(scores)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[best])
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry.get("choice/wise_ft") for entry in entries] == [best, None]  # one entry, then the one from this test
    trainer.save_model(str(tmp_path / "saved"))
    assert read_states(tmp_path / "saved")["wise_ft"].info["choice"] == choice
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "Scores of the candidates" in card or "| alpha |" in card
    assert f"The final weights are {best:.4g} of the fine-tuned" in card


def test_the_fine_tuned_end_wins_ties_and_keeps_every_bit(tmp_path):
    make = TINY_MODELS["resnet"]
    _, after, _ = trained_alone(make, tmp_path / "full")
    model = make()
    trainer = make_trainer(model, WiSEFTConfig(steps=3), tmp_path / "wise", metric_for_best_model="same")
    trainer.args.greater_is_better = True
    trainer.compute_metrics = lambda prediction: {"same": 1.0}
    trainer.train()
    assert trainer.states["wise_ft"].info["choice"]["value"] == 1.0
    same_tensors(snapshot(trainer.model), after)


def test_scores_that_are_not_finite_are_never_chosen(tmp_path):
    trainer = make_trainer(TINY_MODELS["bert"](), WiSEFTConfig(steps=2), tmp_path, metric_for_best_model="odd")
    values = iter([float("nan"), 0.2, 0.1])
    trainer.args.greater_is_better = True
    trainer.compute_metrics = lambda prediction: {"odd": next(values)}
    trainer.train()
    choice = trainer.states["wise_ft"].info["choice"]
    assert choice["value"] == 0.5 and choice["scores"] == [[1.0, None], [0.5, 0.2], [0.0, 0.1]]


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_resumed_runs_choose_the_same(checkpoint, tmp_path):
    """Resumed in the middle, and when nothing is left to train."""
    make = TINY_MODELS["resnet"]
    whole = make_trainer(make(), WiSEFTConfig(steps=2), tmp_path, **EVERY)
    whole.train()
    resumed = make_trainer(make(), WiSEFTConfig(steps=2), tmp_path / "again", **EVERY)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    assert resumed.states["wise_ft"].info == whole.states["wise_ft"].info


def test_the_best_model_is_averaged(tmp_path):
    """Not the last one: the result equals averaging the best checkpoint of a run without the average."""
    best = {**EVERY, "save_steps": 1, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    best |= {"learning_rate": 0.3, "metric_for_best_model": "loss"}
    before, after, alone = trained_alone(TINY_MODELS["bert"], tmp_path / "full", **best)
    assert alone.state.best_global_step < alone.state.global_step
    trainer = make_trainer(TINY_MODELS["bert"](), WiSEFTConfig(alpha=0.5), tmp_path / "wise", **best)
    trainer.train()
    for key, value in trainer.model.named_parameters():
        share = 1.0 if key.startswith("classifier") else 0.5
        torch.testing.assert_close(value.data, (1 - share) * before[key] + share * after[key], rtol=1e-5, atol=1e-7)


def test_an_average_of_half_precision_weights_is_rounded_once(tmp_path):
    make = lambda: TINY_MODELS["bert"]().bfloat16()  # noqa: E731
    before, after, _ = trained_alone(make, tmp_path / "full")
    trainer = make_trainer(make(), WiSEFTConfig(alpha=0.25), tmp_path / "wise")
    trainer.train()
    key = "bert.encoder.layer.0.output.dense.weight"
    wanted = (0.75 * before[key].double() + 0.25 * after[key].double()).bfloat16()
    assert torch.equal(trainer.model.state_dict()[key], wanted)


def test_the_head_is_averaged_on_request(tmp_path):
    before, after, _ = trained_alone(TINY_MODELS["bert"], tmp_path / "full")
    trainer = make_trainer(TINY_MODELS["bert"](), WiSEFTConfig(alpha=0.0, average_head=True), tmp_path / "wise")
    trainer.train()
    found = dict(trainer.model.named_parameters())
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    same_tensors({key: value.data for key, value in found.items()}, {key: before[key] for key in found})


def test_recordings_of_the_last_stage_are_not_used(tmp_path):
    """They were made with the trained weights."""
    scores = []
    for cache in ("always", "never"):
        evaluated = {"max_steps": 16, "eval_strategy": "steps", "eval_steps": 8}
        strategy = [HeadLast(), WiSEFTConfig(steps=1)]
        trainer = make_trainer(TINY_MODELS["vit"](), strategy, tmp_path / cache, frozen_cache=cache, **evaluated)
        trainer.train()
        scores.append([score for _, score in trainer.states["wise_ft"].info["choice"]["scores"]])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5) and scores[0][0] != pytest.approx(scores[0][1], rel=1e-3)


# --- refused, before training -----------------------------------------------------------------------------


def test_without_evaluation_data_alpha_must_be_a_number(tmp_path):
    model = TINY_MODELS["bert"]()
    given = {"args": tiny_arguments(tmp_path, max_steps=1), "train_dataset": tiny_data(model)}
    with pytest.raises(OptionError, match=r"wise_ft chooses .*pass eval_dataset.*or set wise_ft.alpha to a number"):
        FTTrainer(model, strategy="wise_ft", **given)
    trainer = FTTrainer(model, strategy=WiSEFTConfig(alpha=0.5), **given)
    trainer.train()
    assert trainer.states["wise_ft"].info["choice"] == {"value": 0.5, "metric": "", "scores": [[0.5, None]]}


def test_several_evaluation_sets_need_a_metric_of_one(tmp_path):
    model = TINY_MODELS["bert"]()
    data = {"train_dataset": tiny_data(model), "eval_dataset": {"a": tiny_data(model, 8), "b": tiny_data(model, 8)}}
    with pytest.raises(OptionError, match="set metric_for_best_model to a metric of one of them, such as a_loss"):
        FTTrainer(model, tiny_arguments(tmp_path, max_steps=1), strategy="wise_ft", **data)
    args = tiny_arguments(tmp_path, max_steps=1, metric_for_best_model="b_loss")
    trainer = FTTrainer(model, args, strategy=WiSEFTConfig(steps=1), **data)
    trainer.train()
    assert trainer.states["wise_ft"].info["choice"]["metric"] == "eval_b_loss"


@pytest.mark.parametrize(
    ("others", "message"),
    [("linear_probe", "linear_probe trains nothing"), ("peft", "factors of a product")],
)
def test_what_cannot_be_averaged_is_refused(others, message, tmp_path):
    model = TINY_MODELS["bert"]()
    with pytest.raises(OptionError, match=f"wise_ft averages .*{message}"):
        set_up(model, [others, "wise_ft"], states={})


# --- hand-written loops -----------------------------------------------------------------------------------


def step(run):
    objective = run.objective()
    begin_step, optimizer = run.stepper(objective, 1), torch.optim.SGD(run.param_groups(0.1))
    begin_step(0)
    objective.train()
    data = tiny_data(run.model, 16)
    objective(**data[:8])["loss"].backward()
    optimizer.step()
    return [data[:8], data[8:]]


def test_a_handwritten_loop_passes_the_evaluation():
    run = set_up(TINY_MODELS["resnet"](), WiSEFTConfig(steps=2))
    batches, seen = step(run), []

    def evaluate(model):
        seen.append(snapshot(model))
        return {1: 0.1, 2: 0.9, 3: 0.5}[len(seen)]

    with pytest.raises(OptionError, match=r"wise_ft chooses among 3 models after training: pass evaluate=\.\.\."):
        run.finish()
    with pytest.raises(OptionError, match=r"pass the training data as batches=\.\.\."):
        run.finish(lambda model: 0.0)
    run = run.select(evaluate, batches)
    assert run.states["wise_ft"].info["choice"]["value"] == 0.5
    same_tensors(snapshot(run.finish()), seen[1])


def test_a_running_average_is_what_is_averaged(tmp_path):
    key = "bert.encoder.layer.0.output.dense.weight"
    before, after, _ = trained_alone(TINY_MODELS["bert"], tmp_path / "ema", "ema")
    trainer = make_trainer(TINY_MODELS["bert"](), ["ema", WiSEFTConfig(alpha=0.5)], tmp_path / "wise")
    trainer.train()
    wanted = 0.5 * before[key] + 0.5 * after[key]
    torch.testing.assert_close(trainer.model.state_dict()[key], wanted, rtol=1e-6, atol=1e-8)
