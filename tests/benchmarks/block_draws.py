"""How many draws a search over blocks needs: `python tests/benchmarks/block_draws.py --natural FOLDER`.

The tasks are those of results.py. Each candidate of `scheme="stage"` is trained eight times, as with
`BlockwiseConfig(search_seeds=8)`: each time, a different quarter of the training samples is held out. The script prints
how often the mean over 1, 2 or 4 of these eight scores, over all choices of that many draws, finds the candidate with
the best mean over all eight, and how far the found candidate's mean over all eight is below the best. Scores are kept
in tests/benchmarks/results/block_draws.jsonl; tasks that are already there are not searched again.
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
CONFIG = BlockwiseConfig(
    metric="balanced_accuracy", storage="memory", search_seeds=DRAWS, baselines=False, batch_norm_momentum=0.1
)


def searched(name: str, split: int, folder: Path | None) -> Entry:
    """The scores of each candidate, one per draw."""
    task = TASKS[name]
    data = natural(folder, name, task, split) if task.pixels > 64 and folder else far(name, task, split)
    data = replace(data, source=None, source_columns=None)
    transformers.set_seed(1)
    model, processor = load_classifier(task.model, data.columns, 1, task.pixels)
    ready = process(data, model, processor, in_memory=True)
    rate = recommended_arguments([CONFIG], ADAM, model)["learning_rate"].value
    with tempfile.TemporaryDirectory() as out:
        more = {"optim": ADAM, "optim_args": None, "max_grad_norm": 1.0, "learning_rate": rate, "seed": 1}
        args = arguments(out, num_train_epochs=task.epochs, **more)
        trainer = FTTrainer(
            model, args, strategy=CONFIG, train_dataset=ready.splits["train"], data_collator=ready.collate
        )
        began = time.perf_counter()
        found = CONFIG.scores(trainer.measure()["blockwise"])
    scores = {one.candidate.name: [round(score, 3) for score in one.scores] for one in found.scores}
    return {"scores": scores, "seconds": time.perf_counter() - began}


def table(entries: list[Entry]) -> str:
    """Means over tasks and splits, for each number of draws."""
    lines = ["| draws | finds the best of 8 draws | below it |", "| --- | --- | --- |"]
    for number in (1, 2, 4):
        right, lost = [], []
        for entry in entries:
            scores = np.array(list(entry["scores"].values()))  # (candidates, draws)
            best = scores.mean(axis=1)
            for some in itertools.combinations(range(DRAWS), number):
                chosen = scores[:, some].mean(axis=1).argmax()
                right.append(chosen == best.argmax())
                lost.append(best.max() - best[chosen])
        lines.append(f"| {number} | {np.mean(right):.0%} | {np.mean(lost):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--natural", type=Path, help="the folder of the natural images")
    parser.add_argument("--tasks", nargs="+", default=["cifar10", "mnist_200"], choices=list(TASKS))
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    quiet()
    runs = Runs(RESULTS, ("task", "split"))
    for name, split in itertools.product(options.tasks, options.splits):
        runs.get({"task": name, "split": split}, lambda n=name, s=split: searched(n, s, options.natural))  # type: ignore[misc]
    print(table(list(runs.found.values())))


if __name__ == "__main__":
    main()
