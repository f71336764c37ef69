"""F: a fresh mask in each step, after clipping. D: a fixed mask, by a float64 reference of the Fisher information."""

import copy

import numpy as np
import pytest
import torch

from hf_ft import ChildTuningConfig, FTTrainer, L2SPConfig, OptionError, State, set_up
from hf_ft.engine.gradients import update_batches
from hf_ft.strategies.child_tuning import clip_each, coins, exact, fisher_masks, packed, unpacked
from hf_ft.testing import LAWS, still, tiny_bert, tiny_data, tiny_resnet
from hf_ft.testing.training import make_trainer, tiny_arguments

STEPS, RATE, P, CLIP = 4, 0.05, 0.3, 0.5
PLAIN = {"max_steps": STEPS, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": RATE}


class Watched(FTTrainer):
    """Keeps the weights before each step, and the step's gradients before clipping."""

    def training_step(self, model, *args, **kwargs):
        self.before = [*getattr(self, "before", ()), weights_of(self.model)]
        loss = super().training_step(model, *args, **kwargs)
        gradients = {name: p.grad.double().clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.gradients = [*getattr(self, "gradients", ()), gradients]
        return loss


def weights_of(model):
    return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


def watched(model, config, folder, **arguments):
    args = tiny_arguments(folder, **{**PLAIN, "max_grad_norm": CLIP, **arguments})
    trainer = Watched(model, args, strategy=config, train_dataset=tiny_data(model))
    trainer.train()
    trainer.before.append(weights_of(model))
    return trainer


def test_f_keeps_each_entry_with_probability_p_after_clipping(tmp_path):
    trainer = watched(tiny_bert(), ChildTuningConfig(mode="F", p=P), tmp_path)
    masks = []
    for step in range(STEPS):
        gradients = trainer.gradients[step]
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert norm > CLIP
        kept = []
        for name, gradient in gradients.items():
            wanted = -RATE * gradient * CLIP / norm / P
            moved = trainer.before[step + 1][name] - trainer.before[step][name]
            clear = wanted.abs() > 1e-5
            ratio = (moved / wanted)[clear]
            mask = ratio > 0.5
            torch.testing.assert_close(ratio, mask.double(), atol=2e-2, rtol=0)
            kept.append(mask)
        masks.append(torch.cat(kept))
        assert abs(float(masks[-1].double().mean()) - P) < 4 * (P * (1 - P) / len(masks[-1])) ** 0.5
    assert len({mask.numpy().tobytes() for mask in masks}) == STEPS


def fisher_of(model, batches, clip):
    """The Fisher information of the blocks, one parameter at a time."""
    fisher = {name: 0.0 for name, _ in model.named_parameters() if ".layer." in name}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name in fisher:
            gradient = dict(model.named_parameters())[name].grad
            fisher[name] += (gradient * min(1.0, clip / (float(gradient.norm()) + 1e-6))) ** 2 / len(batches)
    return {name: values.detach().numpy() for name, values in fisher.items()}


def test_d_trains_the_weights_of_the_blocks_with_most_information(tmp_path):
    model = still(tiny_bert())
    config = ChildTuningConfig(mode="D", p=P)
    args = tiny_arguments(tmp_path, **PLAIN, max_grad_norm=0.02)
    context = FTTrainer(model, args, strategy=config, train_dataset=tiny_data(model)).context()
    rows = update_batches(context.samples, context.recipe, 1, torch.Generator().manual_seed(args.seed))
    batches = [context.samples.read(some) for some in rows]
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    fisher = fisher_of(copy.deepcopy(model).double(), batches, clip=0.02)
    ranked = np.sort(np.concatenate([values.reshape(-1) for values in fisher.values()]))
    place = (1 - P) * (len(ranked) - 1)
    low, high = ranked[int(place)], ranked[int(place) + 1]
    before = weights_of(model)
    trainer = watched(model, config, tmp_path, max_grad_norm=0.02)
    masks = trainer.states["child_tuning"].tensors
    assert set(masks) == set(fisher)
    kept = 0
    for name, values in fisher.items():
        mask = unpacked(masks[name], torch.Size(values.shape)).numpy()
        kept += mask.sum()
        assert mask[values > high * (1 + 1e-4)].all() and not mask[values < low * (1 - 1e-4)].any()
        moved = (weights_of(model)[name] != before[name]).numpy()
        assert not moved[~mask].any() and (not mask.any() or moved[mask].mean() > 0.8)
    assert abs(kept / len(ranked) - P) < 2e-3
    outside = [name for name in before if ".layer." not in name and "position" not in name and "type" not in name]
    assert outside and all(not torch.equal(weights_of(model)[name], before[name]) for name in outside)
    assert "Weights that train" in config.learned(trainer.states["child_tuning"])


def test_ties_stay_and_bits_are_kept():
    masks = fisher_masks({"a": torch.tensor([[0.0, 3.0], [1.0, 1.0]]), "b": torch.tensor([2.0])}, 0.6)
    assert masks["a"].tolist() == [[False, True], [True, True]] and masks["b"].tolist() == [True]
    mask = torch.rand(3, 7) < 0.5
    assert packed(mask).shape == (3,) and torch.equal(unpacked(packed(mask), mask.shape), mask)
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.3])]
    clip_each(gradients, 1.0)
    torch.testing.assert_close(gradients, [torch.tensor([0.6, 0.8]), torch.tensor([0.3])])


@pytest.mark.parametrize("p", [0.2, 0.75, 1e-6])
def test_coins_are_fair_and_independent(p):
    found = coins(1_000_003, p, torch.Generator().manual_seed(0))
    assert found.shape == (1_000_003,) and abs(exact(p) - p) <= 2**-16
    for lane in range(4):  # of the four coins from one number
        assert abs(float(found[lane::4].double().mean()) - exact(p)) < 4 * (p / 250_000) ** 0.5 + 1e-5
    pairs = found[:-1] & found[1:]
    assert abs(float(pairs.double().mean()) - exact(p) ** 2) < 2e-3


def test_measuring_leaves_the_model_as_it_was(tmp_path):
    model = tiny_resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model.eval(), ChildTuningConfig(), tmp_path)
    random = torch.get_rng_state()
    trainer._states()
    assert torch.equal(torch.get_rng_state(), random) and not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("law", ["accumulation_changes_nothing", "resume_changes_nothing"])
def test_f_keeps_the_laws(law, tmp_path):
    LAWS[law](ChildTuningConfig(mode="F"), tiny_bert, tmp_path)


def test_it_composes_and_p_of_1_changes_nothing(tmp_path):
    assert not ChildTuningConfig(p=1.0).plan(tiny_bert(), State()).gradients
    make_trainer(tiny_bert(), [ChildTuningConfig(mode="F"), L2SPConfig()], tmp_path, max_steps=2).train()


def test_what_cannot_work_is_refused():
    with pytest.raises(OptionError, match=r"pass optimizer=\.\.\. to stepper"):
        run = set_up(tiny_bert(), ChildTuningConfig(mode="F"))
        run.stepper(run.objective(), 4)
    with pytest.raises(OptionError, match="no Fisher information was measured"):
        ChildTuningConfig().plan(tiny_bert(), State())
