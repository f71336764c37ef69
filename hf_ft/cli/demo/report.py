"""The output of ``hf-ft demo``: a table, its files, a plot, and a checkpoint of the winner."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict

from hf_ft.cli.console import count, say, table
from hf_ft.cli.models import usage
from hf_ft.core.config import config_class
from hf_ft.core.context import State
from hf_ft.version import __version__
from hf_ft.zoo.datasets import DATA_NOTICES

MADE_BY = "hf-ft demo"


@dataclass(frozen=True)
class Trained:
    """A training of one strategy with one seed."""

    strategy: str
    seed: int
    best_epoch: int
    validation: dict[str, float]
    test: dict[str, float]
    seconds: float
    parameters: int
    folder: Path
    search: dict[str, Any] | None = None  # the scores of a block search


SPLITS = ("validation", "test")
SCORES = ("accuracy", "balanced_accuracy", "standard_error")


@dataclass(frozen=True)
class Summary:
    """One strategy over all seeds: means, and standard deviations if there are several seeds."""

    strategy: str
    runs: tuple[Trained, ...]

    def mean(self, get: Callable[[Trained], float]) -> float:
        return float(np.mean([get(run) for run in self.runs]))

    def std(self, get: Callable[[Trained], float]) -> float | None:
        return float(np.std([get(run) for run in self.runs], ddof=1)) if len(self.runs) > 1 else None

    def shown(self, get: Callable[[Trained], float], form: str = ".3f") -> str:
        std = self.std(get)
        return f"{self.mean(get):{form}}" + ("" if std is None else f" ± {std:{form}}")

    @property
    def best(self) -> Trained:
        return max(self.runs, key=lambda run: run.validation["balanced_accuracy"])


def summaries(runs: Sequence[Trained]) -> list[Summary]:
    """One summary per strategy, in training order."""
    names = dict.fromkeys(run.strategy for run in runs)
    return [Summary(name, tuple(run for run in runs if run.strategy == name)) for name in names]


def winner_of(found: Sequence[Summary]) -> Summary:
    """The best strategy by validation; ties are won by the faster one."""
    return max(found, key=lambda s: (s.mean(_score("validation")), -s.mean(lambda run: run.seconds)))


def _score(split: str, name: str = "balanced_accuracy") -> Callable[[Trained], float]:
    return lambda run: getattr(run, split)[name]


def finish(
    runs: Sequence[Trained],
    folder: Path,
    flags: argparse.Namespace,
    size: int,
    splits: DatasetDict,
    seconds: float,
) -> None:
    """Print and save the results, and save the winner's best model in ``folder/best``."""
    found = summaries(runs)
    winner = winner_of(found)
    winner.best.folder.rename(folder / "best")
    shutil.rmtree(folder / "work")
    title = f"{flags.model} on ELPV: {len(splits['train'])} training images, {flags.epochs} epochs, {size} px"
    rows = [_row(summary) for summary in found]
    _print_table(rows, [summary is winner for summary in found])
    content = {
        "made_by": MADE_BY,
        "finished": True,
        "hf_ft_version": __version__,
        **{name: getattr(flags, name) for name in ("model", "epochs", "seeds")},
        "image_size": size,
        "images": {name: len(split) for name, split in splits.items()},
        "data": DATA_NOTICES["elpv"],
        "winner": winner.strategy,
        "seconds": round(seconds, 1),
        "strategies": {summary.strategy: _entry(summary) for summary in found},
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(_markdown(title, rows, winner, splits), encoding="utf-8")
    plot(found, winner, title, folder / "plot.png")
    example = splits["test"][0]
    example["image"].save(folder / "example.png")
    truth = splits["test"].features["label"].int2str(example["label"])
    say(table([("*", _verdict(winner, splits))]) + "\n")
    plots = ["plot.png", *_plot_blocks(found, folder)]
    say(f"Done in {seconds:.0f} s. In {folder}: best/ (the winner), {', '.join(plots)}, results.md, results.json.")
    say(f"Load the winner with plain Transformers (the example is a {truth} cell):\n")
    say(usage(folder / "best", "image", str(folder / "example.png")))


HEADERS = (
    "strategy",
    "valid. accuracy",
    "valid. balanced",
    "test accuracy",
    "test balanced",
    "seconds",
    "weights trained",
)


def _plot_blocks(found: Sequence[Summary], folder: Path) -> list[str]:
    """Print the result of a block search and plot its scores."""
    config: Any = config_class("blockwise")()
    searches = [State(info={"scores": run.search}) for summary in found for run in summary.runs[:1] if run.search]
    for state in searches:
        best = config.scores(state).best.candidate
        say(
            table([("blocks", f"the search chose {best.name} (quarter {best.quarter} of the depth): blocks.png")])
            + "\n"
        )
        config.findings(state).plots["blocks.png"](folder / "blocks.png")
    return ["blocks.png"] if searches else []


def _row(summary: Summary) -> tuple[str, ...]:
    return (
        summary.strategy,
        summary.shown(_score("validation", "accuracy")),
        summary.shown(_score("validation")),
        summary.shown(_score("test", "accuracy")),
        summary.shown(_score("test")),
        summary.shown(lambda run: run.seconds, ".0f"),
        count(summary.runs[0].parameters),
    )


def _print_table(rows: Sequence[Sequence[str]], best: Sequence[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)  # fits into 80 columns
    for i, header in enumerate(HEADERS):
        shown.add_column(header.replace(" ", "\n"), justify="right" if i else "left")
    for row, wins in zip(rows, best, strict=True):
        cells = [cell.replace(" ± ", "\n± ") for cell in row]
        shown.add_row(cells[0] + (" *" if wins else ""), *cells[1:], style="bold green" if wins else "")
    say()
    Console().print(shown)
    say()


def _verdict(winner: Summary, splits: DatasetDict) -> str:
    errors = {
        split: f"±{winner.mean(_score(split, 'standard_error')):.3f} on {split} ({len(splits[split]):,})"
        for split in SPLITS
    }
    several = len(winner.runs) > 1
    return (
        f"Winner by validation: {winner.strategy}, test balanced accuracy {winner.shown(_score('test'))}. "
        + (f"Shown is mean ± std of {len(winner.runs)} seeds. " if several else "")
        + f"One standard error from so few images is {errors['validation']} and {errors['test']}: smaller "
        + ("differences mean little." if several else "differences mean little; `--seeds 3` tells more.")
    )


def _entry(summary: Summary) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for split in SPLITS:
        for name in SCORES:
            measured[f"{split}_{name}"] = summary.mean(_score(split, name))
            if name != "standard_error" and len(summary.runs) > 1:
                measured[f"{split}_{name}_std"] = summary.std(_score(split, name))
    runs = [{k: v for k, v in asdict(run).items() if k not in ("folder", "strategy")} for run in summary.runs]
    measured["seconds"] = summary.mean(lambda run: run.seconds)
    return measured | {"parameters_trained": summary.runs[0].parameters, "runs": runs}


def _markdown(title: str, rows: Sequence[Sequence[str]], winner: Summary, splits: DatasetDict) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADERS, ["---"] * len(HEADERS), *rows)]
    verdict = _verdict(winner, splits)
    return "\n".join([f"# {title}", "", *lines, "", verdict, "", "![plot](plot.png)", "", DATA_NOTICES["elpv"], ""])


