"""Killed at any moment and resumed, a run ends as if nothing had happened."""

import contextlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_ft import (
    CheckpointError,
    EMAConfig,
    FTConfig,
    FTTrainer,
    L2SPConfig,
    LPFTConfig,
    OptionError,
    Plan,
    register,
)
from hf_ft.engine.checkpoint_folders import checkpoints, last_checkpoint
from hf_ft.testing import same_tensors, tiny_bert, tiny_data, tiny_resnet, tiny_vit, train
from hf_ft.testing.laws import _losses, _same_optimizers
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments
from hf_ft.trainer.stage_cache import StageCache
from tests.forked import python
from tests.trainer.measuring_strategy import MeasuredConfig

STRATEGY = [LPFTConfig(), L2SPConfig(), EMAConfig()]
SAVING = {"save_strategy": "steps", "save_steps": 2}


# The probe ends at step 4: killed within it, just after its end, and while saving before and after it.
@pytest.mark.slow
@pytest.mark.parametrize(("where", "at", "last"), [("step", 3, 2), ("step", 5, 4), ("save", 4, 2), ("save", 6, 4)])
def test_killed_and_resumed(where, at, last, tmp_path):
    script = Path(__file__).with_name("killed_worker.py")
    killed = python(script, tmp_path / "run", where, at)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert last_checkpoint(tmp_path / "run").name == f"checkpoint-{last}"
    resumed = train(tiny_resnet(), STRATEGY, tmp_path / "run", resume=True, **SAVING)
    whole = train(tiny_resnet(), STRATEGY, tmp_path / "whole", **SAVING)
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    _same_optimizers(resumed.optimizer, whole.optimizer)
    assert _losses(resumed) == _losses(whole)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"checkpoint-{i}" for i in (2, 4, 6, 8)]
    assert not list((tmp_path / "run").glob("incomplete-*")), "a half-written folder was left"


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    ["model.safetensors", "ft_live.safetensors", "ft_state.safetensors", "ft_config.json", "trainer_state.json"],
)
def test_broken_checkpoints_are_passed_over(damage, tmp_path):
    train(tiny_resnet(), STRATEGY, tmp_path, **SAVING)
    (tmp_path / "checkpoint-8" / damage).unlink()
    file = tmp_path / "checkpoint-6" / damage
    file.write_bytes(file.read_bytes()[:20])
    expected = "checkpoint-4"
    assert last_checkpoint(tmp_path).name == expected
    resumed = train(tiny_resnet(), STRATEGY, tmp_path, resume=True, **SAVING)
    assert resumed.state.global_step == 8


@register("doubling")
@dataclass(frozen=True, kw_only=True)
class DoublingConfig(FTConfig):
    """Doubles the head's bias once training has ended."""

    def plan(self, model, state):
        def doubled(trained: nn.Module) -> nn.Module:
            with torch.no_grad():
                trained.classifier[1].bias.mul_(2)
            return trained

        return Plan(finalise=(doubled,))


class Steps(TrainerCallback):
    """Counts the training steps."""

    def __init__(self):
        self.taken = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.taken += 1


# An epoch has 4 steps: a run of 10 ends within its third.
@pytest.mark.parametrize("cache", ["auto", "always"])
def test_a_finished_run_is_resumed_without_a_step(cache, tmp_path, monkeypatch):
    strategy = [LPFTConfig(), L2SPConfig(), DoublingConfig()]
    best = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, "load_best_model_at_end": True}
    arguments = {**SAVING, **best, "max_steps": 10, "learning_rate": 0.1, "frozen_cache": cache}
    whole = train(tiny_resnet(), strategy, tmp_path, **arguments)
    assert whole.state.best_global_step == 5
    resumed, steps = make_trainer(tiny_resnet(), strategy, tmp_path, **arguments), Steps()
    resumed.add_callback(steps)
    monkeypatch.setattr(StageCache, "_fill", lambda *_: pytest.fail("recorded for no step"))
    resumed.train(resume_from_checkpoint=True)
    assert steps.taken == 0
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    _same_optimizers(resumed.optimizer, whole.optimizer)
    assert _losses(resumed) == _losses(whole)
    for name in ("global_step", "epoch", "best_global_step", "best_metric", "best_model_checkpoint"):
        assert getattr(resumed.state, name) == getattr(whole.state, name)


