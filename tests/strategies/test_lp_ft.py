"""LP-FT against a loop of two stages written by hand in float64."""

import copy
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hf_ft.engine.run
from hf_ft import LPFTConfig, set_up
from hf_ft.engine.objective import Objective
from hf_ft.testing import same_tensors, tiny_data, tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer, snapshot
from tests.strategies.test_linear_probe import STEPS, WHOLE

BODY, HEAD = 0.05, 0.3


def reference(model, stages, momentum=0.0, fresh=True):
    """SGD on all samples at once; a stage is (steps, rate of the body or None, of the head, BatchNorm trains)."""
    model = copy.deepcopy(model).double()
    data, velocity = tiny_data(model)[:], {}
    for steps, body, head, moves in stages:
        velocity = {} if fresh else velocity
        for _ in range(steps):
            model.train()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train(moves)
            loss = nn.functional.cross_entropy(model(data["pixel_values"].double()).logits, data["labels"])
            parameters = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                    rate = head if name.startswith("classifier") else body
                    if rate is not None:
                        velocity[name] = momentum * velocity.get(name, 0.0) + gradient
                        parameter -= rate * velocity[name]
    return snapshot(model)


@pytest.mark.parametrize(
    ("config", "stages"),
    [
        (LPFTConfig(head_lr=HEAD), [(STEPS // 2, None, HEAD, False), (STEPS // 2, BODY, BODY, False)]),
        (LPFTConfig(head_lr=HEAD, probe=1 / 3, norm_mode="auto"), [(2, None, HEAD, False), (4, BODY, BODY, True)]),
    ],
)
def test_stages_against_a_handwritten_loop(config, stages, tmp_path):
    as_by_hand(config, stages, tmp_path)


TWO_STAGES = [(STEPS // 2, None, HEAD, False), (STEPS // 2, BODY, BODY, False)]


@pytest.mark.parametrize("fresh", [True, False])
def test_momentum_of_the_head_at_the_border(fresh, tmp_path):
    """The authors start the second stage with a new optimizer; a run resumed there, or later, does the same."""
    config, saving = LPFTConfig(head_lr=HEAD, fresh_optimizer=fresh), {"save_strategy": "steps", "save_steps": 1}
    as_by_hand(config, TWO_STAGES, tmp_path, momentum=0.9, fresh=fresh, **saving)
    whole = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    arguments = {**WHOLE, "learning_rate": BODY, "optim_args": "momentum=0.9", **saving}
    for step in (STEPS // 2 - 1, STEPS // 2, STEPS // 2 + 1):
        trainer = make_trainer(tiny_resnet(), config, tmp_path, **arguments)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        same_tensors(snapshot(trainer.model), whole)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_silent_in_both_stages(checkpointing, tmp_path):
    """As in the authors' evaluation mode; modules with gradient checkpointing stay in train mode, which it needs."""
    model = tiny_vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    arguments = {**WHOLE, "max_steps": 4, "gradient_checkpointing": checkpointing}
    losses = {}
    for dropout in (True, False):
        trainer = make_trainer(copy.deepcopy(model), LPFTConfig(dropout=dropout), tmp_path, "never", **arguments)
        objective, seen = Objective.forward, []

        def forward(self, forward=objective, seen=seen, **batch):
            modules = [m for m in self.model.modules() if not getattr(m, "gradient_checkpointing", False)]
            seen.append((any(m.training for m in modules), any(m.training for m in self.model.modules())))
            return forward(self, **batch)

        with mock.patch.object(Objective, "forward", forward):
            trainer.train()
        losses[dropout] = trainer.state.log_history[0]["loss"]
        if not dropout:
            assert seen[-1] == (False, checkpointing) and len(seen) == 4
    with torch.no_grad():
        data = tiny_data(model)[:]
        expected = float(model(**data).loss)
    assert losses[False] == pytest.approx(expected, abs=1e-4)


def test_a_custom_loop_must_pass_its_optimizer(monkeypatch):
    messages = []
    monkeypatch.setattr(hf_ft.engine.run.logger, "warning_once", messages.append)
    run = set_up(tiny_resnet(), LPFTConfig())
    objective = run.objective()
    optimizer = torch.optim.SGD(run.param_groups(lr=0.1), momentum=0.9)
    step = run.stepper(objective, 4, optimizer=optimizer)
    assert not messages
    run.stepper(objective, 4)
    assert "lp_ft: a stage requires a fresh optimizer: pass optimizer=..." in messages[0]
    for parameter in run.model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    step(0), step(1)
    assert optimizer.state
    step(2)
    assert not optimizer.state


def as_by_hand(config, stages, folder, momentum=0.0, fresh=True, **arguments):
    model = tiny_resnet()
    expected = reference(model, stages, momentum, fresh)
    more = {"optim_args": f"momentum={momentum}", **arguments}
    trainer = make_trainer(model, config, folder, **{**WHOLE, "learning_rate": BODY, **more})
    trainer.train()
    found = snapshot(trainer.model)
    counts = {name for name in found if name.endswith("num_batches_tracked")}
    assert all(torch.equal(found.pop(name), expected.pop(name)) for name in counts)
    same_tensors(found, expected, 2e-5)
