"""The results of a comparison as stored in JSON; tables and pages are generated from them alone."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from hf_ft.data.check_results import Duplicates
from hf_ft.errors import CheckpointError
from hf_ft.inference.calibration import SplitCalibration
from hf_ft.records import read_json, restored, stored

FORMAT = 1
Status = Literal["finished", "cannot run", "failed", "not reached", "unfinished"]
"``cannot run``: rejected for this model or data; ``failed``: no trial, or no final run, succeeded;\n``not reached``, "
"``unfinished``: out of time."


class _Scores(TypedDict):
    epoch: float
    validation: float


class Point(_Scores, total=False):
    """The scores after an epoch, and its mean training loss, if finite (in the first epoch, without its first step)."""

    loss: float


class Distance(TypedDict):
    """How far a block's features moved in training: cosine similarity and relative L2 distance."""

    cosine: float
    relative_l2: float


class FoundInData(TypedDict):
    """The findings of the data checks: in sentences, the first sets of duplicates, and their number."""

    said: tuple[str, ...]
    duplicates: tuple[Duplicates, ...]
    sets: int


class DataSummary(TypedDict, total=False):
    """The data of a comparison; see :class:`Results`."""

    name: str
    classes: tuple[str, ...]
    sizes: Mapping[str, int]
    class_counts: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, int | tuple[Any, ...]]
    notices: tuple[str, ...]
    notes: tuple[str, ...]
    task: str
    checks: FoundInData