def test_a_finished_run_is_continued_with_more_steps(tmp_path):
    arguments = {**SAVING, "lr_scheduler_type": "constant"}
    train(tiny_resnet(), "full", tmp_path, max_steps=6, **arguments)
    longer = train(tiny_resnet(), "full", tmp_path, resume=True, max_steps=9, **arguments)
    whole = train(tiny_resnet(), "full", tmp_path / "whole", max_steps=9, **arguments)
    same_tensors(snapshot(longer.model), snapshot(whole.model))


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        train(tiny_resnet(), "full", tmp_path, resume=True)


def test_without_its_optimizer_a_run_is_not_resumed(tmp_path):
    train(tiny_resnet(), "full", tmp_path, **SAVING, max_steps=2, save_only_model=True)
    for resume in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(CheckpointError, match="checkpoint-2 was saved with save_only_model=True"):
            train(tiny_resnet(), "full", tmp_path, resume=resume, **SAVING)


@pytest.mark.slow
def test_another_strategy_is_refused(tmp_path):
    train(tiny_resnet(), L2SPConfig(alpha=0.5), tmp_path, **SAVING)
    for other in ("full", L2SPConfig(alpha=0.25)):
        with pytest.raises(OptionError, match="resume with the same strategy"):
            train(tiny_resnet(), other, tmp_path, resume=True, **SAVING)


@pytest.mark.slow
def test_another_start_is_refused_where_it_matters(tmp_path):
    train(tiny_resnet(), "l2_sp", tmp_path / "l2_sp", **SAVING)
    with pytest.raises(CheckpointError, match="same pretrained model"):
        train(tiny_resnet(seed=1), "l2_sp", tmp_path / "l2_sp", resume=True, **SAVING)
    train(tiny_resnet(), "full", tmp_path / "full", **SAVING)
    train(tiny_resnet(seed=1), "full", tmp_path / "full", resume=str(tmp_path / "full" / "checkpoint-4"), **SAVING)


@pytest.mark.slow
def test_an_earlier_run_is_not_overwritten(tmp_path):
    train(tiny_resnet(), "full", tmp_path, **SAVING)
    with pytest.raises(OptionError, match="contains checkpoint-8 from an earlier run.*overwrite=True"):
        train(tiny_resnet(), "full", tmp_path, **SAVING)
    assert len(checkpoints(tmp_path)) == 4
    args = tiny_arguments(tmp_path, **{**SAVING, "save_steps": 8})
    FTTrainer(tiny_resnet(), args, train_dataset=tiny_data(tiny_resnet()), overwrite=True).train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8"]


