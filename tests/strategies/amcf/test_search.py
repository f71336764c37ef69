"""The search over frozen layers: each position is trained once, nothing frozen is computed twice; resuming, sharing."""

import dataclasses
import json

import optuna
import pytest
import torch

from hf_ft import AMCFConfig, CollaborativeModel, FrozenCache, OptionError, SwarmScores, SwarmSearch
from hf_ft.search import evaluate as short_trainings
from hf_ft.strategies.amcf.swarm import begin, step
from hf_ft.testing import still, tiny_collaborative, tiny_resnet
from hf_ft.testing.training import make_trainer, same_tensors, snapshot

SMALL = AMCFConfig(particles=3, iterations=2, search_epochs=1, metric="loss", storage="memory")


def pair():
    """The members of most searches here: few layers, so that the tested code takes most of the time."""
    return CollaborativeModel.from_members([tiny_resnet(), tiny_resnet(depths=[1, 1], seed=1)])


def searching(folder, model=None, cache="always", **options):
    config = dataclasses.replace(SMALL, **options)
    model = pair() if model is None else model
    trainer = make_trainer(
        model, config, folder, frozen_cache=cache, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0
    )
    return SwarmSearch(model, config, trainer.context(), progress=False)


@pytest.fixture
def fitted(monkeypatch):
    """The positions that were actually trained, as sets of trained parameters; may raise at the nth."""
    calls, fit = [], short_trainings.fit

    def spy(run, *args, **kwargs):
        calls.append(frozenset(run.trained))
        if len(calls) == spy.stop:
            raise KeyboardInterrupt
        fit(run, *args, **kwargs)

    spy.stop = None
    monkeypatch.setattr(short_trainings, "fit", spy)
    return calls, spy


@pytest.mark.slow
def test_the_swarm_moves_by_the_scores(tmp_path, fitted):
    search = searching(tmp_path, tiny_collaborative())
    scores = search.run()
    assert scores.layers == (7, 22) and len(scores.generations) == 3 and not scores.stopped
    swarm = begin(scores.layers, 3, 0)
    for generation in scores.generations:
        assert generation.integers() == swarm.integers()
        told = [scores.evaluation(position).score for position in swarm.integers()]
        assert list(generation.scores) == told
        if generation is not scores.generations[-1]:
            swarm = step(swarm, told, scores.layers, 2, 0)
    # Equal integer positions are trained once.
    positions = [evaluation.position for evaluation in scores.evaluations]
    assert len(positions) == len(set(positions)) == len(fitted[0]) <= scores.visits == 9
    assert scores.best.score == max(evaluation.score for evaluation in scores.evaluations)


@pytest.mark.slow
def test_each_score_is_that_of_its_position_trained_alone(tmp_path):
    search = searching(tmp_path, search_epochs=2)
    for evaluation in search.run().evaluations[:4]:
        steps = search.trainings.train(search._start(evaluation.position), 0)
        assert evaluation.score == pytest.approx(max(steps), abs=1e-6)
        assert evaluation.steps == pytest.approx(steps, abs=1e-6) and evaluation.epochs == 2


@pytest.mark.slow
def test_the_searchs_schedule_is_that_of_the_run_or_constant(tmp_path, monkeypatch):
    """Constant is the authors' choice; studies from before the option existed are still recognised."""
    fit, rates = short_trainings.fit, {}
    for schedule in ("run", "constant"):
        search = searching(tmp_path / schedule, tiny_collaborative(), search_schedule=schedule, search_epochs=2)
        factors = rates.setdefault(schedule, [])

        def spy(run, recipe, *rest, factors=factors):
            factors.append([recipe.curve(10)(step) for step in range(10)])
            fit(run, recipe, *rest)

        monkeypatch.setattr(short_trainings, "fit", spy)
        search.trainings.train(search._start((5, 14)), 0)
        assert ("search_schedule" in json.dumps(search._signature)) == (schedule == "constant")
    assert set(rates["constant"][0]) == {1.0} and rates["run"][0] != rates["constant"][0]


