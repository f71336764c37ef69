"""Collects the results of a comparison from its finished training runs."""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from hf_ft.comparison.contenders import Entrant
from hf_ft.comparison.ledger import Done, Ledger
from hf_ft.comparison.results import Contender, Results, Status, Training
from hf_ft.comparison.runner import Runner
from hf_ft.comparison.training import versions
from hf_ft.documents.public import shareable, shareable_text

TOLD = 1.2  # warn when the budget is exceeded by this factor


def collect(runner: Runner, **about: Any) -> Results:
    """Collect the results of a comparison.

    Args:
        runner: the runner after it ran to the end, or as far as the time limit allowed.
        about: the fields of :class:`Results` unknown to the runner: title, command, model, data, labels, advice.
    """
    ledger, common = runner.ledger, runner.common
    winner = ledger.winner()
    return Results(
        metric=common.metric,
        greater_is_better=common.greater_is_better,
        settings=shareable({**runner.settings.described(), **common.arguments}),
        versions={"python": platform.python_version(), **versions()},
        machine=machine(),
        seconds=sum(done.seconds for done in ledger.done.values()),
        contenders=tuple(contender(ledger, entrant) for entrant in ledger.entrants),
        winner="" if winner is None else winner[0].name,
        winner_seed=None if winner is None else winner[1].seed,
        **about,
    )


def contender(ledger: Ledger, entrant: Entrant) -> Contender:
    """The results of a contender so far."""
    trials = [ledger.trial(entrant, number) for number in range(ledger.trials_of(entrant))]
    there = [trial.training for trial in trials if trial is not None]
    runs, first = ledger.runs(entrant), ledger.first(entrant)
    chosen = ledger.chosen(entrant) if trials else None
    status, reason = _status(first, trials, runs, ledger.settings.seeds)
    return Contender(
        name=entrant.name,
        configs=tuple(config.shareable() for config in entrant.configs),
        status=status,
        reason=shareable_text(reason),
        notes=shareable((*entrant.notes, *_over(_used(ledger, entrant, len(there))))),
        space=entrant.described_space(),
        measure_seconds=0.0 if first is None else first.measured_compute,
        used=_used(ledger, entrant, len(there)),
        trials=tuple(map(_shareable, there)),
        chosen=chosen,
        on_edge=() if chosen is None else entrant.edges(there[chosen].params, [trial.params for trial in there]),
        runs=tuple(map(_shareable, runs)),
        rejected=tuple(map(_shareable, ledger.rejected(entrant))),
        found={} if first is None else first.found,
        learned="" if first is None else first.learned,
    )


def _shareable(training: Training) -> Training:
    """A training run whose messages contain no local paths: results are meant to be shared."""
    return dataclasses.replace(training, error=shareable_text(training.error), warnings=shareable(training.warnings))


def _used(ledger: Ledger, entrant: Entrant, trials: int) -> float:
    """The share of the tuning budget that was used."""
    return ledger.used(entrant, trials) / ledger.allowed if ledger.allowed else 0.0


def _over(used: float) -> list[str]:
    """Warn if the budget was exceeded: at least one trial always runs, and a search can only be shortened so far."""
    return [f"tuning took {used:.1f} times the budget"] if used > TOLD else []


def _status(
    first: Done | None, trials: Sequence[Done | None], runs: Sequence[Training], seeds: int
) -> tuple[Status, str]:
    if first is None:
        return "not reached", "out of time before its first training run"
    if first.refused:
        return "cannot run", first.training.error
    if trials and all(trial is not None and trial.training.error for trial in trials):
        return "failed", f"all trials failed; the first: {first.training.error}"
    if len(runs) < seeds:
        return "unfinished", f"out of time after {sum(map(bool, trials))} trials and {len(runs)} final runs"
    failed = [run for run in runs if run.error]
    if len(failed) == len(runs):
        return "failed", f"all final runs failed; the first: {failed[0].error}"
    return "finished", f"{len(failed)} of {len(runs)} final runs failed: {failed[0].error}" if failed else ""


def machine() -> dict[str, Any]:
    """The hardware and platform of the training runs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "system": sys.platform,
    }
