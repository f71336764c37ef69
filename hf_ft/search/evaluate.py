"""Score candidates by short trainings of model copies on one part of the training samples, validated on the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from hf_ft.core.context import Context
from hf_ft.engine.checkpoint import digests
from hf_ft.engine.frozen.recorder import Recordings
from hf_ft.engine.objective import Objective
from hf_ft.engine.run import Run
from hf_ft.engine.short_training import Batches, fit, score
from hf_ft.errors import OptionError
from hf_ft.metrics import LOCAL_METRICS
from hf_ft.models.preserve import random_states_kept
from hf_ft.search.trials import Report

LOOKED_AT = 64  # samples, spread over the data, that identify a data set


@dataclass
class ShortTrainings:
    """Short trainings from the same weights, with the same data order and the same budget.

    Args:
        model: the model; never changed.
        context: samples and training recipe.
        metric: one of :data:`hf_ft.metrics.LOCAL_METRICS`, or ``"loss"``.
        validation: share of the training samples held out for scoring.
        epochs: number of epochs of each training.

    Attributes:
        train_rows, validation_rows: the two splits, stratified by class where each class has enough samples.
        recordings: recorded outputs of frozen prefixes, shared by all trainings.

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
        self.train_rows, self.validation_rows = self._split()
        context = self.context
        # Same samples per step as in the run that follows, however many processes share it.
        self.recipe = dataclasses.replace(context.recipe, accumulation=context.recipe.accumulation * context.ranks)
        self.recordings = Recordings(self.model, context.samples, context.frozen_cache, context.recipe.computing)
        self._batches = Batches(context.samples, self.recordings)

    def train(self, run: Run, seed: int, report: Report | None = None) -> list[float]:
        """Train and return the score after each epoch; higher is better, and divergence scores -inf.

        Args:
            run: a run over a copy of the model.
            seed: seed of the data order and of dropout.
            report: called with each score; may stop the training.
        """
        scores: list[float] = []

        def after_epoch(epoch: int, objective: Objective) -> None:
            value = score(objective, self.recipe, self._batches, self.validation_rows, self.metric)
            scores.append(value if math.isfinite(value) else -math.inf)
            if report is not None:
                report(epoch, scores[-1])

        fit(run, self.recipe, self._batches, self.train_rows, self.epochs, seed, after_epoch)
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
        """Where to keep trials: ``wanted``, except None (a file in the output folder) and ``"memory"`` (nowhere)."""
        if wanted is not None:
            return None if wanted == "memory" else wanted
        if self.context.folder is None:
            return None
        self.context.folder.mkdir(parents=True, exist_ok=True)
        return str(Path(self.context.folder) / usual)

    def _split(self) -> tuple[list[int], list[int]]:
        count = self.context.samples.count
        if not count:
            self.context.samples.read([])  # explains why samples cannot be read by index
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


def short(signature: Mapping[str, Any]) -> str:
    """A hash of the signature, short enough for a study's name."""
    return hashlib.sha256(json.dumps(signature, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
