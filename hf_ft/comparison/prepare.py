"""Check the arguments of a comparison and prepare its model, data and contenders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

from hf_ft.advice import Advice, advise
from hf_ft.comparison.collect import collect
from hf_ft.comparison.contenders import Entrant, Strategies, chosen_strategies, entrant
from hf_ft.comparison.cost import measure_cost
from hf_ft.comparison.folder import Kept
from hf_ft.comparison.folds import class_of_rows, folds_of
from hf_ft.comparison.mistakes import check_thumbnails, find_mistakes
from hf_ft.comparison.report import write_report
from hf_ft.comparison.report.card import card_section
from hf_ft.comparison.results import DataSummary, FoundInData, Results
from hf_ft.comparison.runner import Runner, Tell
from hf_ft.comparison.settings import Settings, optimizers, training_arguments
from hf_ft.comparison.soup import make_soup
from hf_ft.comparison.task import Bench, Benches, Loader
from hf_ft.comparison.tracking import tracking_of
from hf_ft.comparison.training import CommonSettings
from hf_ft.core.compose import sources_of
from hf_ft.core.config import FTConfig
from hf_ft.data.check_results import DataChecks
from hf_ft.data.columns import Columns, find_columns
from hf_ft.data.task import Data
from hf_ft.documents.text import counted
from hf_ft.errors import OptionError
from hf_ft.metrics import LOCAL_METRICS
from hf_ft.models.norms import batch_norms
from hf_ft.models.source_head import has_source_head
from hf_ft.trainer.trainer import ClassWeights

TUNER = 2  # version of what follows from a seed: training runs of another version are not shared
LISTED = 20  # sets of duplicates in the report
METRICS = {
    "single_label_classification": "balanced_accuracy",
    "multi_label_classification": "macro_f1",
    "regression": "mse",
}


@dataclass(frozen=True)
class Prepared:
    """A comparison that is ready to run.

    Attributes:
        runner: runs the training runs.
        data: the data of the comparison.
        bench: model and data of full fine-tuning.
        model_name: the model name as given.
        image_size: side of the images, in pixels.
        parameters: number of model parameters.
    """

    runner: Runner
    data: Data
    bench: Bench
    model_name: str
    image_size: int | None
    parameters: int

    def estimate(self) -> str:
        """Estimated duration, shown before the start; empty if the model does not compute a loss."""
        runner = self.runner
        arguments, settings = runner.common.arguments, runner.settings
        try:
            cost = measure_cost(self.bench, arguments["per_device_train_batch_size"], runner.common.device)
        except (TypeError, AttributeError, ValueError):
            return "no estimate: the model computes no loss of its own"
        each = cost.training_seconds(self.bench, arguments["num_train_epochs"])
        trials, folds = settings.trials, len(self.bench.folds)
        runs = settings.seeds + settings.confirming_seeds
        one = (trials * folds + runs) * each + runs * cost.test_seconds(self.bench)
        count = len(runner.ledger.entrants)
        tried = f"{counted(trials, 'trial')}{f' x {folds} folds' if folds > 1 else ''} + " if trials else ""
        again = f" + {settings.confirming_seeds} of the defaults" if settings.confirming_seeds else ""
        return (
            f"estimate: {count} strateg{'y' if count == 1 else 'ies'} x "
            f"({tried}{counted(settings.seeds, 'final run')}{again}) x {each:.0f} s, and the scores on test: "
            f"about {_duration(count * one)} on one worker, less what is already done, and not counting loading, "
            "saving and what strategies search or measure first"
        )

    def advised(self) -> Advice:
        """Give advice on model and data, and reorder the strategies accordingly, the baseline first.

        Raises:
            OptionError: if the task has no classes for the probe.
        """
        runner, train = self.runner, self.bench.data["train"]
        model = self.bench.load(0, True)
        found = advise(
            model,
            train if self.bench.plain is None else self.bench.plain,
            self.bench.collate,
            source_head=has_source_head(model),
            source_data=self.bench.source is not None,
            members=max(len(sources_of(entrant.configs)) for entrant in runner.ledger.entrants) or 1,
            groups=self.bench.groups,
        )
        places = {name: place for place, name in enumerate(found.order)}
        baseline, *others = runner.ledger.entrants
        others.sort(key=lambda entrant: min(places.get(c.ft_type, len(places)) for c in entrant.configs))
        runner.ledger.entrants = (baseline, *others)
        return found

    def finish(self, command: str, advice: Advice | None = None) -> Results:
        """Save the winner, the soup if one is wanted, and the report."""
        runner, columns = self.runner, self.data.columns
        results = collect(
            runner,
            title=f"{self.model_name} on {self.data.name}",
            command=command,
            model={"name": self.model_name, "parameters": self.parameters, "image_size": self.image_size},
            data=_described(self.data, columns),
            labels={
                name: _labels(split, columns) for name, split in self.data.splits.items() if name in ("test", "ood")
            },
            advice=None if advice is None else advice.to_dict(),
            mistakes=find_mistakes(runner, self.data),
        )
        write_report(results, runner.folder)
        best = runner.save_winner()
        soup = make_soup(runner)
        if soup is not None:
            results = replace(results, soup=soup)
            write_report(results, runner.folder)
            _add_to_card(runner.kept.soup, results)
        if best is not None:
            _add_to_card(best, results)
        return results


def prepare_comparison(
    model: str | Loader,
    data: DatasetDict | Data,
    strategies: Strategies = "all",
    *,
    output_dir: str | Path,
    settings: Settings | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    class_weights: ClassWeights | None = None,
    untuned: Collection[str] = (),
    tell: Tell = print,
    **arguments: Any,
) -> Prepared:
    """Prepare a comparison for :func:`compare` and run all checks that need no training.

    Args:
        untuned: options that are not tuned although they have their default value, such as ``l2_sp.alpha``.
    """
    settings = settings or Settings()
    settings.check()
    folder = Path(output_dir)
    kept = Kept(folder, settings.soup != "none")
    kept.check()
    given = data if isinstance(data, Data) else Data(data, find_columns(DatasetDict(data)))
    metric = _checked_metric(given, settings)
    settings.mixing.check_task(given.columns.task)
    check_thumbnails(settings, given.columns)
    tracking, arguments = tracking_of(arguments, folder)
    values = training_arguments(arguments)
    device = TrainingArguments("unused", **values).device.type
    folds = folds_of(given, settings.folds)
    settings = replace(settings, folds=1 if folds is None else len(folds.parts))
    if settings.soup != "none" and folds is not None:
        raise OptionError(
            f"soup={settings.soup!r} needs one validation split that no final run is trained on, but {settings.folds} "
            "parts of the samples take turns as validation: set folds=1, or soup='none'."
        )
    given = given if folds is None else folds.first(given)
    benches = Benches(model, given, image_size, revision, folds)
    chosen = chosen_strategies(strategies)
    plain = benches.get(())
    shown = plain.load(0, False)
    if batch_norms(shown):
        wanted = values["per_device_train_batch_size"]
        values["per_device_train_batch_size"] = size = batch_size(len(plain.data["train"]), wanted)
        if size != wanted:
            tell(f"batch size {size} instead of {wanted}: the last batch of an epoch would hold a single sample")
    greater = "regression" not in LOCAL_METRICS[metric].kinds
    common = CommonSettings(
        values,
        metric,
        greater,
        class_weights,
        settings.distortion_samples,
        device,
        settings.patience,
        settings.mixing,
        tracking,
    )
    optims = optimizers(values, given.columns.task)
    entrants = _entrants(chosen, benches, settings, common, optims, shown, untuned)
    kept.claim()
    runner = Runner(entrants, settings, common, folder, _signature(plain, given, settings, common), tell)
    parameters = sum(p.numel() for p in shown.parameters())
    named = (Path(model).name if Path(model).is_dir() else model) if isinstance(model, str) else type(shown).__name__
    return Prepared(runner, given, plain, named, image_size, parameters)


def _checked_metric(data: Data, settings: Settings) -> str:
    """The metric that ranks, after a check that all splits are there and that it suits the task."""
    missing = {"train", "validation", "test"} - set(data.splits)
    if missing:
        raise OptionError(f"data has no split {min(missing)!r}, only {list(data.splits)}.")
    problem = data.columns.problem_type
    metric = settings.metric or METRICS[problem]
    if problem.replace("_classification", "") not in LOCAL_METRICS[metric].kinds:
        raise OptionError(f"metric={metric!r} does not fit {problem}: choose another.")
    return metric


def _entrants(
    chosen: Mapping[str, tuple[FTConfig, ...]],
    benches: Benches,
    settings: Settings,
    common: CommonSettings,
    optims: tuple[str, ...],
    model: Any,
    untuned: Collection[str],
) -> list[Entrant]:
    """The strategies that take part; one whose source models cannot be loaded is kept, with the reason."""
    entrants = []
    for name, configs in chosen.items():
        refusal = ""
        try:
            bench = benches.get(sources_of(configs))
        except (OSError, ValueError, ImportError) as error:
            bench, refusal = benches.get(()), str(error)
        made = entrant(
            name,
            configs,
            bench,
            settings,
            optims=optims,
            metric=common.metric,
            epochs=float(common.arguments["num_train_epochs"]),
            model=model,
            head=benches.head_fit,
            untuned=untuned,
        )
        entrants.append(replace(made, refusal=refusal) if refusal else made)
    return entrants


def _signature(bench: Bench, data: Data, settings: Settings, common: CommonSettings) -> dict[str, Any]:
    """What scores depend on, apart from the strategies: training runs are only shared if all of it is equal."""
    weights = common.class_weights
    return {
        "model and data": bench.fingerprint,
        "samples": {name: len(split) for name, split in data.splits.items()},
        "device": common.device,
        "arguments": common.arguments,
        "metric": common.metric,
        "class_weights": weights if isinstance(weights, str | None) else list(map(float, weights)),
        "sampling_seed": settings.sampling_seed,
        "learning_rates": settings.learning_rates,
        "tuner": TUNER,
        **({"folds": settings.folds} if settings.folds != 1 else {}),
        **({"patience": settings.patience} if settings.patience is not None else {}),
        **settings.mixing.given,
    }


def batch_size(samples: int, wanted: int) -> int:
    """The largest size up to ``wanted`` that leaves no last batch of one sample: BatchNorm cannot train on it."""
    return next((size for size in range(wanted, 1, -1) if samples % size != 1), wanted)


def _labels(split: Dataset, columns: Columns) -> tuple[int, ...]:
    has_classes = columns.problem_type == "single_label_classification"
    return tuple(class_of_rows(split, columns).tolist()) if has_classes else ()


def _described(data: Data, columns: Columns) -> DataSummary:
    counts: dict[str, tuple[int, ...]] = {}
    if columns.problem_type == "single_label_classification":
        counts = {
            name: tuple(np.bincount(_labels(split, columns), minlength=columns.num_labels).tolist())
            for name, split in data.splits.items()
        }
    augmentation = [] if data.augment == "none" else [f"training images are augmented: {data.augment}"]
    checks: DataSummary = {} if data.checks is None else {"checks": _found(data.checks)}
    return {
        **checks,
        "name": data.name,
        "task": columns.task,
        "classes": tuple(columns.names),
        "sizes": {name: len(split) for name, split in data.splits.items()},
        "class_counts": counts,
        "skipped": dict(data.skipped),
        "notices": tuple(data.notices),
        "notes": (*augmentation, *data.notes),
    }


def _found(checks: DataChecks) -> FoundInData:
    """What the report says about the checks."""
    said, first = tuple(checks.sentences()), checks.first(LISTED).duplicates
    return {"said": said, "duplicates": first, "sets": len(checks.duplicates)}


def _add_to_card(folder: Path, results: Results) -> None:
    """Add the comparison to the winner's model card, once."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").partition("\n## Comparison\n")[0].rstrip()
    card.write_text(f"{text}\n\n{card_section(results).strip()}\n", encoding="utf-8")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
