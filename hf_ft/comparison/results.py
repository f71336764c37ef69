"""What a comparison found: every training, as JSON keeps it. Tables and pages are made of this alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FORMAT = 1
BASELINE = "full"
Status = Literal["finished", "cannot run", "failed", "not reached", "unfinished"]
"""``cannot run``: refused for this model or these data; ``failed``: no trial, or no final run, ended well;
``not reached``, ``unfinished``: the time was up."""


@dataclass(frozen=True)
class Training:
    """One training: a trial, or a final run.

    Attributes:
        seed: of the head's start, the order of the data and dropout.
        params: what was tuned: ``learning_rate``, and the strategy's own options as ``strategy.option``.
        validation: the comparison's metric on validation, of the best epoch; None if the training failed.
        best_epoch: which that was; may be a fraction.
        scores: by split (``validation``, and in final runs ``test`` and ``ood``), every metric by name.
        curve: after each epoch: ``epoch``, ``loss`` (the mean training loss since the last one), ``validation``.
        seconds: of training, without evaluations.
        compute: the same in seconds of computing (:func:`hf_ft.comparison.cost.now`), which the budget counts.
        evaluation_seconds: of evaluating and saving.
        passes: samples of the target that went through the training.
        peak_memory_mb: on a GPU the memory that tensors took at most, else what the process grew by at most.
        parameters_trained: how many weights any stage trains.
        checkpoint_mb: size of the saved model; final runs only.
        predictions: by split, the predicted classes in the order of the split; final runs only.
        distortion: by split, by block: cosine similarity and relative L2 distance of the features to those before;
            final runs only, empty where the models' parts differ.
        warnings: what was said in it.
        error: why it failed; empty otherwise.
        versions: of Python packages.
    """

    seed: int
    params: Mapping[str, Any]
    validation: float | None
    best_epoch: float = 0.0
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curve: tuple[Mapping[str, float], ...] = ()
    seconds: float = 0.0
    compute: float = 0.0
    evaluation_seconds: float = 0.0
    passes: int = 0
    peak_memory_mb: float = 0.0
    parameters_trained: int = 0
    checkpoint_mb: float | None = None
    predictions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    distortion: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One strategy's part in the comparison.

    Attributes:
        name: as it was asked for: a strategy, or several joined by ``+``.
        configs: the strategies with their options, before tuning.
        status: how far it came.
        reason: why no further.
        notes: what a reader must know, such as that it runs without source data.
        space: what was tuned, for people: ``"1e-05 to 0.3"``, ``"auto, eval"``.
        measure_seconds: what the strategy's look at the data took (a search, statistics), once for all trainings, in
            seconds of computing.
        allowed_seconds: the tuning budget, in the same.
        trials: in their order; the first has the options' defaults and a usual learning rate (0.01 for SGD).
        chosen: number of the trial with the best validation score; None if none has one.
        on_edge: chosen values on the edge of their range, or of what was tried of it.
        runs: final runs, one a seed.
        found: what it measured, as its State's info holds it; of several strategies, all of it in one.
        learned: the same in a sentence.
    """

    name: str
    configs: tuple[Mapping[str, Any], ...]
    status: Status
    reason: str = ""
    notes: tuple[str, ...] = ()
    space: Mapping[str, str] = field(default_factory=dict)
    measure_seconds: float = 0.0
    allowed_seconds: float = 0.0
    trials: tuple[Training, ...] = ()
    chosen: int | None = None
    on_edge: tuple[str, ...] = ()
    runs: tuple[Training, ...] = ()
    found: Mapping[str, Any] = field(default_factory=dict)
    learned: str = ""

    @property
    def tuning_seconds(self) -> float:
        """What tuning took, in seconds of computing: the look at the data, and all trials."""
        return self.measure_seconds + sum(trial.compute for trial in self.trials)

    @property
    def finished_runs(self) -> tuple[Training, ...]:
        return tuple(run for run in self.runs if not run.error)


@dataclass(frozen=True)
class Results:
    """A whole comparison.

    Attributes:
        title: such as ``mobilenet_v2 on elpv``.
        command: what makes it again.
        metric: what tuning and ranking go by.
        greater_is_better: False for errors.
        model: ``name``, ``parameters``, ``image_size``.
        data: ``name``; ``classes`` (names); ``sizes`` and ``class_counts`` by split; ``skipped`` (rows that could not
            be read, by split); ``notices`` (licences); ``notes`` (which splits were carved).
        labels: by split, the true classes in the order of the predictions.
        settings: epochs, batch size, optimizer, budget and so on.
        versions: of Python packages.
        machine: where it ran.
        seconds: in all, over all sittings and workers.
        contenders: in the order in which they ran; the first is full fine-tuning, the baseline.
        advice: what :func:`hf_ft.advice.advise` said, where it was asked.
        winner: the best contender by mean validation score over the final runs; empty if there is none.
        winner_seed: which of its runs is saved, the best by validation.
    """

    title: str
    command: str
    metric: str
    greater_is_better: bool
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    labels: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    seconds: float
    contenders: tuple[Contender, ...]
    advice: Mapping[str, Any] | None = None
    winner: str = ""
    winner_seed: int | None = None

    def __getitem__(self, name: str) -> Contender:
        return next(contender for contender in self.contenders if contender.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Results:
        """What :meth:`to_dict` gave, also after a way through JSON.

        Raises:
            ValueError: it is of another format.
        """
        if content.get("format") != FORMAT:
            raise ValueError(f"results of format {content.get('format')!r}, not {FORMAT}: made by another hf_ft?")
        values = {key: value for key, value in content.items() if key != "format"}
        values["contenders"] = tuple(_contender(item) for item in content["contenders"])
        values["labels"] = _tuples(content["labels"])
        return cls(**values)

    def save(self, file: str | Path) -> None:
        """Write JSON, without spaces: there are thousands of predictions."""
        Path(file).write_text(json.dumps(self.to_dict(), separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Results:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(file).read_text(encoding="utf-8")))


def training_from_dict(content: Mapping[str, Any]) -> Training:
    """A training from its JSON dict."""
    values = dict(content)
    values["curve"] = tuple(content.get("curve", ()))
    values["warnings"] = tuple(content.get("warnings", ()))
    values["predictions"] = _tuples(content.get("predictions", {}))
    return Training(**values)


def _contender(content: Mapping[str, Any]) -> Contender:
    values = dict(content)
    for name in ("configs", "notes", "on_edge"):
        values[name] = tuple(content[name])
    for name in ("trials", "runs"):
        values[name] = tuple(training_from_dict(item) for item in content[name])
    return Contender(**values)


def _tuples(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values) for name, values in content.items()}
