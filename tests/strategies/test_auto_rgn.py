"""Each tensor's rate follows its relative gradient norm, measured in each epoch, against a float64 reference."""

import copy
import dataclasses

import pytest
import torch

from hf_ft import AutoRGNConfig, DAFTConfig, FTTrainer, GradualUnfreezingConfig, L2SPConfig, OptionError, State, set_up
from hf_ft.core import Plan, TensorRates, compose
from hf_ft.core.context import Recipe, Samples
from hf_ft.data.streams import mixed
from hf_ft.engine.param_groups import FACTOR
from hf_ft.engine.short_training import Batches, fit
from hf_ft.engine.tensor_rates import batches
from hf_ft.models.norms import batch_norms
from hf_ft.testing import TINY_MODELS, same_tensors, still, tiny_bert, tiny_data, tiny_resnet
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments

RATE, BATCH = 0.02, 8  # 32 samples: 4 steps per epoch
PLAIN = {"max_steps": 8, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": RATE, "max_grad_norm": 0.0}

RECIPE = Recipe(torch.optim.SGD, lambda _: lambda _: 1.0, RATE, batch_size=BATCH)


class Watched(FTTrainer):
    """Keeps the weights before each step, its gradients, and the factors of the rates."""

    def training_step(self, model, *args, **kwargs):
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = [group for group in self.optimizer.param_groups if FACTOR in group]
        self.factors = [*getattr(self, "factors", ()), {names[id(g["params"][0])]: g[FACTOR] for g in groups}]
        self.before = [*getattr(self, "before", ()), snapshot(self.model)]
        loss = super().training_step(model, *args, **kwargs)
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.gradients = [*getattr(self, "gradients", ()), gradients]
        return loss


def watched(model, config, folder, **arguments):
    args = tiny_arguments(folder, **{**PLAIN, **arguments})
    trainer = Watched(model, args, strategy=config, train_dataset=tiny_data(model))
    trainer.train()
    trainer.before.append(snapshot(model))
    return trainer


def relative_norms(model, weights, data, seed, epoch):
    """Relative norms, computed one tensor and one batch at a time."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    model.double().train()
    found = {}
    for rows in batches(Samples(len(data), data), RECIPE, 5, 1, mixed(seed, epoch)):
        batch = {key: torch.stack([data[row][key] for row in rows]) for key in data.column_names}
        model.zero_grad()
        model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}).loss.backward()
        for name, parameter in model.named_parameters():
            norm = float(parameter.detach().norm())
            found.setdefault(name, []).append(float(parameter.grad.norm()) / norm if norm else 0.0)
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_rates_follow_relative_norms_in_each_epoch(name, tmp_path):
    model = still(TINY_MODELS[name]())
    trainer = watched(model, AutoRGNConfig(), tmp_path)
    data, norms = tiny_data(model), [norm for norm, _ in batch_norms(model)]
    for epoch in (0, 1):
        found = relative_norms(model, trainer.before[4 * epoch], data, trainer.args.seed, epoch)
        body = {n for n in found if not n.startswith("classifier") and n.rpartition(".")[0] not in norms}
        largest = max(found[n] for n in body)
        for step in range(4 * epoch, 4 * epoch + 4):
            for key, gradient in trainer.gradients[step].items():
                factor = found[key] / largest if key in body else float(key.startswith("classifier"))
                assert trainer.factors[step].get(key, 1.0) == pytest.approx(factor, rel=1e-3, abs=1e-6), key
                wanted = trainer.before[step][key] - RATE * trainer.factors[step].get(key, 1.0) * gradient
                torch.testing.assert_close(trainer.before[step + 1][key], wanted, atol=1e-7, rtol=1e-5)
    assert trainer.factors[0] != trainer.factors[4] == trainer.factors[7]


class SameRates(AutoRGNConfig):
    """All factors are 1, so that only the reading of the batches is left."""

    def plan(self, model, state):
        ones = TensorRates("ones", _ones, lambda names, norms: torch.ones_like(norms))
        return Plan(tensor_rates=ones)


def _ones(names, parameters, gradients):
    return torch.ones(len(names))


def test_frozen_modules_stay_in_eval_mode_after_the_measurement(tmp_path):
    model = tiny_resnet().train()
    trainer = watched(model, [AutoRGNConfig(), GradualUnfreezingConfig(stages=2)], tmp_path)
    for step in range(4):  # only the head trains
        moved = [n for n, v in trainer.before[step + 1].items() if not torch.equal(v, trainer.before[step][n])]
        assert moved and all(name.startswith("classifier") for name in moved)


def test_a_dataset_without_an_index_is_refused(tmp_path):
    trainer = make_trainer(tiny_bert(), AutoRGNConfig(), tmp_path)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(OptionError, match="must be map-style"):
        trainer.train()


@pytest.mark.parametrize("make", [tiny_resnet, tiny_bert])
def test_looking_changes_neither_data_nor_random_states_nor_statistics(make, tmp_path):
    looked, plain = make(), make()
    make_trainer(looked, SameRates(), tmp_path / "looked", optim="adamw_torch").train()
    make_trainer(plain, "full", tmp_path / "plain", optim="adamw_torch").train()
    same_tensors(snapshot(looked), snapshot(plain))


def test_each_epoch_starts_without_moments(tmp_path):
    for fresh, steps in ((True, 4), (False, 8)):
        trainer = watched(still(tiny_bert()), AutoRGNConfig(fresh_optimizer=fresh), tmp_path, optim="adamw_torch")
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {steps}


def test_in_a_custom_loop(tmp_path):
    model, data = still(tiny_bert()), tiny_data(tiny_bert())
    run = set_up(model, AutoRGNConfig(fresh_optimizer=False))
    objective, optimizer = run.objective(), torch.optim.SGD(run.param_groups(lr=RATE))
    with pytest.raises(OptionError, match=r"pass optimizer=\.\.\."):
        run.stepper(objective, 4)
    at = run.stepper(objective, 4, optimizer=optimizer)
    at(0)
    recipe = make_trainer(tiny_bert(), "full", tmp_path, **PLAIN).context().recipe
    at.begin_epoch(0, Samples(32, lambda rows: data[list(rows)]), recipe)
    factors = [group[FACTOR] for group in optimizer.param_groups if FACTOR in group]
    assert max(factors) == 1.0 and len(set(factors)) > 5
    objective(**data[:8])["loss"].backward()
    optimizer.step()
    assert {group["lr"] for group in optimizer.param_groups} == {RATE}


def test_short_runs_measure_the_rates_too(tmp_path):
    model = still(tiny_bert())
    context = make_trainer(model, "full", tmp_path, **PLAIN).context()
    made, seen = [], []
    optimizer = lambda groups: made.append(torch.optim.SGD(groups, lr=RATE)) or made[0]  # noqa: E731
    recipe = dataclasses.replace(context.recipe, optimizer=optimizer)

    def look(epoch, objective):
        seen.append({group["rate_factor"] for group in made[0].param_groups if FACTOR in group})

    fit(set_up(model, AutoRGNConfig()), recipe, Batches(context.samples), range(16), 2, 0, look)
    assert max(seen[0]) == 1.0 and len(seen[0]) > 5 and seen[0] != seen[1]


def test_it_composes_with_stages_and_terms_but_not_with_itself(tmp_path):
    strategy = [DAFTConfig(convert_batch_norm=False, head_lr=0.1), AutoRGNConfig(), L2SPConfig()]
    trainer = make_trainer(tiny_resnet(), strategy, tmp_path, **PLAIN)
    trainer.train()
    factors = [group[FACTOR] for group in trainer.optimizer.param_groups if FACTOR in group]
    assert max(factors) == 1.0 and min(factors) == 0.0
    with pytest.raises(OptionError, match="both set the learning rate of each tensor"):
        compose([AutoRGNConfig().plan(tiny_bert(), State()) for _ in range(2)])
    assert AutoRGNConfig(head_lr=0.1).plan(tiny_resnet(), State()).rates[0].lr == 0.1
