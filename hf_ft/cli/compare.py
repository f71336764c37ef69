"""``hf-ft compare``: compare strategies with equal tuning budgets and write a report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import indent
from typing import Any, Literal

import torch
from datasets import DatasetDict
from transformers import TrainingArguments

from hf_ft.advice import Advice
from hf_ft.cli.checks import check_source_data, refuse
from hf_ft.cli.console import count, is_main, refusals, say, table
from hf_ft.cli.cores import warn_if_crowded
from hf_ft.cli.flags import DataFlags
from hf_ft.cli.help import compare_help
from hf_ft.cli.logs import quieten
from hf_ft.cli.prepare import augmentation_of, check_data, check_rows, notices, prints_for, read_data, readable
from hf_ft.cli.request import configured, read_values, taken
from hf_ft.cli.workers import WorkerFlags, check_workers, other_workers, same_command
from hf_ft.comparison import Data, Results, Settings
from hf_ft.comparison.folder import Kept
from hf_ft.comparison.gain import gain
from hf_ft.comparison.prepare import Prepared, prepare_comparison
from hf_ft.comparison.report import write_report
from hf_ft.comparison.report.sections.ranking import BEST_FOLDER, usage
from hf_ft.comparison.report.sections.soup import sentence
from hf_ft.comparison.settings import optimizers, setting
from hf_ft.comparison.statistics import standings
from hf_ft.comparison.worker import become_worker, visible_gpus
from hf_ft.core.config import BASELINE, FTConfig, strategies
from hf_ft.data.align import other_distribution
from hf_ft.data.prints import Prints
from hf_ft.data.progress import hide_bars
from hf_ft.documents.public import shareable_command, shareable_name
from hf_ft.documents.text import counted
from hf_ft.errors import OptionError
from hf_ft.zoo.datasets import DATASETS
from hf_ft.zoo.models import SHORT_NAMES

DEFAULT_FOLDER = "runs/compare"


@dataclass
class CompareFlags:
    """Flags that select the strategies and the data."""

    strategies: str = setting("all", "names from `hf-ft list`, joined by commas; a+b composes two; all")
    labelled: int | None = setting(None, "number of labelled samples to use, validation included (default: all)")
    test_fraction: float = setting(0.25, "fraction of train to hold out for the test if there is no test split")
    ood_dataset: str | None = setting(None, "second test set: the same classes, another distribution")
    ood_split: str | None = setting(None, "its split (default: test, otherwise train)")
    class_weights: Literal["balanced", "none"] = setting("none", "balanced: weight classes by their inverse frequency")
    advise: bool = setting(False, "run `hf-ft advise` first, and train the strategies in the order that it recommends")
    report: str | None = setting(None, "only rebuild the report in this folder from its results.json")


KINDS = (DataFlags, CompareFlags, WorkerFlags, Settings, TrainingArguments)


def run_compare(arguments: list[str], example: str | None = None, over: str = BASELINE) -> None:
    """Run the comparison, print the ranking, and show how to load the winner.

    Args:
        example: save the first test image under this name in the output folder, and show how to classify it.
        over: report what the winner gained over this contender, if it takes part.
    """
    if not arguments or {"-h", "--help", "--help-all"} & set(arguments):
        say(compare_help(CompareFlags, everything="--help-all" in arguments))
        return
    values = read_values(arguments, KINDS, "compare")
    flags = CompareFlags(**taken(values, CompareFlags))
    if flags.report is not None:
        others = [name for name in values if name != "report"]
        refuse(values, others, "--report only rebuilds the report of a finished comparison")
        _report_anew(Path(flags.report))
        return
    workers = WorkerFlags(**taken(values, WorkerFlags)).workers
    gpus = [] if values.get("use_cpu") else visible_gpus()
    check_workers(workers, len(gpus))
    become_worker()
    quieten()
    hide_bars(not is_main())
    prepared = _prepare(values, flags)
    _announce(str(values["model"]), prepared)
    if prepared.data.checks is not None and is_main():
        prepared.data.checks.save(prepared.runner.folder)
    advice = _advised(prepared) if flags.advise else None
    if is_main():
        say(prepared.estimate() + "\n")
    if prepared.runner.common.device == "cpu":
        warn_if_crowded(torch.get_num_threads())
    with other_workers(workers, same_command("compare", arguments), gpus) as sharing:
        prepared.runner.run()
        if prepared.runner.settings.hours is not None and sharing.wait():
            prepared.runner.run()  # reads what they finished after the time was up
    if is_main():  # results are identical on all workers
        results, folder = (
            prepared.finish(shareable_command(["hf-ft", "compare", *arguments]), advice),
            prepared.runner.folder,
        )
        if example is not None:
            first = prepared.data.splits["test"].with_format(None)[0]
            first[prepared.data.columns.inputs[0]].save(folder / example)
        show(results, folder, example, over)
        if not results.winner and prepared.runner.settings.hours is None:
            raise OptionError(f"no strategy finished; {folder}/report.md says why.")


def _prepare(values: Mapping[str, Any], flags: CompareFlags) -> Prepared:
    """Check all flags, then read the data and prepare the comparison."""
    data_flags = DataFlags(**taken(values, DataFlags))
    settings = Settings(**taken(values, Settings))
    given = taken(values, TrainingArguments)
    folder = Path(str(given.pop("output_dir", None) or DEFAULT_FOLDER))
    chosen = _chosen(flags.strategies, values)
    check_source_data(data_flags, itertools.chain(*chosen.values()))
    _check(data_flags, folder, settings)
    data = comparison_data(data_flags, flags, folder)
    with refusals():
        return prepare_comparison(
            str(data_flags.model),
            data,
            chosen,
            output_dir=folder,
            settings=settings,
            image_size=data_flags.image_size,
            revision=data_flags.revision,
            class_weights=None if flags.class_weights == "none" else flags.class_weights,
            untuned=[name for name in values if "." in name],  # options set by the user stay fixed, even at default
            tell=say,
            **given,
        )


def _advised(prepared: Prepared) -> Advice | None:
    try:
        advice = prepared.advised()
    except OptionError as error:
        say(f"note: no advice, so the strategies keep their order: {error}", error=True)
        return None
    say(f"advised order: {', '.join(entrant.name for entrant in prepared.runner.ledger.entrants)}")
    return advice


def _chosen(names: str, values: Mapping[str, Any]) -> dict[str, tuple[FTConfig, ...]]:
    """The selected strategies with their options."""
    wanted = list(strategies()) if names == "all" else [name.strip() for name in names.split(",")]
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    if twice:
        raise OptionError(f"--strategies names {twice[0]} twice.")
    parts = dict.fromkeys(part for name in (BASELINE, *wanted) for part in name.split("+"))
    configs = {config.ft_type: config for config in configured(list(parts), values)}
    return {name: tuple(configs[part] for part in name.split("+")) for name in dict.fromkeys((BASELINE, *wanted))}


def _check(data: DataFlags, folder: Path, settings: Settings) -> None:
    for name, what in (("model", ", ".join(SHORT_NAMES)), ("dataset", ", ".join(DATASETS))):
        if not getattr(data, name):
            raise OptionError(f"--{name} is missing: a Hub id, a folder or file, or one of {what}.")
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--output_dir {folder} is a file: name a folder.")
    settings.check()
    Kept(folder, settings.soup != "none").check()  # before anything is read


def comparison_data(flags: DataFlags, more: CompareFlags, folder: Path) -> Data:
    """The data given by the flags, with the second test set, checked; the findings are written to the folder."""
    prints = prints_for(flags)
    data = read_data(flags, test_fraction=more.test_fraction, labelled=more.labelled, prints=prints)
    return check_data(_with_ood(data, flags, more, prints), flags, prints, folder)


def _with_ood(data: Data, flags: DataFlags, more: CompareFlags, prints: Prints | None) -> Data:
    notes = ["validation and test rows are those of the data set, or were held out from its training rows"]
    if more.ood_dataset is None:
        return replace(data, notes=tuple(notes))
    found = other_distribution(more.ood_dataset, more.ood_split, data.columns, flags.encoding)
    other, skipped = readable(DatasetDict({"ood": found}), data.columns, flags.on_corrupt, prints)
    return replace(
        data,
        splits=DatasetDict({**data.splits, **other}),
        skipped={**data.skipped, **skipped},
        notices=notices(flags.dataset, flags.source_dataset, more.ood_dataset),
        notes=(f"out of distribution: {shareable_name(more.ood_dataset)}, {len(other['ood']):,} samples", *notes),
    )


def _announce(model: str, prepared: Prepared) -> None:
    data, settings = prepared.data, prepared.runner.settings
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in data.splits.items())
    arguments, trials = prepared.runner.common.arguments, settings.trials
    chosen = " ".join(str(arguments[name]) for name in ("optim", "optim_args") if arguments.get(name))
    optimizer = chosen or " or ".join(optimizers(arguments, data.columns.task))
    rows = [
        ("model", f"{model}, {count(prepared.parameters)} parameters"),
        ("data", f"{data.name}: {sizes}; {data.columns.num_labels} classes; {augmentation_of(data, settings.mixing)}"),
        ("strategies", ", ".join(entrant.name for entrant in prepared.runner.ledger.entrants)),
        (
            "budget",
            (f"tuning worth {counted(trials, 'run')} of full fine-tuning each" if trials else "no tuning")
            + f", then {counted(settings.seeds, 'final run')}",
        ),
        (
            "training",
            f"{counted(arguments['num_train_epochs'], 'epoch')}, {optimizer}, {arguments['lr_scheduler_type']}",
        ),
        ("chosen by", f"{prepared.runner.common.metric} on validation; test is scored in the final runs only"),
    ]
    kind = "sounds" if data.columns.task == "audio" else "images"
    rows += [("skipped", f"{number} unreadable {kind} of {name}") for name, number in data.skipped.items()]
    rows[2:2] = check_rows(data, prepared.runner.folder)
    rows += [("notice", notice) for notice in data.notices]
    say(f"{table(rows)}\n")


def _gained(results: Results, over: str) -> str:
    """What the winner gained, in a sentence."""
    over = over if any(one.name == over and one.finished_runs for one in results.contenders) else BASELINE
    other = "full fine-tuning" if over == BASELINE else over
    if results.winner in ("", over):
        return f"Nothing is gained over {other}: no strategy scores higher on validation."
    gained = gain(results, over)
    if gained is None:
        return f"{results.winner} and {other} have no test scores in common."
    error = "" if gained[1] is None else f" (standard error {gained[1]:.3f})"
    return f"Test {results.metric} of {results.winner} minus that of {other}: {gained[0]:+.3f}{error}."


def show(results: Results, folder: Path, example: str | None = None, over: str = BASELINE) -> None:
    """Print the ranking, the locations of all files, and how to classify an example in the folder."""
    rows = []
    for standing in standings(results):
        contender = standing.contender
        test = standing.spreads.get("test")
        difference = standing.differences.get("test")
        rows.append(
            (
                f"{contender.name}{' *' if contender.name == results.winner else ''}",
                _spread(standing.spreads.get("validation")),
                _spread(test),
                "" if difference is None else f"{difference.mean:+.3f}",
                "" if standing.seconds is None else f"{standing.seconds:.0f}",
                len(contender.trials),
                f"{contender.tuning_seconds:.0f}",
                contender.status if contender.status != "finished" else "",
            )
        )
    headers = ("strategy", "validation", "test", "vs. full", "s/run", "trials", "tuning s", "")
    seeds = results.settings["seeds"]
    averaged = f"mean ± std of {seeds} seeds" if seeds > 1 else "one seed"
    say(f"\n{results.metric}, {averaged}; * is best on validation:\n")
    say(table(rows, headers))
    say(f"\n{_gained(results, over)}")
    reasons = [(c.name, f"{c.status}: {c.reason}") for c in results.contenders if c.status != "finished" and c.reason]
    if reasons:
        say(f"\n{table(reasons)}")
    edges = [c for c in results.contenders if c.on_edge]
    for contender in edges:
        say(f"note: {contender.name}: {', '.join(contender.on_edge)} is at the edge of its range", error=True)
    if results.soup is not None:
        say(f"\n{sentence(results)}")
    places = ["report.html", "report.md", "results.json", *(["best/ (the winner)"] if results.winner else [])]
    say(f"\nIn {folder}: {', '.join([*places, *(['soup/ (the average)'] if results.soup else [])])}.")
    if results.winner:
        shown = None if example is None else folder / example
        say(f"\n{indent(usage(results, folder / BEST_FOLDER, shown), '  ')}")


def _spread(found: Any) -> str:
    if found is None:
        return ""
    return f"{found.mean:.3f}" + ("" if found.std is None else f" ± {found.std:.3f}")


def _report_anew(folder: Path) -> None:
    file = folder / "results.json"
    if not file.is_file():
        raise OptionError(f"--report {folder}: it contains no {file.name}. Give the --output_dir of a comparison.")
    results = Results.load(file)
    write_report(results, folder)
    show(results, folder)


__all__ = ["CompareFlags", "become_worker", "run_compare"]
