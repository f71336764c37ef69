"""The laws: each takes a config, a model factory and an empty folder, and asserts a property."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_ft.core.compose import build_plan
from hf_ft.core.config import FTConfig, as_saved
from hf_ft.core.context import State
from hf_ft.core.options import in_range, options
from hf_ft.core.plan import Plan, Term, stage_borders
from hf_ft.engine.run import Run
from hf_ft.engine.set_up import set_up
from hf_ft.errors import OptionError
from hf_ft.models.names import covers
from hf_ft.models.norms import batch_norms
from hf_ft.testing.conditions import conditions
from hf_ft.testing.models import tiny_bert, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.training import equipped, make_trainer, same_tensors, snapshot, still, tiny_batch, train

Maker = Callable[[], Any]
Law = Callable[[FTConfig, Maker, Path], None]


def config_round_trip(config: FTConfig, make: Maker, folder: Path) -> None:
    """A saved and reloaded config is equal but for local options; options of a newer version are ignored, not fatal."""
    config.save_pretrained(folder)
    assert FTConfig.from_pretrained(folder) == as_saved(config)
    assert type(config).from_pretrained(folder) == as_saved(config)
    assert FTConfig.from_dict({**config.to_dict(), "option_of_the_future": 1}) == config


def out_of_range_raises(config: FTConfig, make: Maker, folder: Path) -> None:
    """A value out of range or of a wrong type is rejected; the error names field, value and fix."""
    for field in options(type(config)):
        interval = field.metadata["range"]
        bad: list[Any] = [object()]
        if interval:
            low, high = (float(bound) for bound in interval[1:-1].split(","))
            bad += [x for x in (low - 1, high + 1, math.nan) if math.isnan(x) or not in_range(x, interval)]
            integer = isinstance(getattr(config, field.name), int)
            bad = [int(x) if integer and isinstance(x, float) and math.isfinite(x) else x for x in bad]
            bad = [x for x in bad if not (isinstance(x, float) and math.isinf(x))]
        for value in bad:
            try:
                dataclasses.replace(config, **{field.name: value})
            except OptionError as error:
                message = str(error)
                assert field.name in message and repr(value) in message, f"{message!r} names no field or value"
                assert interval is None or interval in message or "is not" in message, f"{message!r} names no fix"
            else:
                raise AssertionError(f"{field.name}={value!r} was accepted")


def plan_is_pure(config: FTConfig, make: Maker, folder: Path) -> None:
    """Planning twice gives the same plan and leaves the model unchanged."""
    model = equipped(make(), config)
    before, modes = snapshot(model), [module.training for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    state = _state(config, model, folder)
    first, second = config.plan(model, state), config.plan(model, state)
    try:
        same = bool(_comparable(first) == _comparable(second))
    except RuntimeError:  # tensors made by plan() have no truth value
        same = False
    assert same, "two plans of one config differ: a term's fn must be a function or a frozen dataclass of plain values"
    same_tensors(snapshot(model), before)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen


def weightless_terms_change_nothing(config: FTConfig, make: Maker, folder: Path) -> None:
    """With all weights 0, a plan trains bit for bit as it does without terms."""
    results = []
    for run, keep in zip(_two_runs(config, make, folder), (True, False), strict=True):
        zero = tuple(dataclasses.replace(term, weight=0.0, replaces_decay=()) for term in run.plan.terms)
        results.append(_train(run, zero if keep else ()))
    same_tensors(results[0], results[1])


def anchored_terms_start_at_zero(config: FTConfig, make: Maker, folder: Path) -> None:
    """Every term that pulls towards the start is exactly 0 there, with the model in eval mode."""
    run = _run(config, make(), folder)
    anchored = {term.name for term in run.plan.terms if term.starts_at_zero or term.anchors}
    for stage in run.plan.stages:
        objective = run.objective()
        objective.enter(stage)
        objective.train()
        for module in objective.modules():
            module.training = module is objective
        terms = objective(**tiny_batch(objective))["terms"]
        for name in anchored & set(terms):
            assert float(terms[name]) == 0.0, f"{name} is {float(terms[name])} at the start"


def frozen_stays_frozen(config: FTConfig, make: Maker, folder: Path) -> None:
    """Every parameter and buffer that a stage does not train is bit-identical after it."""
    trainer = make_trainer(make(), config, folder)
    run = trainer._start_run()
    for index, stage in enumerate(run.plan.stages):
        objective = run.objective()
        objective.enter(stage)
        objective.train()
        trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
        moving = [name for name, norm in batch_norms(run.model) if norm.training]
        before = snapshot(run.model)
        optimizer = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.1)
        for seed in range(2):
            objective(**tiny_batch(objective, 8, seed))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        after = snapshot(run.model)
        still = [n for n in before if n not in trained and not any(covers(norm, n) for norm in moving)]
        same_tensors({n: before[n] for n in still}, {n: after[n] for n in still})
        changed = [n for n in trained if not torch.equal(before[n], after[n])]
        assert changed, f"stage {index} ({stage.name}) trained nothing"
        run.thaw()


def accumulation_changes_nothing(config: FTConfig, make: Maker, folder: Path) -> None:
    """One batch of 8, two micro-batches of 4 or four of 2 give the same weights, from the same measured states.

    With 30 samples, the last update of an epoch has fewer, and its micro-batches have different sizes.
    """
    probe = equipped(make(), config)
    states = _states(config, probe, folder)
    plan = build_plan([config], probe, states)
    if plan.draws or any(term.couples_batch for term in plan.terms):
        return  # such a plan is tested without its noise, and such a term against its own micro-batch reference
    results = []
    for steps in (1, 2, 4):
        trainer = make_trainer(
            still(make()),
            config,
            folder / str(steps),
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0.0,  # clipping would hide a wrong scale
            max_steps=_fewest_steps(plan, 4),
        )
        # Variances within batches, for example, depend on the batch size.
        trainer._states = lambda: states  # type: ignore[method-assign]
        trainer.train_dataset = trainer.train_dataset.select(range(30))
        trainer.train()
        results.append(snapshot(trainer.model))
    same_tensors(results[0], results[1], 2e-6 * conditions().slack)
    same_tensors(results[0], results[2], 2e-6 * conditions().slack)


def resume_changes_nothing(config: FTConfig, make: Maker, folder: Path) -> None:
    """Stopping and resuming at any checkpoint, in any stage, gives the weights, optimizer and log of a single run."""
    whole = train(make(), config, folder, save_strategy="steps", save_steps=3, optim="adamw_torch")
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        resumed = make_trainer(make(), config, folder / "again", optim="adamw_torch")
        resumed.train(resume_from_checkpoint=str(folder / checkpoint))
        same_tensors(snapshot(resumed.model), snapshot(whole.model))
        _same_optimizers(resumed.optimizer, whole.optimizer)
        assert _losses(resumed) == _losses(whole), "the logs differ"


def plain_reload(config: FTConfig, make: Maker, folder: Path) -> None:
    """A saved model loads with plain Transformers and gives the same logits."""
    trainer = make_trainer(make(), config, folder)
    trainer.args.max_steps = _fewest_steps(trainer._start_run().plan, 2)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    device = trainer.args.device
    loaded = type(trainer.model).from_pretrained(folder / "saved").eval().to(device)
    inputs = {name: value.to(device) for name, value in tiny_inputs(trainer.model).items()}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)
    for name in ("ft_config.json", "ft_state.safetensors", "README.md"):
        assert (folder / "saved" / name).is_file(), f"{name} was not saved"


def term_order_is_irrelevant(config: FTConfig, make: Maker, folder: Path) -> None:
    """The terms of a plan can be summed in any order."""
    runs = zip(_two_runs(config, make, folder), (1, -1), strict=True)
    results = [_train(run, run.plan.terms[::step]) for run, step in runs]
    same_tensors(results[0], results[1], 1e-6 * conditions().slack)


def mixed_images_train(config: FTConfig, make: Maker, folder: Path) -> None:
    """It trains on mixed images, whose labels are shares of classes, or declares that it needs hard labels."""
    model = make()
    if not str(getattr(model, "main_input_name", "")).startswith("pixel_values"):
        return
    try:
        trainer = make_trainer(model, config, folder, mixup=1.0, frozen_cache="never")
    except OptionError as error:
        assert config.needs().hard_labels and config.ft_type in str(error), f"refused without need: {error}"
        return
    trainer.args.max_steps = _fewest_steps(trainer._start_run().plan, 2)
    trainer.train()
    losses = [value for entry in _losses(trainer) for name, value in entry.items() if name.startswith("loss")]
    assert losses and all(map(math.isfinite, losses)), f"losses are not finite: {losses}"


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        config_round_trip,
        out_of_range_raises,
        plan_is_pure,
        weightless_terms_change_nothing,
        anchored_terms_start_at_zero,
        frozen_stays_frozen,
        accumulation_changes_nothing,
        resume_changes_nothing,
        plain_reload,
        term_order_is_irrelevant,
        mixed_images_train,
    )
}


def check_strategy(config: FTConfig, makers: Iterable[Maker] = (tiny_resnet, tiny_vit, tiny_bert)) -> None:
    """Check a strategy against all laws, on a tiny random ResNet, ViT and BERT (see :func:`suited`).

    Models for which the strategy declares that it has no form are skipped.

    Raises:
        AssertionError: if a law is violated; the message names the law, the model and the violation.
    """
    for make in makers:
        if config.adapted(make()) is None:
            continue
        fitting = suited(config, make())
        for name, law in LAWS.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    law(fitting, make, Path(folder))
                except AssertionError as error:
                    raise AssertionError(f"{config.ft_type} breaks {name} on {make.__name__}: {error}") from error


def suited(config: FTConfig, model: nn.Module) -> FTConfig:
    """The config adapted to the model, if it declares an adapted form (:meth:`hf_ft.FTConfig.adapted`)."""
    return config.adapted(model) or config


def _state(config: FTConfig, model: nn.Module, folder: Path) -> State:
    return _states(config, model, folder).get(config.ft_type, State())


def _states(config: FTConfig, model: nn.Module, folder: Path) -> dict[str, State]:
    if not config.measures():
        return {}
    trainer = make_trainer(copy.deepcopy(model), config, folder / "measure")
    return dict(trainer._states())


def _run(config: FTConfig, model: nn.Module, folder: Path) -> Run:
    model = equipped(model, config).to(conditions().device)
    return set_up(model, config, states=_states(config, model, folder))


def _two_runs(config: FTConfig, make: Maker, folder: Path) -> tuple[Run, Run]:
    """Two runs of equal models from the same measured states."""
    first = _run(config, make(), folder)
    model = equipped(make(), config).to(conditions().device)
    return first, set_up(model, config, states=first.states)


def _train(run: Run, terms: tuple[Term, ...]) -> dict[str, torch.Tensor]:
    """Two SGD steps in each stage of a run with other terms, in a hand-written loop."""
    run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, terms=terms))
    objective = run.objective()
    for stage in run.plan.stages:
        objective.enter(stage)
        objective.train()
        optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.05)
        for seed in range(2):
            torch.manual_seed(seed)
            objective(**tiny_batch(objective, 8, seed))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    return snapshot(run.model)


def _fewest_steps(plan: Plan, least: int) -> int:
    """The smallest number of training steps that gives each stage at least one."""
    for steps in range(least, 8):
        with contextlib.suppress(OptionError):
            stage_borders(plan.stages, steps)
            return steps
    return 8


def _comparable(plan: Plan) -> Plan:
    """A plan without the modules of its terms, which are compared by identity."""
    terms = (dataclasses.replace(t, fn=type(t.fn)) if isinstance(t.fn, nn.Module) else t for t in plan.terms)  # type: ignore[arg-type]
    return dataclasses.replace(plan, terms=tuple(terms))


def _losses(trainer: Any) -> list[dict[str, float]]:
    kept = ("learning_rate", "grad_norm", "step", "stage")
    return [
        {key: value for key, value in entry.items() if key in kept or key.startswith("loss")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _same_optimizers(one: Any, other: Any) -> None:
    first, second = one.state_dict()["state"], other.state_dict()["state"]
    assert set(first) == set(second), "the optimizers hold state for different parameters"
    for key in first:
        for name, value in first[key].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[key][name])), f"optimizer {name}"
