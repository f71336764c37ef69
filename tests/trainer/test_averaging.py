"""Wherever a Trainer evaluates, saves or ends, its model is the weights' average; training continues without it."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_ft import (
    AMCFConfig,
    CheckpointError,
    EMAConfig,
    FTConfig,
    Plan,
    RIFLEConfig,
    Stage,
    load_delta,
    register,
)
from hf_ft.testing import same_tensors, tiny_collaborative, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import make_trainer, snapshot
from tests.strategies.test_ema import averages

EACH = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "optim": "sgd"}


class Watching(TrainerCallback):
    """Keeps the live weights at the start and after each step, and what replaces them in the end."""

    def __init__(self, trainer):
        self.trainer, self.live = trainer, []
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.live.append(snapshot(model))
        self.parameters = [name for name, _ in model.named_parameters()]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.live.append(snapshot(model))
        if state.global_step == args.max_steps:
            with self.trainer._averaged():
                self.last, self.logits = snapshot(model), logits(model)
            if args.save_steps == EACH["save_steps"]:
                self.trainer.save_delta(f"{args.output_dir}/delta")


def logits(model):
    mode = model.training
    with torch.no_grad():
        found = model.eval()(**tiny_inputs(model, 4, seed=5)).logits
    model.train(mode)
    return found


def test_what_is_evaluated_and_saved(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = make_trainer(tiny_resnet(), ["lp_ft", EMAConfig(decay=0.6)], tmp_path, **EACH, **best, learning_rate=0.05)
    watching = Watching(trainer)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    for step in (2, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        saved = AutoModelForImageClassification.from_pretrained(folder)
        same_tensors(snapshot(saved), averages(watching.live[: step + 1], 0.6, watching.parameters), 1e-6)
        plain = make_trainer(saved, "full", tmp_path / "plain")
        assert losses[step] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)
        live = load_file(folder / "ft_live.safetensors")
        assert torch.equal(live["live/classifier.1.weight"], watching.live[step]["classifier.1.weight"])
    assert trainer.state.best_global_step == min(losses, key=losses.get) < 8
    chosen = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    same_tensors(snapshot(trainer.model), snapshot(chosen))  # the best average, not the last
    same_tensors(snapshot(load_delta(tiny_resnet(), tmp_path / "delta")), watching.last)
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "ft_live.safetensors").exists()
    assert "moving average of the weights" in (tmp_path / "saved" / "README.md").read_text()


@pytest.mark.parametrize(
    ("make", "strategy"),
    [
        (tiny_resnet, ["daft", "ema"]),
        (tiny_resnet, ["stoch_norm", "ema"]),
        (tiny_vit, ["ema", "peft", "l2_sp"]),
        (tiny_collaborative, [AMCFConfig(frozen=(2, 10)), "ema"]),
    ],
    ids=lambda value: "+".join(getattr(s, "ft_type", s) for s in value) if isinstance(value, list) else value.__name__,
)
def test_composed(make, strategy, tmp_path):
    """Undoing a strategy's changes to the model after training acts on the average."""
    trainer = make_trainer(make(), strategy, tmp_path, optim="sgd", max_steps=4)
    watching = Watching(trainer)
    trainer.train()
    same_tensors(watching.last, averages(watching.live, 0.99, watching.parameters), 1e-5)
    assert any(not torch.equal(watching.last[name], value) for name, value in watching.live[-1].items())
    torch.testing.assert_close(logits(trainer.model), watching.logits, atol=1e-5, rtol=1e-4)


def test_it_starts_over_when_weights_are_redrawn(tmp_path):
    trainer = make_trainer(tiny_vit(), [RIFLEConfig(times=1), "ema"], tmp_path, optim="sgd")
    watching, drawn = Watching(trainer), {}
    training_step = trainer.training_step

    def watched(model, *args, **kwargs):
        if trainer.state.global_step == 4:
            drawn.update(snapshot(trainer.model))
        return training_step(model, *args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    same_tensors(snapshot(trainer.model), averages([drawn, *watching.live[5:]], 0.99, watching.parameters), 1e-6)
    assert not torch.equal(drawn["classifier.weight"], watching.live[4]["classifier.weight"])


@register("thawed_then_frozen")
@dataclass(frozen=True, kw_only=True)
class ThawedThenFrozenConfig(FTConfig):
    """Trains everything, then only the head, on features whose average still changes."""

    def plan(self, model, state):
        head = self.anatomy(model).head.modules
        return Plan(stages=(Stage("all", duration=0.5), Stage("head", trains=head, duration=0.5, norm_mode="eval")))


def test_recorded_features_are_not_those_of_the_average(tmp_path):
    found = {}
    for use in ("never", "always"):
        trainer = train(tiny_resnet(), ["thawed_then_frozen", "ema"], tmp_path / use, frozen_cache=use, **EACH)
        assert use == "never" or trainer._attempt.cache.rows is not None
        found[use] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert found["always"] == pytest.approx(found["never"], abs=1e-6)


def test_a_model_in_bfloat16_is_averaged_in_float32_and_resumed(tmp_path):
    whole = make_trainer(tiny_vit().bfloat16(), "ema", tmp_path, **{**EACH, "save_steps": 3}, learning_rate=1e-3)
    watching = Watching(whole)
    whole.train()
    wanted = averages(watching.live, 0.99, watching.parameters)
    for name, value in watching.last.items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), wanted[name], atol=1e-6, rtol=2**-8)
    tensors = load_file(tmp_path / "checkpoint-3" / "ft_live.safetensors")
    assert tensors["average/classifier.weight"].dtype == torch.float32
    resumed = make_trainer(tiny_vit().bfloat16(), "ema", tmp_path, **EACH, learning_rate=1e-3)
    again = Watching(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    same_tensors(again.live[0], watching.live[3])
    same_tensors(again.last, watching.last)


def test_live_weights_of_another_model_are_refused(tmp_path):
    train(tiny_vit(), "ema", tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    average = make_trainer(tiny_vit(), "ema", tmp_path)._start_run().average
    average.begin()
    tensors = load_file(tmp_path / "checkpoint-4" / "ft_live.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit the model: live/classifier\.bias"):
        average.load_state_dict({name: t for name, t in tensors.items() if name != "live/classifier.bias"})
