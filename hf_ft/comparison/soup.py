"""The soup of a comparison: final runs, or also trials, averaged into one model, scored on the test sets once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_ft.comparison.contenders import Entrant
from hf_ft.comparison.folder import ORIGIN
from hf_ft.comparison.ledger import TUNING_SEED, Ledger
from hf_ft.comparison.outputs import scored
from hf_ft.comparison.results import Ingredient, SoupSummary, Training
from hf_ft.comparison.runner import Runner
from hf_ft.comparison.training import collected_warnings, temporary, trainer_for
from hf_ft.errors import CheckpointError
from hf_ft.models.norm_statistics import renew_statistics
from hf_ft.models.soup import Soup, mix
from hf_ft.records import read_json, restored, stored
from hf_ft.trainer.model_card import model_card
from hf_ft.trainer.selection import training_batches
from hf_ft.trainer.trainer import FTTrainer

Run = tuple[Entrant, Training, int | None]  # the index of a trial; None for a final run
SHOWN = ("num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "weight_decay")  # in the model card


def make_soup(runner: Runner) -> SoupSummary | None:
    """Average finished training runs, save the result in ``soup``, and score it; None if none is wanted or finished.

    The validation data decide what goes in, and the average is scored on the test sets once. A soup of the same runs
    that an earlier call or another worker has made is reused; a run whose model was not kept is trained again.
    """
    ledger, kept, kind = runner.ledger, runner.kept, runner.settings.soup
    runs = [run for entrant in ledger.entrants for run in _finished(ledger, entrant) if not run[1].error]
    if kind == "none" or not runs:
        return None
    wanted = {
        "kind": kind,
        "runs": [[entrant.file_name(run.params), run.seed, run.validation] for entrant, run, _ in runs],
    }
    with kept.locked():
        known = _known(kept.soup, wanted)
        if known is not None:
            return known
        folders = [runner.model_of(entrant, run) for entrant, run, _ in runs]
        work = kept.work("soup")
        with temporary(work), collected_warnings():
            summary = _mixed(runner, runs, folders, work)
            (work / "soup" / ORIGIN).write_text(json.dumps({"soup": wanted, "summary": stored(summary)}), "utf-8")
            kept.place(work / "soup", kept.soup)
    return summary


def _finished(ledger: Ledger, entrant: Entrant) -> list[Run]:
    """What may go into the soup of one contender: its final runs, and, if wanted, its trials."""
    final: list[Run] = [(entrant, run, None) for run in ledger.runs(entrant)]
    if not ledger.settings.keeps_trials:
        return final
    trials = [(number, ledger.trial(entrant, number)) for number in range(ledger.trials_of(entrant))]
    return final + [(entrant, done.training, number) for number, done in trials if done is not None]


def _known(folder: Path, wanted: Mapping[str, Any]) -> SoupSummary | None:
    """The summary of a soup that was made from the same runs."""
    try:
        origin = read_json(folder / ORIGIN)
        return restored(SoupSummary, origin["summary"], "a soup") if origin["soup"] == wanted else None
    except (CheckpointError, OSError, KeyError, TypeError):
        return None


def _mixed(runner: Runner, runs: Sequence[Run], folders: Sequence[Path], work: Path) -> SoupSummary:
    common, bench = runner.common, runner.ledger.entrants[0].bench
    trainer_of = _trainer_once(runner, work)

    def evaluate(model: nn.Module) -> float:
        metrics = trainer_of(model).predict(bench.data["validation"]).metrics or {}
        return float(metrics[f"test_{common.metric}"])

    def renew(model: nn.Module, names: Sequence[str]) -> None:
        trainer = trainer_of(model)
        with trainer.accelerator.autocast():
            renew_statistics(model, names, training_batches(trainer))

    scores = [float("nan") if run.validation is None else run.validation for _, run, _ in runs]
    made = mix(folders, runner.settings.soup, evaluate, renew, common.greater_is_better, scores)  # type: ignore[arg-type]
    found = scored(trainer_of(made.model), bench.data)
    summary = SoupSummary(
        kind=runner.settings.soup,
        validation=found.scores["validation"][common.metric],
        scores=found.scores,
        ingredients=tuple(_ingredient(made, index, *run) for index, run in enumerate(runs)),
    )
    _save(runner, made.model, summary, work / "soup")
    found.save_calibration(made.model, work / "soup")
    return summary


def _trainer_once(runner: Runner, work: Path) -> Callable[[nn.Module], FTTrainer]:
    """A trainer for the one model whose weights become averages; it only evaluates."""
    made: list[FTTrainer] = []

    def trainer_of(model: nn.Module) -> FTTrainer:
        if not made:
            entrant = runner.ledger.entrants[0]
            values = runner.ledger.settings_of(entrant)[0]
            made.append(trainer_for(entrant, values, TUNING_SEED, runner.common, work / "trainer", model, None))
        return made[0]

    return trainer_of


def _ingredient(made: Soup, index: int, entrant: Entrant, run: Training, trial: int | None) -> Ingredient:
    return Ingredient(
        contender=entrant.name,
        seed=run.seed,
        validation=run.validation,
        member=index in made.members,
        with_it=made.tried.get(index),
        reason=made.left_out.get(index, ""),
        trial=trial,
    )


def _save(runner: Runner, model: Any, summary: SoupSummary, folder: Path) -> None:
    bench = runner.ledger.entrants[0].bench
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    if bench.processor is not None:
        bench.processor.save_pretrained(folder)
    base: Any = bench.load(TUNING_SEED, False)
    card = model_card(
        (),
        model,
        model_name=folder.name,
        base_model=getattr(base.config, "_name_or_path", None) or None,
        metrics={f"eval_{runner.common.metric}": summary.validation},
        arguments={name: runner.common.arguments[name] for name in SHOWN if name in runner.common.arguments},
        data=bench.info,
        tags=["model-soup"],
    )
    heading = "## How it was fine-tuned\n"
    card.text = card.text.replace(heading, f"{heading}\n{described(summary)}\n", 1)
    card.save(folder / "README.md")


def described(summary: SoupSummary) -> str:
    """What the soup is made of, in a sentence or two."""
    members = [one for one in summary.ingredients if one.member]
    names = ", ".join(f"{one.contender} ({one.number})" for one in members)
    chosen = ", chosen one at a time by the validation score of their average" if summary.kind == "greedy" else ""
    models = "models" if len(members) > 1 else "model"
    return (
        f"The mean of the weights of {len(members)} fine-tuned {models}{chosen}: {names}. Model soups: Wortsman et "
        "al., ICML 2022, <https://arxiv.org/abs/2203.05482>."
    )