@pytest.mark.slow
def test_recorded_and_computed_give_the_same_scores(tmp_path):
    found = [searching(tmp_path, cache=use, iterations=1).run() for use in ("always", "never")]
    assert [e.position for e in found[0].evaluations] == [e.position for e in found[1].evaluations]
    for one, other in zip(found[0].evaluations, found[1].evaluations, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.slow
def test_nothing_frozen_is_computed_during_training(tmp_path, monkeypatch):
    """While a position trains, none of its frozen layers runs, in either member."""
    search = searching(tmp_path, tiny_collaborative())
    position = (5, 14)
    fit, ran = short_trainings.fit, set()

    def spy(run, recipe, batches, *rest):
        search.trainings.recordings.store(search.trainings.recordings.prefix(entered(run)))  # recorded before
        hooks = [
            module.register_forward_hook(lambda m, i, o, name=name: ran.add(name) if m.forward.__name__ else None)
            for name, module in run.model.named_modules()
            if name.endswith("convolution") and "forward" not in module.__dict__
        ]
        fit(run, recipe, batches, *rest)
        for hook in hooks:
            hook.remove()

    def entered(run):
        objective = run.objective()
        objective.enter(run.plan.stages[0])
        return objective

    monkeypatch.setattr(short_trainings, "fit", spy)
    run = search._start(position)
    trained = {name.removesuffix(".weight") for name in run.trained if name.endswith("convolution.weight")}
    search.trainings.train(run, 0)
    assert ran == trained


@pytest.mark.slow
def test_one_pass_records_a_generation(tmp_path):
    search = searching(tmp_path)
    scores = search.run()
    assert 1 <= search.trainings.recordings.passes <= len(scores.generations)


@pytest.mark.slow
def test_the_model_is_left_alone(tmp_path):
    model = tiny_collaborative().train()
    model.members[0].resnet.embedder.requires_grad_(False)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    momenta = [m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    search = searching(tmp_path, model, iterations=1)
    assert search.layers == (6, 22), "what is frozen before is no layer"
    search.run()
    same_tensors(snapshot(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags and model.training
    assert [m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)] == momenta


@pytest.mark.slow
def test_an_interrupted_search_continues(tmp_path, fitted):
    calls, spy = fitted
    whole = searching(tmp_path).run()
    storage, trained = str(tmp_path / "swarm.db"), len(calls)
    calls.clear()
    spy.stop = trained - 2  # most likely in the last generation
    with pytest.raises(KeyboardInterrupt):
        searching(tmp_path, storage=storage).run()
    spy.stop = None
    resumed = searching(tmp_path, storage=storage).run()
    assert len(calls) == trained + 1, "only the one that was interrupted runs twice"
    assert [(e.position, e.score) for e in resumed.evaluations] == [(e.position, e.score) for e in whole.evaluations]
    assert searching(tmp_path, storage=storage).run() == resumed and len(calls) == trained + 1
    # A longer search reuses what was trained; other options make another study.
    searching(tmp_path, storage=storage, particles=4).run()
    assert trained + 1 < len(calls) < trained + 1 + 12
    assert len(optuna.get_all_study_names(f"sqlite:///{storage}")) == 1
    searching(tmp_path, storage=storage, consistency=0.0, iterations=1).run()
    assert len(optuna.get_all_study_names(f"sqlite:///{storage}")) == 2


@pytest.mark.slow
def test_a_budget_and_patience_end_it(tmp_path, fitted):
    calls, _ = fitted
    short = searching(tmp_path, search_budget=4).run()
    assert len(short.evaluations) == len(calls) == 4 and "budget of 4" in short.stopped
    assert short.best.position in [e.position for e in short.evaluations]
    assert all(score > float("-inf") for g in short.generations for score in g.scores), "whole generations alone"
    whole = searching(tmp_path, iterations=2, patience=2).run()
    assert len(whole.generations) < 3 or not whole.stopped, "what has run to its end was not ended early"
    patient = searching(tmp_path, iterations=4, patience=1).run()
    bests = [max(generation.scores) for generation in patient.generations]
    if patient.stopped:
        assert "has not improved for 1 iterations" in patient.stopped and max(bests[:-1]) >= bests[-1]
    assert all(b > max(bests[:i]) for i, b in enumerate(bests) if 0 < i < len(bests) - 1), "it went on while it grew"


@pytest.mark.slow
def test_the_storage_changes_nothing(tmp_path):
    options = {"halving": True, "particles": 6, "iterations": 1, "search_epochs": 2}
    found = [searching(tmp_path, storage=storage, **options).run() for storage in ("memory", str(tmp_path / "x.db"))]
    assert [(e.position, e.pruned, e.steps) for e in found[0].evaluations] == [
        (e.position, e.pruned, e.steps) for e in found[1].evaluations
    ]


@pytest.mark.slow
def test_steps_are_as_large_as_in_the_run(tmp_path, monkeypatch):
    """Accumulated batches also make one step of the search, and are part of the study's identity."""
    steps, found = [], {}
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs))
    for accumulation in (1, 2):
        trainer = make_trainer(
            still(tiny_collaborative()), SMALL, tmp_path, optim="sgd", max_grad_norm=0.0,
            per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        search = SwarmSearch(trainer.model, SMALL, trainer.context(), progress=False)
        steps.clear()
        found[accumulation] = search.trainings.train(search._start((2, 10)), 0), len(steps), search._signature
    assert found[1][0] == pytest.approx(found[2][0], abs=1e-5) and found[1][1] == found[2][1] == 3
    assert found[1][2] != found[2][2]


@pytest.mark.slow
def test_the_study_depends_on_optimizer_and_data(tmp_path):
    signatures = []
    for arguments, rows in (({}, 32), ({"optim_args": "momentum=0.5"}, 32), ({}, 31)):
        trainer = make_trainer(tiny_collaborative(), SMALL, tmp_path, optim="sgd", **arguments)
        if rows < 32:  # another last image, with the same label
            changed = trainer.train_dataset.with_format(None).to_dict()
            changed["pixel_values"][rows] = changed["pixel_values"][0]
            trainer.train_dataset = type(trainer.train_dataset).from_dict(changed).with_format("torch")
        signatures.append(SwarmSearch(trainer.model, SMALL, trainer.context(), progress=False)._signature)
    assert signatures[0] != signatures[1] and signatures[0]["data"] == signatures[1]["data"] != signatures[2]["data"]


@pytest.mark.slow
def test_halving_stops_the_worse(tmp_path):
    scores = searching(tmp_path, halving=True, particles=6, search_epochs=4).run()
    pruned = [evaluation for evaluation in scores.evaluations if evaluation.pruned]
    assert any(evaluation.epochs < 4 for evaluation in pruned) and not scores.best.pruned
    for generation in scores.generations:
        for position, told in zip(generation.integers(), generation.scores, strict=True):
            assert told == scores.evaluation(position).score


@pytest.mark.slow
def test_positions_that_diverge_do_not_stop_the_swarm(tmp_path, monkeypatch):
    score = short_trainings.score
    calls = []

    def diverging(*args):
        calls.append(1)
        return float("nan") if len(calls) % 3 else score(*args)

    monkeypatch.setattr(short_trainings, "score", diverging)
    scores = searching(tmp_path).run()
    assert len(scores.generations) == 3 and scores.best.score > float("-inf")


@pytest.mark.slow
def test_a_trainer_searches_keeps_and_resumes(tmp_path, fitted):
    config = dataclasses.replace(SMALL, storage=None)
    saving = {"save_strategy": "steps", "save_steps": 4, "optim": "sgd"}
    trainer = make_trainer(pair(), config, tmp_path, **saving)
    trainer.train()
    assert (tmp_path / "swarm_search.db").is_file()
    state = trainer.states["amcf"]
    scores = config.scores(state)
    assert tuple(state.info["frozen"]) == scores.best.position
    assert SwarmScores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
    card = (tmp_path / "checkpoint-8" / "README.md").read_text()
    assert "PeerJ" in card and scores.verdict() in card
    calls = len(fitted[0])
    resumed = make_trainer(pair(), config, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    same_tensors(snapshot(resumed.model), snapshot(trainer.model))
    assert len(fitted[0]) == calls and resumed.states["amcf"].info == state.info
    # A new run on the same storage finds all trials.
    make_trainer(pair(), config, tmp_path, optim="sgd").train()
    assert len(fitted[0]) == calls


@pytest.mark.slow
def test_one_model_is_a_swarm_of_one_coordinate(tmp_path):
    scores = searching(tmp_path, tiny_resnet(), iterations=1).run()
    assert scores.layers == (7,) and scores.members == ("ResNetForImageClassification",)
    assert {len(evaluation.position) for evaluation in scores.evaluations} == {1}


@pytest.mark.slow
def test_changing_samples_are_computed_in_every_step(tmp_path):
    search = searching(tmp_path, cache=FrozenCache("never"), iterations=1)
    assert not search.trainings.recordings.usable
    assert search.run().best.score > float("-inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "/no/such/folder/x.db"}, "no/such/folder"),
        ({"validation": 0.001}, "validation=0.001 of 32"),
    ],
)
def test_bad_input(options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        searching(tmp_path, **options).run()