@pytest.mark.slow
def test_measured_once_and_terms_that_train_are_resumed(tmp_path, monkeypatch):
    whole = train(tiny_vit(), MeasuredConfig(), tmp_path, **SAVING)
    assert whole._run.plan.term_modules["centre"].centre.item() != whole._run.states["measured"].tensors["mean"]
    monkeypatch.setattr(MeasuredConfig, "measure", lambda *a: pytest.fail("measured again"))
    resumed = train(tiny_vit(), MeasuredConfig(), tmp_path / "again", resume=str(tmp_path / "checkpoint-4"), **SAVING)
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    assert torch.equal(resumed._run.plan.term_modules["centre"].centre, whole._run.plan.term_modules["centre"].centre)
    _same_optimizers(resumed.optimizer, whole.optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ft_state.safetensors", "ft_config.json", "model.safetensors"])
def test_damaged_files_are_named(name, tmp_path):
    train(tiny_resnet(), "l2_sp", tmp_path, **SAVING)
    chosen = tmp_path / "checkpoint-4"
    file = chosen / name
    file.write_bytes(file.read_bytes()[:30])
    trainer = make_trainer(tiny_resnet(), "l2_sp", tmp_path, **SAVING)
    with pytest.raises(ValueError, match=str(chosen)):
        trainer.train(resume_from_checkpoint=str(chosen))


@pytest.mark.slow
def test_resume_does_not_depend_on_where_the_folder_is(tmp_path):
    """A run copied to another machine continues; a missing best checkpoint is forgotten."""
    arguments = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    train(tiny_resnet(), "full", tmp_path / "here", **arguments)
    shutil.move(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "there" / "checkpoint-8")
    state = json.loads((tmp_path / "there" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].startswith(str(tmp_path / "here"))
    assert train(tiny_resnet(), "full", tmp_path / "there", resume=True, **arguments).state.global_step == 8


class Noisy(torch.utils.data.Dataset):
    """Rows that draw from the global random states whenever they are read, like augmentation."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {**row, "pixel_values": torch.as_tensor(row["pixel_values"]) + torch.randn(()) + random.random()}


# An epoch has 4 steps: checkpoint-2 is within it, when the batch of step 3 has been read.
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_goes_on_within_an_epoch(workers, tmp_path):
    def trained(folder, resume=None):
        args = tiny_arguments(folder, **SAVING, max_steps=6, dataloader_num_workers=workers)
        trainer = FTTrainer(tiny_resnet(), args, train_dataset=Noisy(tiny_data(tiny_resnet())))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    assert _losses(resumed) == _losses(whole)


# Two epochs of 4 steps: checkpoint-6 is within the second.
@pytest.mark.slow
def test_an_order_by_length_goes_on_within_an_epoch(tmp_path):
    def trained(folder, resume=None):
        by_length = {"train_sampling_strategy": "group_by_length"}
        args = tiny_arguments(folder, **SAVING, **by_length)
        trainer = FTTrainer(tiny_bert(), args, train_dataset=tiny_data(tiny_bert()))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-6"))
    same_tensors(snapshot(resumed.model), snapshot(whole.model))
    assert _losses(resumed) == _losses(whole)


class Planted:
    """Would leave a file if it were unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def _without_lambdas(state):
    return {name: value for name, value in state.items() if name != "lr_lambdas"}


def _with_group(**changes):
    def changed(state):
        state["param_groups"][0] |= changes
        return state

    return changed


# Complete files whose content belongs to no run: the checksums do not detect them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scheduler.pt", _without_lambdas),
        ("scheduler.pt", lambda state: True),
        ("optimizer.pt", lambda state: {}),
        ("optimizer.pt", _with_group(stage_rates=(1.0,))),
        ("optimizer.pt", _with_group(lr="x")),
        ("rng_state.pth", lambda state: []),
    ],
)
def test_files_of_no_run_are_named(name, change, tmp_path):
    train(tiny_resnet(), STRATEGY, tmp_path, **SAVING)
    file = tmp_path / "checkpoint-6" / name
    torch.save(change(torch.load(file, weights_only=False)), file)
    with pytest.raises(CheckpointError, match=rf"{name[:3]}.*checkpoint-6 cannot be loaded \(.*\)\. Restore"):
        train(tiny_resnet(), STRATEGY, tmp_path, resume=str(file.parent), **SAVING)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_no_code_in_a_checkpoint_is_executed(name, tmp_path):
    train(tiny_resnet(), STRATEGY, tmp_path, **SAVING)
    for checkpoint in checkpoints(tmp_path):
        torch.save(Planted(tmp_path / "executed"), checkpoint / name)
    with contextlib.suppress(CheckpointError):
        train(tiny_resnet(), STRATEGY, tmp_path, resume=True, **SAVING)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_what_a_killed_process_had_to_rotate_is_deleted(tmp_path):
    """The run was killed between the last checkpoint and the deletion of the oldest."""
    train(tiny_resnet(), "full", tmp_path, **SAVING)
    assert len(checkpoints(tmp_path)) == 4
    train(tiny_resnet(), "full", tmp_path, resume=True, save_total_limit=2, **SAVING)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8"]
