"""It finds the strategy that suits a planted task, within its budget, and trains it as if it had been requested."""

import copy
import dataclasses
import math
import signal
from types import SimpleNamespace

import pytest
import torch

from hf_ft import AutoStrategyConfig, FTConfig, FTTrainer, LinearProbeConfig, LPFTConfig, OptionError
from hf_ft.core import State
from hf_ft.engine.checkpoint import read_states
from hf_ft.engine.work import Work
from hf_ft.search.trials import Outcome
from hf_ft.strategies.auto import choose
from hf_ft.strategies.auto.candidate import Candidate, HeldOut, better_half, compared, held_out
from hf_ft.strategies.auto.findings import reasons
from hf_ft.strategies.auto.result import Choice, Tried, winner
from hf_ft.testing import same_tensors, tiny_data, tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments
from hf_ft.trainer.model_card import card_of
from tests.forked import python
from tests.strategies.blockwise.known_block import Images, accuracy, break_block, knowing_model

FEW = {"choose_from": ("lp_ft", "linear_probe"), "storage": "memory"}
LONG = {"max_steps": 24}  # six epochs of the 32 samples
UNSET = {"learning_rate": 5e-5}


def trainer_of(model, folder, config=None, samples=32, **arguments):
    config = config or AutoStrategyConfig(**FEW, budget="4x")
    args = tiny_arguments(folder, **{**LONG, **UNSET, "optim": "adamw_torch", **arguments})
    return FTTrainer(model, args, strategy=config, train_dataset=tiny_data(model, samples), frozen_cache="always")


def chosen(trainer):
    return trainer.configs[0].choice(trainer.measure()["auto"])


