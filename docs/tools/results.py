"""The tables in README.md and docs/results.md of strategies on real data.

Made from what tests/benchmarks/results.py wrote to docs/results/defaults/ and docs/results/tuned/.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hf_ft.comparison.results import Contender, Results, Training
from hf_ft.core.config import BASELINE
from hf_ft.documents.text import PLUS_MINUS, score, score_like, signed

KEPT = Path(__file__).parents[1] / "results"
NOT_YET = "Not measured yet."
NATURAL = {"caltech40": "Caltech-101, 40 classes", "cifar10": "CIFAR-10"}
# The same images, by other networks:
LITE = {"caltech40_lite": "EfficientNet-Lite0"}
DINOV2 = {"caltech40_dinov2": "DINOv2-small"}
# Far from ImageNet:
CELLS = {"elpv_500": "solar cells, 500 images", "elpv_100": "solar cells, 100 images"}
DIGITS = {"mnist_200": "MNIST, 200 images", "uci_100": "UCI digits, 100 images", "digits": "MNIST's 5 to 9, 50 images"}
TITLES = NATURAL | LITE | DINOV2 | CELLS | DIGITS
FIVE = ("blockwise", "daft", "soft", "tred", "amcf")
FEW = (BASELINE, "full (statistics kept)", "linear_probe", "lp_ft", "peft", *FIVE, "blockwise+daft")
RESAMPLES = 2000
Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]
Gaps = tuple[np.ndarray, np.ndarray]  # (seeds, samples): ours is right - theirs is right; and the samples' classes


@functools.cache
def load(file: Path) -> Results:
    """Results from a file, read once."""
    return Results.load(file)


def read(kind: str, titles: Mapping[str, str] = NATURAL) -> dict[str, list[Results]]:
    """The results of each task, one for each split; ``kind``: defaults or tuned."""
    tasks: dict[str, list[Results]] = {}
    for task in titles:
        files = sorted((KEPT / kind).glob(f"{task}_[0-9]*.json"))
        if files:
            tasks[task] = [load(file) for file in files]
    return tasks


def table_of_results(table: Table, kind: str, few: bool = False, titles: Mapping[str, str] = NATURAL) -> str:
    """Mean test score of every strategy, or of a few, and the difference from full fine-tuning with its interval."""
    tasks = read(kind, titles)
    if not tasks:
        return NOT_YET
    names = {contender.name for splits in tasks.values() for results in splits for contender in results.contenders}
    names &= set(FEW) if few else names
    mean = {name: statistics.fmean(_mean(splits, name) for splits in tasks.values()) for name in names}
    best = sorted(names, key=lambda name: (-round(mean[name], 9), name))
    rows = []
    for name in best:
        cells = []
        for splits in tasks.values():
            scores = _scores(splits, name)
            spread = f"{PLUS_MINUS}{score_like(statistics.stdev(scores))}" if len(scores) > 1 else ""
            gap = "" if name == BASELINE else _difference([splits], name)
            cells += [f"{score(statistics.fmean(scores))}{spread}{_of_splits(splits, name)}" if scores else "", gap]
        if len(tasks) > 1:
            cells.append("" if name == BASELINE else _difference(tasks.values(), name))
        rows.append((f"**{name}**" if name in FIVE else name, *cells))
    headers = [head for task in tasks for head in (titles[task], "vs. full")]
    headers += ["mean vs. full"] if len(tasks) > 1 else []
    return table(("strategy", *headers), rows) + "\n\n" + " ".join(_size(titles[task], tasks[task]) for task in tasks)


def table_of_statistics(table: Table) -> str:
    """What becomes of BatchNorm's statistics, at the defaults: mean test score, and the gain over batch statistics."""
    names = (BASELINE, "full (statistics kept)", "daft")
    rows = []
    for task, splits in read("defaults", TITLES).items():
        if all(_scores(splits, name) for name in names):
            means = [_mean(splits, name) for name in names]
            others = [f"{score(mean)} ({signed(mean - means[0])})" for mean in means[1:]]
            rows.append((TITLES[task], score(means[0]), *others))
    return table(("task", "those of each batch", "kept", "converted (`daft`)"), rows) if rows else NOT_YET


