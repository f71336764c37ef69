"""The common core of searches: short training runs of model copies, each scored as a trial of one study."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_ft.core.context import Context
from hf_ft.data.rows import spread_rows
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
from hf_ft.splits import hold_out

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

LOOKED_AT = 64  # samples, spread over the data, that identify a data set


class SearchOptions(Protocol):
    """Options that every search reads from its config: the budget, and everything that identifies its trials."""

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

    def identity(self) -> dict[str, Any]: ...

    def anatomy(self, model: nn.Module) -> Anatomy: ...


@dataclass
class ShortTrainings:
    """Short training runs from the same weights, with the same data order and the same budget.

    Args:
        model: the model; never changed.
        context: samples and training recipe.
        metric: one of :data:`hf_ft.metrics.LOCAL_METRICS`, or ``"loss"``.
        validation: share of the training samples held out for scoring.
        epochs: number of epochs of each run.

    Attributes:
        recordings: recorded outputs of frozen prefixes, shared by all runs.

    Raises:
        OptionError: for an unknown metric, or too few samples to split.
    """

    model: nn.Module
    context: Context
    metric: str
    validation: float
    epochs: int

    def __post_init__(self) -> None:
        if self.metric != "loss" and self.metric not in LOCAL_METRICS:
            raise OptionError(f"metric={self.metric!r} is unknown: choose loss, {', '.join(LOCAL_METRICS)}.")
        self.rows(0)  # raises if there are too few
        context = self.context
        # The same number of samples per step as in the run that follows, however many processes share it.
        self.recipe = dataclasses.replace(context.recipe, accumulation=context.recipe.accumulation * context.ranks)
        self.recordings = Recordings(self.model, context.samples, context.frozen_cache, context.recipe.computing)
        self.batches = Batches(context.samples, self.recordings)

    def train(self, run: Run, seed: int, report: Report | None = None) -> list[float]:
        """Train and return the score after each epoch; higher is better, and divergence scores -inf.

        Args:
            run: a run over a copy of the model.
            seed: seed of the data order, of dropout, and of the samples that are held out.
            report: called with each score; may stop the run.
        """
        scores: list[float] = []
        train_rows, held_out = self.rows(seed)

        def after_epoch(epoch: int, objective: Objective) -> None:
            value = score(objective, self.recipe, self.batches, held_out, self.metric)
            scores.append(value if math.isfinite(value) else -math.inf)
            if report is not None:
                report(epoch, scores[-1])

        fit(run, self.recipe, self.batches, train_rows, self.epochs, seed, after_epoch)
        return scores

    def plan_recordings(self, runs: Iterable[Run]) -> None:
        """Announce all frozen prefixes in advance, so that a single pass over the samples records them."""
        for run in runs:
            prefix = self.recordings.prefix(run.objective())
            if prefix is not None:
                self.recordings.plan(prefix)

    def describe(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that the scores depend on: model, data, recipe and these options."""
        hashes = json.dumps(sorted(digests(self.model).items()))
        samples, labels, groups = self.context.samples, self.context.labels, self.context.groups
        with random_states_kept(0):
            first = samples.read(spread_rows(samples.count, LOOKED_AT))
        data = b"".join(_bytes(value) for _, value in sorted(first.items()) if isinstance(value, Tensor))
        data += b"".join(known.tobytes() for known in (labels, groups) if known is not None)
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
        """Where to keep trials: ``wanted``, except None (a file in the output folder) and ``"memory"`` (nowhere)."""
        if wanted is not None:
            return None if wanted == "memory" else wanted
        if self.context.folder is None:
            return None
        self.context.folder.mkdir(parents=True, exist_ok=True)
        return str(Path(self.context.folder) / usual)

    def rows(self, seed: int) -> tuple[list[int], list[int]]:
        """Indices of the samples to train on, and of those to score on: a different draw for each seed.

        Stratified by class if each class has enough samples, and in whole groups if the context has any.
        """
        count = self.context.samples.count
        if not count:
            self.context.samples.read([])  # explains why samples cannot be read by index
        size = round(count * self.validation)
        if not 1 <= size < count:
            raise OptionError(
                f"validation={self.validation:g} of {count} training samples leaves {count - size} to train on and "
                f"{size} to score on: use more samples, or another fraction."
            )
        train, held_out = hold_out(count, size, self.context.labels, self.context.groups, seed)
        return train.tolist(), held_out.tolist()


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
        train: returns the score after each epoch.
        prepare: called before the first training run that actually takes place; a completed search has none.
        name: name of the study; the beginning of the signature's hash is appended.
        signature: see :func:`hf_ft.search.trials.run_trials`.
        storage: likewise.
        progress: likewise.
        halving: whether to stop poor jobs early.
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
    """The number of epochs for which a job was trained; for a pruned job, only its steps are known."""
    return len(outcome.steps) or int(outcome.info.get("epochs", 0))


class Bar:
    """A progress bar that shows the best score so far.

    Args:
        total: number of jobs, over all calls of :func:`score_jobs` that share the bar.
        what: title of the bar.
        metric: name of the score.
        hidden: whether to hide the bar.
        best: format of the best job's key, appended to its score.
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
        """Set the number of finished jobs, whether or not they were trained; jobs of further calls are added to it."""
        self.before = self.bar.n = done
        self.bar.refresh()

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