# --- what it finds ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing():
    model = knowing_model()
    assert accuracy(model) > 0.9
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("broken", "best"), [(None, "linear_probe"), (2, "full")])
def test_the_strategy_that_suits_the_task_is_found(knowing, broken, best, tmp_path):
    """With perfect features, the head is enough; with a broken early block, everything after it sees a constant."""
    model = copy.deepcopy(knowing)
    if broken is not None:
        break_block(model, broken)
    torch.nn.init.normal_(model.classifier.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    rate = {} if broken is None else {"learning_rate": 1e-2}
    args = tiny_arguments(
        tmp_path, **{**UNSET, **rate}, max_steps=100, per_device_train_batch_size=16, optim="adamw_torch"
    )
    config = AutoStrategyConfig(budget="3x", choose_from=("linear_probe",), share=0.5, storage="memory")
    trainer = FTTrainer(model, args, strategy=config, train_dataset=Images(160))
    found = chosen(trainer)
    assert found.chosen == found.ranking[0].strategy == best
    assert found.ranking[1].mean(1) > found.ranking[0].mean(1) + 0.1
    trainer.train()
    assert accuracy(trainer.model) > 0.8


@pytest.mark.slow
def test_the_choice_is_the_same_again_and_leaves_the_model_alone(tmp_path):
    model = tiny_resnet().train()
    model.resnet.embedder.requires_grad_(False)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    first = trainer_of(model, tmp_path / "a")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = chosen(first)
    assert torch.equal(torch.rand(2), expected)
    second = trainer_of(tiny_resnet().train(), tmp_path / "b")
    second.model.resnet.embedder.requires_grad_(False)
    assert chosen(second) == one and len(one.tried) == 3 and len(one.ranking[0].losses) > 1
    run = first._start_run()
    same_tensors(snapshot(run.model), before)
    assert [p.requires_grad for p in model.parameters()] == flags and model.training
    assert Choice.from_dict(one.to_dict()) == one


@pytest.mark.slow
def test_the_run_is_that_of_the_chosen_strategy(tmp_path):
    trainer = trainer_of(tiny_vit(), tmp_path / "auto", save_strategy="steps", save_steps=20)
    config, inner = trainer.configs[0].chosen(trainer.measure()["auto"])
    found = chosen(trainer)
    trainer.train()
    rate = {} if found.rate is None else {"learning_rate": found.rate}
    alone = make_trainer(tiny_vit(), config, tmp_path / "alone", "always", **LONG, optim="adamw_torch", **UNSET | rate)
    alone.train()
    same_tensors(snapshot(trainer.model), snapshot(alone.model))
    # What a checkpoint contains is enough to continue.
    state = read_states(tmp_path / "auto" / "checkpoint-20")["auto"]
    assert trainer.configs[0].chosen(state)[0] == config and set(inner.tensors) == set(state.tensors)
    resumed = trainer_of(tiny_vit(), tmp_path / "auto", save_strategy="steps", save_steps=20)
    resumed.train(resume_from_checkpoint=True)
    same_tensors(snapshot(resumed.model), snapshot(trainer.model))
    card = str(card_of(trainer, None, tmp_path))
    assert f"`{found.chosen}`" in card and "| strategy | held-out log loss |" in card
    # The command prints why, and what was not tried, in a row for each reason.
    shown = trainer.configs[0].findings(trainer.states["auto"])
    *_, said, left_out = shown.short[:3]
    assert said.text == shown.summary and len(left_out.rows) == len(set(found.declined.values()))


def tried(name, expected, losses, error=0.0):
    return Tried(name, None, expected, losses, (), 1.0, error)


def test_the_most_promising_strategy_is_overruled_by_more_than_a_standard_error():
    first, second = tried("a", 0.02, (0.5, 0.6)), tried("b", 0.0, (0.4, 0.5), 0.09)
    assert winner((second, first)).strategy == "b"
    assert winner((first, dataclasses.replace(second, error=0.11))).strategy == "a"
    assert winner((first, second, tried("c", 0.0, (0.3, 0.3), 0.1))).strategy == "c"
    # One that was dropped does not win.
    assert winner((tried("a", 0.02, (0.1,)), second)).strategy == "b"
    lost = tried("a", 0.02, (math.inf, math.inf))
    assert winner((lost, dataclasses.replace(second, error=0.0))).strategy == "b"
    choice = Choice("a", None, (first, tried("b", 0.0, (0.4, 0.5), 0.11)), {}, 3, 2.0, 1.0, 1.0)
    assert "expect most of it" in reasons(choice) and "0.550 on two folds, is above the lowest, `b` 0.450" in reasons(
        choice
    )
    assert "of the difference, 0.110" in reasons(choice)


def candidate(name, expected, judged):
    recipe = SimpleNamespace(name=name, rate=None, expected=expected)
    return Candidate(recipe, 1.0, [], [Outcome(name, -judged.loss, False, (), 0.0, vars(judged))])


@pytest.mark.parametrize(("apart", "kept"), [(0.6, "abcd"), (0.0, "bcd")])
def test_halving_keeps_what_would_win(apart, kept):
    """The most promising of six is fourth, but within a standard error of the best if its losses are far apart."""
    losses = {"a": 0.6, "b": 0.5, "c": 0.4, "d": 0.3, "e": 0.7, "f": 0.65}
    found = [
        candidate(name, 0.1 * (name == "a"), HeldOut(loss, None, (loss - width, loss + width)))
        for name, loss, width in zip(losses, losses.values(), (apart, 0, 0, 0, 0, 0), strict=True)
    ]
    assert "".join(one.recipe.name for one in better_half(found)) == kept
    assert [one.recipe.name for one in better_half(found[1:3])] == ["b", "c"]


def test_differences_are_paired_by_sample():
    """Against a reference in float64: the standard error of the mean of paired differences."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40,), generator=random)
    task = SimpleNamespace(compute_loss_func=None, class_weights=None)
    right = torch.nn.functional.one_hot(labels, 3)
    logits = [torch.randn(40, 3, generator=random) + right for _ in range(2)]
    judged = [held_out(one, labels, 0.0, task) for one in logits]
    sure = [held_out(7 * one, labels, 0.0, task) for one in logits]
    for one, other in zip(judged, sure, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=2e-4)
    assert [sum(one.losses) / 40 for one in judged] == pytest.approx([one.loss for one in judged], abs=1e-4)
    candidates = [candidate(*one) for one in zip(("a", "b"), (0.1, 0.0), judged, strict=True)]
    gaps = torch.tensor(judged[1].losses).double() - torch.tensor(judged[0].losses).double()
    first, second = compared(candidates)
    assert first.error == 0.0 and second.error == pytest.approx(float(gaps.std()) / 40**0.5)
    regression = held_out(torch.randn(40, 1), torch.randn(40), 0.3, task)
    assert (regression.loss, regression.accuracy, regression.losses) == (0.3, None, ())


# --- the budget -------------------------------------------------------------------------------------------


@pytest.mark.newest
def test_a_larger_budget_tries_more_and_is_kept(tmp_path):
    tried = []
    for budget in (1, "2x", "4x"):
        model = tiny_resnet()
        config = AutoStrategyConfig(budget=budget, storage="memory", choose_from=("daft", "lp_ft", "l2_sp", "bss"))
        trainer = trainer_of(model, tmp_path / str(budget), config, samples=64, max_steps=40)
        with Work() as work:
            found = chosen(trainer)
        assert found.searching + found.finishing <= config.trainings() + 1e-9 or not found.tried
        full = trainer_of(tiny_resnet(), tmp_path / "full", "full", samples=64, max_steps=4)
        with Work() as whole:
            full.train()
        # A few samples per attempt, to find and check what can be recorded, are not counted.
        assert work.total <= (found.searching + 0.2) * 10 * whole.total
        tried.append(sum(len(one.losses) for one in found.tried))
        assert {"full", *config.choose_from} == {one.strategy for one in found.tried} | set(found.declined)
        # Two or more folds judge each of them, unless there was only room for two candidates.
        assert len(found.tried) <= 2 or min(len(one.losses) for one in found.tried) >= 2
    assert tried[0] == 0 < tried[1] < tried[2]
    assert "leaves no room to compare" in reasons(dataclasses.replace(found, tried=()))


def test_what_can_be_counted_need_not_fit_by_its_declared_cost(tmp_path):
    """BitFit declares nearly the cost of full fine-tuning, but trains few weights."""
    config = AutoStrategyConfig(budget=1.6, storage="memory", choose_from=("bitfit",))
    found = chosen(trainer_of(tiny_vit(), tmp_path, config, samples=64, max_steps=40))
    assert [one.strategy for one in found.tried] == ["full", "bitfit"] and found.tried[1].cost < 0.7
    assert found.searching + found.finishing <= 1.6


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "tried"), [(2.6, 3), (3.4, 5)])
def test_counting_others_leaves_room_for_both_folds(budget, tried, tmp_path):
    others = ("daft", "lp_ft", "linear_probe", "peft", "bitfit", "norms_only", "l2_sp", "bss")
    config = AutoStrategyConfig(budget=budget, storage="memory", choose_from=others)
    found = chosen(trainer_of(tiny_resnet(), tmp_path, config, samples=64, max_steps=40))
    assert [len(one.losses) for one in found.tried] == tried * [2]


def test_short_trials_see_neither_the_fold_nor_other_data(tmp_path, monkeypatch):
    trainer = trainer_of(tiny_resnet(), tmp_path, AutoStrategyConfig(**FEW, budget="4x"), max_steps=40)
    seen, fit, predict = [], choose.fit, choose.predict

    def spy(run, recipe, batches, rows, epochs, seed, after_epoch):
        seen.append([set(rows)])
        fit(run, recipe, batches, rows, epochs, seed, after_epoch)

    def held(objective, recipe, batches, rows):
        seen[-1].append(set(rows))
        return predict(objective, recipe, batches, rows)

    monkeypatch.setattr(choose, "fit", spy)
    monkeypatch.setattr(choose, "predict", held)
    found = chosen(trainer)
    assert len(seen) == sum(len(one.losses) for one in found.tried) > 3
    for train, rest in seen:
        assert not train & rest and train | rest == set(range(32))
    of_folds = {tuple(sorted(rest)) for _, rest in seen}
    assert len(of_folds) == len(found.ranking[0].losses)
    assert sum(map(len, of_folds)) == len(set().union(*of_folds)), "no sample is held out twice"


# --- the learning rate ------------------------------------------------------------------------------------


def base_rates(trainer):
    trainer.train()
    return {rate for group in trainer.optimizer.param_groups for rate in group["stage_rates"] if rate}


@pytest.mark.parametrize(("optim", "rate"), [("adamw_torch", 3e-4), ("sgd", 3e-3)])
def test_the_chosen_strategy_trains_at_its_own_rate(optim, rate, tmp_path):
    config = AutoStrategyConfig(budget=1, storage="memory", choose_from=("l2_sp",))  # at the same rate as full
    assert base_rates(trainer_of(tiny_resnet(), tmp_path, config, optim=optim, max_steps=2)) == {rate}


def test_a_rate_that_was_set_wins(tmp_path):
    config = AutoStrategyConfig(**FEW, budget="3x")
    trainer = trainer_of(tiny_resnet(), tmp_path, config, learning_rate=2e-3)
    found = chosen(trainer)
    assert found.rate is None and all(one.rate is None for one in found.tried)
    assert trainer._start_run().plan.learning_rate is None
    # A user's own optimizer has rates that were set, too.
    model = tiny_resnet()
    own = torch.optim.SGD(model.parameters(), lr=0.02)
    args = tiny_arguments(tmp_path / "own", **UNSET, max_steps=2)
    trainer = FTTrainer(
        model,
        args,
        strategy=AutoStrategyConfig(budget=1, storage="memory", choose_from=("l2_sp",)),
        train_dataset=tiny_data(model),
        optimizers=(own, None),
    )
    assert base_rates(trainer) == {0.02}


# --- averaging --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("validated", "choose_from"), [(True, "full"), (False, "full"), (True, "linear_probe")])
def test_weights_are_averaged_if_that_scores_higher(validated, choose_from, tmp_path):
    model = tiny_resnet()
    config = AutoStrategyConfig(budget=1 if choose_from == "full" else "3x", choose_from=(choose_from,))
    args = tiny_arguments(tmp_path, **UNSET, max_steps=6, metric_for_best_model="loss", save_strategy="no")
    more = {"eval_dataset": tiny_data(model, 16, seed=1)} if validated else {}
    trainer = FTTrainer(model, args, strategy=config, train_dataset=tiny_data(model), **more)
    trainer.train()
    state = trainer.states["auto"]
    if config.chosen(state)[0].ft_type == "linear_probe":
        assert not trainer._run.plan.select, "the head alone trained, which is not averaged"
        return
    record = state.info["choice"]
    if not validated:
        assert record["value"] == 1.0 and not record["metric"]
        return
    scores = dict(record["scores"])
    assert list(scores) == [1.0, 0.8, 0.6] and record["value"] == min(scores, key=scores.get)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scores[record["value"]])
    assert "by eval_loss on validation data" in config.learned(state)


# --- interruptions ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted choice."""
    config = AutoStrategyConfig(budget="3x", choose_from=FEW["choose_from"])
    return chosen(trainer_of(tiny_resnet(), tmp_path_factory.mktemp("whole"), config))


@pytest.mark.slow
def test_an_interrupted_choice_continues(tmp_path, monkeypatch, whole):
    config = AutoStrategyConfig(budget="3x", choose_from=FEW["choose_from"])
    calls, fit = [], choose.fit

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        fit(*args, **kwargs)

    monkeypatch.setattr(choose, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        chosen(trainer_of(tiny_resnet(), tmp_path / "run", config))
    assert (tmp_path / "run" / "auto.db").is_file()
    assert chosen(trainer_of(tiny_resnet(), tmp_path / "run", config)) == whole
    assert len(calls) == 1 + sum(len(one.losses) for one in whole.tried), "two were finished, one was lost"


KILLED = """
import os, signal, sys
from hf_ft.search.trials import Outcome
from hf_ft.strategies.auto import choose
from hf_ft.strategies.auto.candidate import Candidate, HeldOut, better_half, compared, held_out
from tests.strategies.auto.test_auto import FEW, AutoStrategyConfig, chosen, tiny_resnet, trainer_of
fit, calls = choose.fit, []
def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    fit(*args, **kwargs)
choose.fit = dying
chosen(trainer_of(tiny_resnet(), sys.argv[1], AutoStrategyConfig(budget="3x", choose_from=FEW["choose_from"])))
"""


@pytest.mark.slow
def test_a_killed_choice_continues(tmp_path, monkeypatch, whole):
    assert python("-c", KILLED, tmp_path / "run").returncode == -signal.SIGKILL
    config = AutoStrategyConfig(budget="3x", choose_from=FEW["choose_from"])
    calls, fit = [], choose.fit
    monkeypatch.setattr(choose, "fit", lambda *args, **kwargs: (calls.append(1), fit(*args, **kwargs)))
    found = chosen(trainer_of(tiny_resnet(), tmp_path / "run", config))
    assert len(calls) == sum(len(one.losses) for one in found.tried) - 1
    assert found == whole


# --- bad input, and what it can do without ------------------------------------------------------------------


def test_refusals(tmp_path):
    model = tiny_resnet()
    with pytest.raises(OptionError, match="auto chooses the strategy itself, so it cannot be composed with l2_sp"):
        trainer_of(model, tmp_path, ["l2_sp", "auto"])
    with pytest.raises(OptionError, match="unknown strategy 'lpft'"):
        trainer_of(model, tmp_path, AutoStrategyConfig(choose_from=("lpft",)))
    with pytest.raises(OptionError, match="too few for 4 folds"):
        trainer_of(model, tmp_path, AutoStrategyConfig(), samples=3).measure()
    for bad in ("x", "0.5x", -1, math.inf):
        with pytest.raises(OptionError, match=r"budget=.*\[1, inf\)"):
            AutoStrategyConfig(budget=bad)
    assert AutoStrategyConfig(budget=" 2.5X").trainings() == AutoStrategyConfig(budget=2.5).trainings() == 2.5
    with pytest.raises(OptionError, match="has not chosen a strategy yet"):
        AutoStrategyConfig().plan(model, State())


@pytest.mark.parametrize("content", [{"config": {"ft_type": "auto"}, "state": {}}, {"config": 3}, {"state": {}}])
def test_a_damaged_state_is_refused(content):
    with pytest.raises(OptionError, match="hold no strategy that auto can choose"):
        AutoStrategyConfig().check_state(tiny_resnet(), State({}, content))


def test_a_state_opens_no_storage():
    """A file from elsewhere does not choose a location on this machine."""
    config = {**AutoStrategyConfig().to_dict(), "ft_type": "blockwise", "storage": "elsewhere.db"}
    content = {"config": {k: v for k, v in config.items() if k in ("ft_type", "storage")}, "state": {}}
    found, _ = AutoStrategyConfig().chosen(State({}, content))
    assert found == FTConfig.from_dict({"ft_type": "blockwise"})


def test_what_has_too_few_steps_is_not_tried(tmp_path):
    """A single step cannot be divided between a probe and training everything."""
    config = AutoStrategyConfig(**FEW, budget="3x")
    trainer = trainer_of(tiny_resnet(), tmp_path, config, per_device_train_batch_size=32, max_steps=3)
    found = chosen(trainer)
    assert "gets no step" in found.declined["lp_ft"] and "lp_ft" not in {one.strategy for one in found.tried}


def test_regression_is_judged_by_its_loss(tmp_path):
    model = tiny_resnet(num_labels=1)
    model.config.problem_type = "regression"
    data = tiny_data(model, 32).with_format(None)
    values = torch.randn(32, generator=torch.Generator().manual_seed(0)).tolist()
    data = data.remove_columns("labels").add_column("labels", values).with_format("torch")
    args = tiny_arguments(tmp_path, **UNSET, **LONG)
    trainer = FTTrainer(model, args, strategy=AutoStrategyConfig(**FEW, budget="3x"), train_dataset=data)
    found = chosen(trainer)
    assert found.tried and not any(one.accuracies for one in found.tried) and not found.signals


def test_shared_options_are_passed_on():
    found = AutoStrategyConfig(norm_mode="eval", batch_norm_momentum=0.2)
    from hf_ft.strategies.auto.recipes import recipes

    listed, declined = recipes(found, tiny_resnet(), "adamw_torch", True, {"lp_ft": 0.1, "daft": 0.2, "bss": -1.0}, ())
    assert all(one.config.norm_mode == "eval" and one.config.batch_norm_momentum == 0.2 for one in listed)
    by_name = {one.name: one for one in listed}
    # The most promising comes first, then those that are cheap to try, then the others, each by expected gain.
    assert [one.name for one in listed[:3]] == ["daft", "lp_ft", "linear_probe"] and listed[-1].name == "bss"
    assert "full" in by_name and "auto" not in by_name
    assert (
        by_name["linear_probe"].rate is None and by_name["lp_ft"].rate == LPFTConfig.recommended["learning_rate"].value
    )
    assert declined["ema"] == declined["wise_ft"] == "it averages what another strategy trains: compose the two"
    assert "spot_tune" in declined
    assert declined["amcf"] == "it trains several models" and "co_tuning" in declined
    assert type(by_name["linear_probe"].config) is LinearProbeConfig
