"""How many draws a search over blocks needs: `python tests/benchmarks/block_draws.py --natural FOLDER`.

The tasks are those of results.py. Each candidate of `scheme="stage"` is trained eight times, as with
`BlockwiseConfig(search_seeds=8)`: each time, a different quarter of the training samples is held out. The script prints
how often the mean over 1, 2 or 4 of the draws, by accuracy or by log loss, finds the candidate with the best mean
accuracy over all eight, and how much lower the accuracy of the candidate found is. Scores are kept in
tests/benchmarks/results/block_draws.jsonl; tasks that are already there are not searched again.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import transformers
from common import Entry, Runs, arguments, quiet
from rates import ADAM
from results import TASKS, far, natural

from hf_ft import BlockwiseConfig, FTTrainer
from hf_ft.core.compose import recommended_arguments
from hf_ft.data.classifier import load_classifier
from hf_ft.data.task import process

RESULTS = Path(__file__).parent / "results" / "block_draws.jsonl"
DRAWS = 8
ACCURACY, LOSS = "balanced_accuracy", "loss"
CONFIG = BlockwiseConfig(storage="memory", search_seeds=DRAWS, baselines=False, batch_norm_momentum=0.1)


def searched(name: str, split: int, metric: str, folder: Path | None) -> Entry:
    """The scores of each candidate, one per draw; losses are negated."""
    task, config = TASKS[name], replace(CONFIG, metric=metric)
    data = natural(folder, name, task, split) if task.pixels > 64 and folder else far(name, task, split)
    data = replace(data, source=None, source_columns=None)
    transformers.set_seed(1)
    model, processor = load_classifier(task.model, data.columns, 1, task.pixels)
    ready = process(data, model, processor, in_memory=True)
    rate = recommended_arguments([config], ADAM, model)["learning_rate"].value
    with tempfile.TemporaryDirectory() as out:
        more = {"optim": ADAM, "optim_args": None, "max_grad_norm": 1.0, "learning_rate": rate, "seed": 1}
        args = arguments(out, num_train_epochs=task.epochs, **more)
        trainer = FTTrainer(
            model, args, strategy=config, train_dataset=ready.splits["train"], data_collator=ready.collate
        )
        began = time.perf_counter()
        found = config.scores(trainer.measure()["blockwise"])
    scores = {one.candidate.name: [round(score, 3) for score in one.scores] for one in found.scores}
    return {"scores": scores, "seconds": time.perf_counter() - began}


def table(entries: list[Entry]) -> str:
    """Means over tasks and splits, for each metric and number of draws."""
    true = {
        (entry["task"], entry["split"]): _scores(entry).mean(axis=1) for entry in entries if entry["metric"] == ACCURACY
    }
    lines = ["| ranked by | draws | finds the best | accuracy below it |", "| --- | --- | --- | --- |"]
    for metric, number in itertools.product((ACCURACY, LOSS), (1, 2, 4)):
        right, lost = [], []
        for entry in (entry for entry in entries if entry["metric"] == metric):
            scores, best = _scores(entry), true[entry["task"], entry["split"]]
            for some in itertools.combinations(range(DRAWS), number):
                chosen = scores[:, some].mean(axis=1).argmax()
                right.append(chosen == best.argmax())
                lost.append(best.max() - best[chosen])
        if right:
            lines.append(f"| {metric} | {number} | {np.mean(right):.0%} | {np.mean(lost):.3f} |")
    return "\n".join(lines)


def _scores(entry: Entry) -> np.ndarray:
    """(candidates, draws)"""
    return np.array(list(entry["scores"].values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--natural", type=Path, help="the folder of the natural images")
    parser.add_argument("--tasks", nargs="+", default=["cifar10", "mnist_200"], choices=list(TASKS))
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    quiet()
    runs = Runs(RESULTS, ("task", "split", "metric"))
    for metric, name, split in itertools.product((ACCURACY, LOSS), options.tasks, options.splits):
        key = {"task": name, "split": split, "metric": metric}
        runs.get(key, lambda n=name, s=split, m=metric: searched(n, s, m, options.natural))  # type: ignore[misc]
    print(table(list(runs.found.values())))


if __name__ == "__main__":
    main()
