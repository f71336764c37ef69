"""What searches have in common: short trainings of copies of a model, each scored as a trial of one study."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_ft.core.context import Context
from hf_ft.engine.checkpoint import digests
from hf_ft.engine.frozen.recorder import Recordings
from hf_ft.engine.objective import Objective
from hf_ft.engine.run import Run
from hf_ft.engine.short_training import Batches, fit, score
from hf_ft.errors import OptionError
from hf_ft.metrics import LOCAL_METRICS
from hf_ft.models.parts import Anatomy
from hf_ft.models.preserve import random_states_kept
from hf_ft.search.trials import Halving, Job, Outcome, Progress, Report, run_trials

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

LOOKED_AT = 64  # samples, spread over the data, that tell one data set from another


class SearchOptions(Protocol):
    """What every search asks of the config that it searches for: a budget, and what its trials are told by."""

    @property
    def metric(self) -> str: ...

    @property
    def validation(self) -> float: ...

    @property
    def search_epochs(self) -> int: ...

    @property
    def halving(self) -> bool: ...

    @property
    def storage(self) -> str | None: ...

    def to_dict(self) -> dict[str, Any]: ...

    def anatomy(self, model: nn.Module) -> Anatomy: ...


@dataclass
class ShortTrainings:
    """All from the same weights, with the same order of the data and the same budget.

    Args:
        model: never changed.
        context: samples and recipe.
        metric: of :data:`hf_ft.metrics.LOCAL_METRICS`, or ``"loss"``.
        validation: the share of the training samples that is scored on.
        epochs: of each training.

    Attributes:
        train_rows, validation_rows: the two parts, stratified by class where there are enough samples of each.
        recordings: what frozen parts compute, shared by all trainings.

    Raises:
        OptionError: an unknown metric, or too few samples for the split.
    """

    model: nn.Module
    context: Context
    metric: str
    validation: float
    epochs: int

    def __post_init__(self) -> None:
        if self.metric != "loss" and self.metric not in LOCAL_METRICS:
            raise OptionError(f"metric={self.metric!r} is unknown: choose loss, {', '.join(LOCAL_METRICS)}.")
        self.train_rows, self.validation_rows = self._split()
        context = self.context
        # A step is as large as in the run that follows, whatever number of processes shares that.
        self.recipe = dataclasses.replace(context.recipe, accumulation=context.recipe.accumulation * context.ranks)
        self.recordings = Recordings(self.model, context.samples, context.frozen_cache, context.recipe.computing)
        self._batches = Batches(context.samples, self.recordings)

    def train(self, run: Run, seed: int, report: Report | None = None) -> list[float]:
        """The score after each epoch; more is better, and one that diverged scores -inf.

        Args:
            run: of a copy of the model.
            seed: of the order of the data and of dropout.
            report: told each score; may stop the training.
        """
        scores: list[float] = []

        def after_epoch(epoch: int, objective: Objective) -> None:
            found = score(objective, self.recipe, self._batches, self.validation_rows, self.metric)
            scores.append(found if math.isfinite(found) else -math.inf)
            if report is not None:
                report(epoch, scores[-1])

        fit(run, self.recipe, self._batches, self.train_rows, self.epochs, seed, after_epoch)
        return scores

    def plan_recordings(self, runs: Iterable[Run]) -> None:
        """Tell which borders will be asked for, so that one pass over the samples records all."""
        for run in runs:
            prefix = self.recordings.prefix(run.objective())
            if prefix is not None:
                self.recordings.plan(prefix)

    def describe(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that the scores depend on: model, data, recipe, and these options."""
        hashes = json.dumps(sorted(digests(self.model).items()))
        samples, labels = self.context.samples, self.context.labels
        with random_states_kept(0):
            first = samples.read(list(range(0, samples.count, max(1, samples.count // LOOKED_AT)))[:LOOKED_AT])
        data = b"".join(_bytes(value) for _, value in sorted(first.items()) if isinstance(value, Tensor))
        data += labels.tobytes() if labels is not None else b""
        return {
            "model": hashlib.sha256(hashes.encode()).hexdigest(),
            "samples": samples.count,
            "data": hashlib.sha256(data).hexdigest(),
            "options": dict(options),
            "recipe": {
                **dict(self.context.described),
                "batch_size": self.recipe.batch_size,
                "accumulation": self.recipe.accumulation,
            },
        }

    def storage(self, wanted: str | None, usual: str) -> str | None:
        """Where trials are kept: as wanted, ``"memory"`` for nowhere, None for a file in the output folder."""
        if wanted is not None:
            return None if wanted == "memory" else wanted
        if self.context.folder is None:
            return None
        self.context.folder.mkdir(parents=True, exist_ok=True)
        return str(Path(self.context.folder) / usual)

    def _split(self) -> tuple[list[int], list[int]]:
        count = self.context.samples.count
        if not count:
            self.context.samples.read([])  # says why samples cannot be read by number
        size = round(count * self.validation)
        if not 1 <= size < count:
            raise OptionError(
                f"validation={self.validation:g} of {count} training samples leaves {count - size} to train "
                f"and {size} to score on: give more samples, or another share."
            )
        labels = self.context.labels
        counts = np.unique(labels, return_counts=True)[1] if labels is not None else np.array([0])
        fits = counts.min() > 1 and min(size, count - size) >= len(counts)
        rows = train_test_split(np.arange(count), test_size=size, random_state=0, stratify=labels if fits else None)
        return rows[0].tolist(), rows[1].tolist()


def score_jobs(
    jobs: Sequence[Job],
    train: Callable[[Job, Report], list[float]],
    prepare: Callable[[], None],
    *,
    name: str,
    signature: Mapping[str, Any],
    storage: str | BaseStorage | None,
    halving: bool,
    progress: Progress,
) -> dict[str, Outcome]:
    """Score each job by its best epoch, together with all processes that search on the same storage.

    Args:
        train: gives a score for each epoch.
        prepare: called before the first training that really runs: a search that is complete needs none.
        name: of the study; the beginning of the signature's hash is added.
        signature, storage, progress: as for :func:`hf_ft.search.trials.run_trials`.
        halving: whether to stop the worse jobs early.
    """
    prepared = False

    def evaluate(job: Job, report: Report) -> tuple[float, dict[str, Any]]:
        nonlocal prepared
        if not prepared:
            prepared = True
            prepare()
        scores = train(job, report)
        return max(scores), {"epochs": len(scores)}

    digest = hashlib.sha256(json.dumps(signature, sort_keys=True, default=str).encode()).hexdigest()
    pruner = Halving() if halving else None
    return run_trials(
        jobs,
        evaluate,
        storage=storage,
        name=f"{name}-{digest[:12]}",
        signature=signature,
        pruner=pruner,
        progress=progress,
    )


def epochs_of(outcome: Outcome) -> int:
    """How many epochs a job was trained; of one that was stopped early no more is known than its steps."""
    return len(outcome.steps) or int(outcome.info.get("epochs", 0))


class Bar:
    """A progress bar that shows the best score so far.

    Args:
        total: jobs, over all calls of :func:`score_jobs` that share the bar.
        what: is done, as its title.
        metric: what the scores are.
        hidden: show nothing.
        best: how the key of the best job follows its score.
    """

    def __init__(self, total: int, what: str, metric: str, hidden: bool, best: str = ": {}") -> None:
        self.bar = tqdm(total=total, desc=what, disable=hidden, leave=False)
        self.metric, self.suffix, self.best, self.before = metric, best, -math.inf, 0

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int, outcome: Outcome | None) -> None:
        self.bar.n = self.before + done
        if outcome is not None and not outcome.pruned and outcome.value > self.best:
            self.best = outcome.value
            self.bar.set_postfix_str(f"best {self.metric} {self.best:.3f}{self.suffix.format(outcome.key)}")
        self.bar.refresh()

    def move_to(self, done: int) -> None:
        """So much is done, whatever was trained for it; the jobs of further calls come on top."""
        self.before = self.bar.n = done
        self.bar.refresh()

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