@dataclass(frozen=True)
class Training:
    """One training run: a trial or a final run.

    Attributes:
        seed: seed of the head initialization, data order and dropout.
        params: tuned values: ``optim`` if it is tuned, ``learning_rate``, and the strategy's own options as
            ``strategy.option``.
        validation: the comparison's metric on validation at the best epoch; None if the training failed.
        best_epoch: the best epoch; may be fractional.
        scores: all metrics by name, by split (``validation``; in final runs also ``test`` and ``ood``).
        curve: the scores after each epoch.
        chosen: what was chosen after training, by strategy; ``validation`` is then the score of that model.
        seconds: wall-clock time of training, without evaluations.
        compute: the same in compute seconds (:func:`hf_ft.comparison.cost.now`).
        evaluation_seconds: time for evaluating and saving.
        passes: number of target samples processed in training.
        share: share of its steps that were completed; below 1 if it diverged and was ended early.
        peak_memory_mb: on a GPU, the peak memory of tensors; otherwise the peak growth of the process.
        parameters_trained: number of weights trained in any stage.
        checkpoint_mb: size of the saved model; final runs only.
        predictions: predicted classes by split, in the order of the split; final runs only.
        logits: the file of its outputs and labels by split, relative to the output folder; final runs only, empty in
            results of version 0.1.0.
        temperature: fitted on validation; final runs only, None if they have none.
        calibration: by split, in final runs that choose one class per sample.
        distortion: by split and block, from the features before training; final runs only, empty if the models' parts
            differ.
        warnings: warnings during training.
        error: why it failed; empty otherwise.
        versions: versions of Python packages.
    """

    seed: int
    params: Mapping[str, Any]
    validation: float | None
    best_epoch: float = 0.0
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    chosen: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    compute: float = 0.0
    evaluation_seconds: float = 0.0
    passes: int = 0
    share: float = 1.0
    peak_memory_mb: float = 0.0
    parameters_trained: int = 0
    checkpoint_mb: float | None = None
    predictions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    logits: str = ""
    temperature: float | None = None
    calibration: Mapping[str, SplitCalibration] = field(default_factory=dict)
    distortion: Mapping[str, Mapping[str, Distance]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """The results of one strategy.

    Attributes:
        name: as requested: a strategy, or several joined by ``+``.
        configs: the strategies with their options before tuning.
        status: how far it got.
        reason: why it got no further.
        notes: remarks for the reader, such as that it runs without source data.
        space: the search space in readable form: ``"1e-05 to 0.3"``, ``"auto, eval"``.
        measure_seconds: cost of the strategy's measurement (a search, statistics), once for all training runs, in
            compute seconds.
        allowed_seconds: the tuning budget in compute seconds, in results of version 0.1.0.
        used: share of the tuning budget that was used, as work; see :class:`hf_ft.engine.work.Work`.
        trials: all trials in order; the first uses the strategy's defaults.
        chosen: index of the trial whose setting the final runs use, the best one or the first; None if none has a
            score.
        on_edge: chosen values at the edge of their range, or of the values tried.
        runs: final runs, one per seed.
        rejected: runs with the first seeds and the other setting, the defaults or the best trial's, which scored lower
            on validation; empty if these are the same.
        found: the measurement, from the ``info`` of its states; merged for several strategies.
        learned: the same as a sentence.
    """

    name: str
    configs: tuple[Mapping[str, Any], ...]
    status: Status
    reason: str = ""
    notes: tuple[str, ...] = ()
    space: Mapping[str, str] = field(default_factory=dict)
    measure_seconds: float = 0.0
    allowed_seconds: float = 0.0
    used: float = 0.0
    trials: tuple[Training, ...] = ()
    chosen: int | None = None
    on_edge: tuple[str, ...] = ()
    runs: tuple[Training, ...] = ()
    rejected: tuple[Training, ...] = ()
    found: Mapping[str, Any] = field(default_factory=dict)
    learned: str = ""

    @property
    def tuning_seconds(self) -> float:
        """Total cost of tuning in compute seconds: the measurement and all trials."""
        return self.measure_seconds + sum(trial.compute for trial in self.trials)

    @property
    def finished_runs(self) -> tuple[Training, ...]:
        return tuple(run for run in self.runs if not run.error)


@dataclass(frozen=True)
class Ingredient:
    """A training run that might go into the soup.

    Attributes:
        trial: index among the trials of the contender; None for a final run.
        validation: its own score.
        member: whether it is in the soup.
        with_it: score of the average with it, if it was tried.
        reason: why it was not considered; empty if it was.
    """

    contender: str
    seed: int
    validation: float | None
    member: bool
    with_it: float | None = None
    reason: str = ""
    trial: int | None = None

    @property
    def number(self) -> str:
        """Which training run of the contender it is."""
        return f"seed {self.seed}" if self.trial is None else f"trial {self.trial + 1}"


@dataclass(frozen=True)
class SoupSummary:
    """The average of training runs, one plain model.

    Attributes:
        kind: ``uniform`` or ``greedy``.
        validation: the comparison's metric on validation, which chose the members of a greedy soup.
        scores: all metrics by name, by split.
        ingredients: all finished training runs that might be used.
    """

    kind: str
    validation: float
    scores: Mapping[str, Mapping[str, float]]
    ingredients: tuple[Ingredient, ...]

    @property
    def members(self) -> tuple[Ingredient, ...]:
        """The training runs that are in it."""
        return tuple(one for one in self.ingredients if one.member)


@dataclass(frozen=True)
class Mistake:
    """A sample for which the winner predicts a wrong class.

    Attributes:
        sample: name of its file, or its row.
        true, predicted: numbers of classes.
        probability: the probability of the predicted class.
        shown: a thumbnail as a data URI, or the beginning of a text; empty unless requested.
    """

    sample: str
    true: int
    predicted: int
    probability: float
    shown: str = ""


@dataclass(frozen=True)
class Mistakes:
    """The most and least confident mistakes of the winner's saved run.

    Attributes:
        split: the split that they are from.
        number: number of all mistakes.
        calibrated: whether probabilities are those with a temperature.
        surest: the most probable first.
        least_sure: the least probable first, without those of ``surest``.
    """

    split: str
    number: int
    calibrated: bool
    surest: tuple[Mistake, ...]
    least_sure: tuple[Mistake, ...]


@dataclass(frozen=True)
class Results:
    """The results of a comparison.

    Attributes:
        title: such as ``mobilenet_v2 on elpv``.
        command: the command that reproduces it.
        metric: the metric of tuning and ranking.
        greater_is_better: False for errors.
        model: ``name``, ``parameters``, ``image_size``.
        data: ``name``; ``classes`` (names); ``sizes`` and ``class_counts`` by split; ``skipped`` (unreadable rows by
            split); ``notices`` (licences); ``notes`` (which splits were carved); ``checks`` (what the data checks
            found).
        labels: true classes by split, in the order of the predictions.
        settings: epochs, batch size, optimizer, budget and so on.
        versions: versions of Python packages.
        machine: the hardware used.
        seconds: total time over all calls and workers.
        contenders: in the order in which they ran; the first is full fine-tuning, the baseline.
        advice: the result of :func:`hf_ft.advice.advise`, if requested.
        winner: the contender with the best mean validation score over the final runs; empty if there is none.
        winner_seed: the seed of its saved run, the best by validation.
        soup: the average of final runs, and of trials, if it was requested.
        mistakes: the mistakes of the winner, if its logits were kept.
    """

    title: str
    command: str
    metric: str
    greater_is_better: bool
    model: Mapping[str, Any]
    data: DataSummary
    labels: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    seconds: float
    contenders: tuple[Contender, ...]
    advice: Mapping[str, Any] | None = None
    winner: str = ""
    winner_seed: int | None = None
    soup: SoupSummary | None = None
    mistakes: Mistakes | None = None

    def __getitem__(self, name: str) -> Contender:
        return next(contender for contender in self.contenders if contender.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **stored(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Results:
        """Restore results from :meth:`to_dict`, also after a round trip through JSON.

        Raises:
            CheckpointError: if the format is not supported, or the content is not that of a comparison.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, Mapping) else content
            raise CheckpointError(
                f"results have format {reprlib.repr(found)}, not {FORMAT}: were they written by another version of "
                "hf_ft?"
            )
        results = restored(cls, content, "results of a comparison")
        _check(results)
        return results

    def save(self, file: str | Path) -> None:
        """Write compact JSON: there are thousands of predictions."""
        Path(file).write_text(json.dumps(self.to_dict(), separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Results:
        """Read results written by :meth:`save`.

        Raises:
            CheckpointError: if the file is missing, damaged, or of another kind; the message names it.
        """
        try:
            return cls.from_dict(read_json(Path(file)))
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from error


def _no_classes(results: Results, run: Training) -> Iterator[str]:
    """Predictions and labels that are not the number of a class, if the classes are known."""
    classes = len(results.data.get("classes") or ())
    for split, predicted in run.predictions.items() if classes else ():
        numbers = (*predicted, *results.labels.get(split, ()))
        if numbers and not 0 <= min(numbers) <= max(numbers) < classes:
            yield f"predictions or labels of {split!r} lie outside the {classes} classes"


def _wrong_mistakes(results: Results) -> Iterator[str]:
    """Classes of mistakes that are not the number of a class."""
    classes, found = len(results.data.get("classes") or ()), results.mistakes
    listed = () if found is None else (*found.surest, *found.least_sure)
    numbers = [number for one in listed for number in (one.true, one.predicted)]
    if numbers and not 0 <= min(numbers) <= max(numbers) < classes:
        yield f"mistakes lie outside the {classes} classes"


def _check(results: Results) -> None:
    """Check that every reference within the results can be resolved.

    Raises:
        CheckpointError: if it does not.
    """
    wrong = []
    if not results.contenders:
        wrong.append("there are no contenders")
    if results.winner and results.winner not in {contender.name for contender in results.contenders}:
        wrong.append(f"the winner {results.winner!r} is not among the contenders")
    for contender in results.contenders:
        if contender.chosen is not None and not 0 <= contender.chosen < len(contender.trials):
            wrong.append(f"{contender.name}: the chosen trial {contender.chosen} does not exist")
        if not all(isinstance(config.get("ft_type"), str) for config in contender.configs):
            wrong.append(f"{contender.name}: a strategy has no 'ft_type'")
        wrong += [f"{contender.name}: {problem}" for run in contender.runs for problem in _no_classes(results, run)]
    wrong += _wrong_mistakes(results)
    if "seeds" not in results.settings:
        wrong.append("settings.seeds is missing")
    if wrong:
        raise CheckpointError(f"these are not results of a comparison: {wrong[0]}. Use another file.")