def interval_over_splits(*tasks: Sequence[Gaps], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean difference in balanced accuracy, by a hierarchical bootstrap.

    Of several tasks, it is that of the mean over them; each is resampled on its own.

    Splits are drawn with replacement, and within each split its seeds, and its test samples by class. The variation
    from samples and seeds is also part of the differences between splits, so it counts twice; this makes up for how
    little a few splits vary when they are resampled. In simulations with three splits, the interval contains the true
    value in 94 to 99 of 100 cases if the gain varies by up to two points between splits, but in 83 if it varies by
    five.

    Args:
        tasks: for each split of a task, (seeds, samples) of (ours is right) - (theirs is right), and the (samples,)
            classes.
    """
    random = np.random.default_rng(seed)
    low, high = np.quantile(np.mean([_resampled(gaps, random) for gaps in tasks], axis=0), [0.025, 0.975])
    return float(low), float(high)


def _resampled(gaps: Sequence[Gaps], random: np.random.Generator) -> np.ndarray:
    """The mean difference on one task with resampled splits, seeds and samples, (resamples,)."""
    chosen = random.integers(len(gaps), size=(RESAMPLES, len(gaps)))
    means = np.empty(chosen.shape)
    for split, (own, classes) in enumerate(gaps):
        here = chosen == split
        means[here] = _redrawn(own, classes, int(here.sum()), random)
    return means.mean(axis=1)


def _redrawn(gaps: np.ndarray, classes: np.ndarray, times: int, random: np.random.Generator) -> np.ndarray:
    """The mean difference on one split with resampled seeds and samples, (times,)."""
    by_class = []
    for label in np.unique(classes):
        own = gaps[:, classes == label]
        # Of samples with equal columns, only the number that is drawn matters.
        values, counts = np.unique(own, axis=1, return_counts=True)
        drawn = random.multinomial(own.shape[1], counts / own.shape[1], size=times)
        by_class.append(values @ drawn.T / own.shape[1])
    seeds = random.integers(len(gaps), size=(len(gaps), times))
    return np.take_along_axis(np.mean(by_class, axis=0), seeds, axis=0).mean(axis=0)


def gaps_of(results: Results, name: str) -> Gaps | None:
    """What the interval is computed from, over the seeds that a strategy shares with full fine-tuning."""
    return gaps_between(_runs(results, name), _runs(results, BASELINE), results.labels["test"])


def gaps_between(ours: Mapping[int, Training], theirs: Mapping[int, Training], test: Sequence[int]) -> Gaps | None:
    """What the interval is computed from, over the seeds that two strategies share; ``test``: (samples,) classes."""
    labels = np.asarray(test)
    right = [
        (np.asarray(ours[seed].predictions["test"]) == labels).astype(float)
        - (np.asarray(theirs[seed].predictions["test"]) == labels)
        for seed in ours
        if seed in theirs
    ]
    return (np.stack(right), labels) if right else None


def table_of_auto(table: Table) -> str:
    """``auto`` at its defaults against the winner of a tuned comparison, and against the Trainer's defaults."""
    defaults, tuned = read("defaults", TITLES), read("tuned", TITLES)
    rows: list[tuple[str, ...]] = []
    means: list[list[float]] = []
    for task in TITLES:
        both = [(one, other) for one in defaults.get(task, ()) for other in tuned.get(task, ()) if _same(one, other)]
        both = [(one, other) for one, other in both if all(_runs(one, name) for name in ("auto", "stock"))]
        if not both:
            continue
        winners = [_winner(other) for _, other in both]
        autos = [_runs(one, "auto") for one, _ in both]
        theirs = [_runs(other, winner) for (_, other), winner in zip(both, winners, strict=True)]
        stocks = [_runs(one, "stock") for one, _ in both]
        test = [one.labels["test"] for one, _ in both]
        metric = both[0][0].metric
        mean = [
            statistics.fmean(run.scores["test"][metric] for runs in every for run in runs.values())
            for every in (autos, theirs, stocks)
        ]
        means.append(mean)
        beside = [_gain(list(filter(None, map(gaps_between, autos, other, test)))) for other in (theirs, stocks)]
        shown = f"{score(mean[1])} ({', '.join(winners)})"
        rows.append((TITLES[task], score(mean[0]), shown, beside[0], score(mean[2]), beside[1]))
    if not rows:
        return NOT_YET
    ours, winner, stock = np.mean(means, axis=0)
    rows.append(("mean", score(ours), score(winner), signed(ours - winner), score(stock), signed(ours - stock)))
    heads = ("task", "auto", "winner of a comparison, by split", "auto − winner", "stock", "auto − stock")
    return table(heads, rows)


def table_of_confirmed(table: Table) -> str:
    """How often two further seeds confirmed the best trial against the defaults, and what each was worth on test."""
    rows = []
    for task, splits in read("tuned", TITLES).items():
        gains: dict[bool, list[float]] = {True: [], False: []}  # of the best trial over the defaults, by who was chosen
        same = 0
        for results in splits:
            for contender in results.contenders:
                if contender.rejected:
                    confirmed = contender.chosen != 0
                    gains[confirmed].append(_gained(contender, results.metric) * (1 if confirmed else -1))
                else:
                    same += contender.chosen == 0 and bool(contender.runs)
        if any(gains.values()):
            shown = [f"{len(own)}, {signed(statistics.fmean(own))}" if own else "0" for own in gains.values()]
            rows.append((TITLES[task], str(same), *shown))
    heads = (
        "task",
        "defaults are the best trial",
        "best trial confirmed, its gain on test",
        "rejected, its gain on test",
    )
    return table(heads, rows) if rows else NOT_YET


def table_of_tuning(table: Table) -> str:
    """What tuning gained over the defaults on test, by strategy and task; nothing where it chose the defaults."""
    tasks = read("tuned", TITLES)
    gains: dict[str, dict[str, list[float]]] = {}
    for task, splits in tasks.items():
        for results in splits:
            for contender in results.contenders:
                if contender.chosen == 0 or contender.rejected:
                    gained = 0.0 if contender.chosen == 0 else _gained(contender, results.metric)
                    gains.setdefault(contender.name, {}).setdefault(task, []).append(gained)
    means = {name: {task: statistics.fmean(own) for task, own in of.items()} for name, of in gains.items()}
    overall = {name: statistics.fmean(of.values()) for name, of in means.items()}
    rows = [
        (
            f"**{name}**" if name in FIVE else name,
            *(signed(means[name][task]) if task in means[name] else "" for task in tasks),
            signed(overall[name]),
        )
        for name in sorted(means, key=lambda name: (-round(overall[name], 9), name))
    ]
    return table(("strategy", *(TITLES[task] for task in tasks), "mean"), rows) if rows else NOT_YET


def _gained(contender: Contender, metric: str) -> float:
    """How much more the chosen settings scored on test than the rejected ones, with the same seeds."""
    seeds = {run.seed for run in contender.rejected}
    chosen = [run for run in contender.runs if run.seed in seeds]
    return _test(chosen, metric) - _test(contender.rejected, metric)


def _test(runs: Iterable[Training], metric: str) -> float:
    return statistics.fmean(run.scores["test"][metric] for run in runs if "test" in run.scores)


def _same(one: Results, other: Results) -> bool:
    """Whether two comparisons are of the same split."""
    return one.labels["test"] == other.labels["test"]


def _winner(results: Results) -> str:
    """The strategy with the highest mean validation score of its final runs, among those that train one network."""

    def mean(name: str) -> float:
        return statistics.fmean(run.validation or 0.0 for run in _runs(results, name).values())

    alone = [one for one in results.contenders if all(config["ft_type"] != "amcf" for config in one.configs)]
    names = sorted(contender.name for contender in alone if contender.finished_runs)
    return max(names, key=lambda name: round(mean(name), 9))


def _difference(tasks: Iterable[Sequence[Results]], name: str) -> str:
    """The difference from full fine-tuning, in the mean over tasks."""
    return _gain(*([found for one in splits if (found := gaps_of(one, name)) is not None] for splits in tasks))


def _gain(*tasks: Sequence[Gaps]) -> str:
    """The mean difference and its interval; nothing if there is a task without any."""
    if not all(tasks):
        return ""
    means = [np.mean([_balanced(*gaps) for gaps in splits]) for splits in tasks]
    low, high = interval_over_splits(*tasks)
    return f"{signed(float(np.mean(means)))} [{signed(low)}, {signed(high)}]"


def _balanced(gaps: np.ndarray, classes: np.ndarray) -> float:
    return float(np.mean([gaps[:, classes == label].mean() for label in np.unique(classes)]))


def _runs(results: Results, name: str) -> dict[int, Training]:
    found = next((contender for contender in results.contenders if contender.name == name), None)
    return {} if found is None else {run.seed: run for run in found.finished_runs}


def _of_splits(splits: Sequence[Results], name: str) -> str:
    """The splits that a score covers, unless all: splits differ, so only differences from full are comparable then."""
    there = [str(number) for number, results in enumerate(splits, 1) if _runs(results, name)]
    return f" (split{'s' * (len(there) > 1)} {', '.join(there)})" if len(there) < len(splits) else ""


def _scores(splits: Sequence[Results], name: str) -> list[float]:
    return [
        run.scores["test"][results.metric]
        for results in splits
        for run in _runs(results, name).values()
        if "test" in run.scores
    ]


def _mean(splits: Sequence[Results], name: str) -> float:
    return statistics.fmean(_scores(splits, name) or [0.0])


def _size(title: str, splits: Sequence[Results]) -> str:
    first = splits[0]
    sizes, seeds, pixels = first.data["sizes"], first.settings["seeds"], first.model["image_size"]
    return (
        f"{title}: {sizes['train']} training, {sizes['validation']} validation (to choose the epoch) and "
        f"{sizes['test']} test images, {pixels} px, {len(splits)} split{'s' * (len(splits) > 1)} with {seeds} seeds "
        "each."
    )
