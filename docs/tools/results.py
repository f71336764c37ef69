"""The tables of docs/results.md, made from what tests/benchmarks/results.py wrote to docs/results/."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hf_ft.comparison.report.text import interval, spread
from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import Standing, standings
from hf_ft.core.config import BASELINE
from hf_ft.documents.text import signed

KEPT = Path(__file__).parents[1] / "results"
NOT_YET = "Not measured yet."
TASKS = ("digits", "elpv_100", "uci_100", "mnist_200", "elpv_500")
FIVE = ("blockwise", "daft", "soft", "tred", "amcf")
Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]


@functools.cache
def load(file: Path) -> Results:
    """Results from a file, read once."""
    return Results.load(file)


def read(folder: Path = KEPT, tasks: Sequence[str] = TASKS) -> dict[str, Results]:
    """The tasks that were measured."""
    files = {name: folder / f"{name}.json" for name in tasks}
    return {name: load(file) for name, file in files.items() if file.is_file()}


def table_of_all(table: Table) -> str:
    """The mean test score of every strategy on every task, and the mean difference from full fine-tuning."""
    tasks = read()
    if not tasks:
        return NOT_YET
    found = {task: _by_name(results) for task, results in tasks.items()}
    names = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    ranked = sorted(names, key=lambda name: -_mean_difference(found.values(), name)[0])
    rows = []
    for name in ranked:
        cells = [_test(by_name.get(name)) for by_name in found.values()]
        mean, count = _mean_difference(found.values(), name)
        shown = "" if name == BASELINE else f"{signed(mean)} ({count})"
        rows.append((f"**{name}**" if name in FIVE else name, *cells, shown))
    return table(("strategy", *tasks, "mean difference from full (tasks)"), rows)


def table_of_task(table: Table, task: str) -> str:
    """One task in full: scores, differences, the cost of tuning and the chosen settings."""
    results = read(tasks=(task,)).get(task)
    if results is None:
        return NOT_YET
    rows = []
    for standing in standings(results):
        contender = standing.contender
        chosen = "" if contender.chosen is None else _options(contender.trials[contender.chosen].params)
        difference = standing.differences.get("test")
        rows.append(
            (
                f"**{contender.name}**" if contender.name in FIVE else contender.name,
                spread(standing.spreads.get("validation")),
                _test(standing),
                "" if difference is None else f"{signed(difference.mean)} {interval(difference)}",
                spread(standing.spreads.get("ood")),
                "" if standing.compute is None else f"{standing.compute:.0f}",
                str(len(contender.trials)),
                chosen + (f" (edge: {', '.join(contender.on_edge)})" if contender.on_edge else ""),
            )
        )
    headers = ("strategy", "validation", "test", "vs. full", "out of distribution", "s", "trials", "chosen")
    return table(headers, rows) + "\n\n" + _note(results)


def table_of_five(table: Table) -> str:
    """Where each of the five systems beats full fine-tuning, and where it does not."""
    tasks = read()
    if not tasks:
        return NOT_YET
    rows = []
    for name in FIVE:
        cells = []
        for results in tasks.values():
            standing = _by_name(results).get(name)
            difference = None if standing is None else standing.differences.get("test")
            if difference is None:
                cells.append("")
                continue
            agree = "on all" if {difference.wins, difference.losses} & {len(difference.by_seed)} else "mixed"
            cells.append(f"{signed(difference.mean)} {interval(difference)}, {agree}")
        rows.append((name, *cells))
    return table(("system", *tasks), rows)


def table_of_choice(table: Table) -> str:
    """The test score of the strategy selected by validation, and that of the one that was best on test."""
    rows = []
    for task, results in read().items():
        found = [s for s in standings(results) if s.rank is not None and "test" in s.spreads]
        by_test = max(found, key=lambda s: s.spreads["test"].mean)
        chosen = next(s for s in found if s.name == results.winner)
        full = next(s for s in found if s.name == BASELINE)
        rows.append(
            (
                task,
                str(results.data["sizes"]["validation"]),
                f"{chosen.name}: {spread(chosen.spreads['test'])}",
                f"{by_test.name}: {spread(by_test.spreads['test'])}",
                spread(full.spreads["test"]),
            )
        )
    headers = ("task", "validation images", "selected by validation (test score)", "best on test", "full")
    return table(headers, rows) if rows else NOT_YET


def _by_name(results: Results) -> dict[str, Standing]:
    return {s.name: s for s in standings(results) if s.rank is not None and "test" in s.spreads}


def _test(standing: Standing | None) -> str:
    return "" if standing is None else spread(standing.spreads.get("test"))


def _mean_difference(tasks: Iterable[dict[str, Standing]], name: str) -> tuple[float, int]:
    differences = [by_name[name].differences.get("test") for by_name in tasks if name in by_name]
    means = [difference.mean for difference in differences if difference is not None]
    return (sum(means) / len(means) if means else 0.0, len(means))


def _options(params: Mapping[str, object]) -> str:
    shown = {"learning_rate": "lr"}
    return ", ".join(
        f"{shown.get(name, name.partition('.')[2])} {f'{value:.2g}' if isinstance(value, float) else value}"
        for name, value in params.items()
        if value is not None
    )


def _note(results: Results) -> str:
    sizes, settings = results.data["sizes"], results.settings
    errors: Sequence[float] = [s.standard_errors["test"] for s in standings(results) if "test" in s.standard_errors]
    noise = f" With so few test images, one standard error is about {sum(errors) / len(errors):.3f}." if errors else ""
    return (
        f"{results.data['name']}: {sizes['train']} training, {sizes['validation']} validation, {sizes['test']} test "
        f"and {sizes.get('ood', 0)} out-of-distribution images; {settings['num_train_epochs']:g} epochs, batches of "
        f"{settings['per_device_train_batch_size']}; a budget of {settings['trials']} full fine-tuning runs, "
        f"{settings['seeds']} seeds; {results.seconds / 60:.0f} minutes of one worker.{noise} "
        f"torch {results.versions['torch']}, transformers {results.versions['transformers']}."
    )