def plot(found: Sequence[Summary], winner: Summary, title: str, file: Path) -> None:
    """Plot validation and test balanced accuracy of each strategy, with one standard error."""

    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(figsize=(8, 1.4 + 0.75 * len(found)), layout="constrained")
    for split, offset, color, fill in (("validation", 0.14, "#7f8fa6", "white"), ("test", -0.14, "#c0392b", None)):
        means = [summary.mean(_score(split)) for summary in found]
        errors = [s.std(_score(split)) or s.mean(_score(split, "standard_error")) for s in found]
        places = np.arange(len(found))[::-1] + offset
        style: dict[str, Any] = {"marker": "o", "markersize": 7, "color": color, "markerfacecolor": fill or color}
        axes.errorbar(means, places, xerr=errors, linestyle="none", capsize=3, label=split, **style)
        for mean, place, error in zip(means, places, errors, strict=True):
            axes.annotate(f"{mean:.3f}", (mean + error, place), (6, -3), textcoords="offset points", fontsize=8)
    names = [f"{s.strategy}{' *' if s is winner else ''}\n{s.mean(lambda run: run.seconds):.0f} s" for s in found]
    axes.set_yticks(np.arange(len(found))[::-1], names)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.margins(x=0.12)
    several = len(found[0].runs) > 1
    axes.set_xlabel(
        f"balanced accuracy, ± {'std over seeds' if several else 'one standard error'} (* best on validation)"
    )
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
