"""Which decay an average of the weights needs in short training runs: `python tests/benchmarks/averages.py`.

Full fine-tuning at its recommended rate (AdamW, batches of 32), shorter and longer, under two schedules. Several
averages of the same weights are kept, so that one training run covers all decays; the warm-up is that of `ema`. Each is
evaluated on the test split at the end. Runs are kept in results/averages.jsonl; `--table` prints their means.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import transformers
from common import Entry, Runs, arguments, quiet
from rates import ADAM, BATCH, FAR, Bench, Task, scores
from transformers import PrinterCallback, TrainerCallback

from hf_ft import FTTrainer
from hf_ft.core.plan import Average
from hf_ft.engine.averaging import RunningAverage
from hf_ft.strategies.ema import WarmDecay

RESULTS = Path(__file__).parent / "results" / "averages.jsonl"
DECAYS = (0.0, 0.5, 0.8, 0.9, 0.99)  # 0: the weights themselves
RATE = 3e-4


class Averages(TrainerCallback):
    """Keeps averages of the weights, and evaluates them at the end."""

    def __init__(self, trainer: FTTrainer, test: Any) -> None:
        self.trainer, self.test, self.found = trainer, test, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        buffers = (name for name, buffer in model.named_buffers() if buffer.is_floating_point())
        names = [*(name for name, _ in model.named_parameters()), *buffers]
        self.averages = {decay: RunningAverage(model, names, Average(WarmDecay(decay))) for decay in DECAYS}
        for average in self.averages.values():
            average.start(0, self.trainer.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for decay, average in self.averages.items() if state.global_step == state.max_steps else ():
            live = [buffer.clone() for buffer in model.buffers()]
            with average.in_place():
                self.found[str(decay)] = self.scores()
                for buffer, value in zip(model.buffers(), live, strict=True):
                    buffer.copy_(value)
                self.found[f"{decay}, buffers copied"] = self.scores()

    def scores(self) -> list[float]:
        metrics = self.trainer.predict(self.test).metrics
        return [round(metrics[f"test_{name}"], 4) for name in ("accuracy", "log_loss")]


def run(bench: Bench, epochs: int, schedule: str, seed: int) -> Entry:
    transformers.set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        changes = {"optim": ADAM, "optim_args": None, "max_grad_norm": 1.0, "lr_scheduler_type": schedule}
        args = arguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            seed=seed,
            **changes,
        )
        data = {"train_dataset": bench.ready.splits["train"], "data_collator": bench.ready.collate}
        trainer = FTTrainer(bench.load(seed)[0], args, strategy="full", compute_metrics=scores, **data)
        trainer.remove_callback(PrinterCallback)
        averages = Averages(trainer, bench.ready.splits["test"])
        trainer.add_callback(averages)
        started = time.perf_counter()
        trainer.train()
    return {"seconds": time.perf_counter() - started, "steps": trainer.state.global_step, "scores": averages.found}


def table() -> None:
    """Print the means over the seeds."""
    runs: dict[tuple[str, ...], list[Entry]] = {}
    for entry in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        key = entry["task"], entry["model"], f"{entry['steps']} steps", entry["schedule"]
        runs.setdefault(key, []).append(entry)
    for key, entries in runs.items():
        print(*key, f"{len(entries)} seeds")
        for name in entries[0]["scores"]:
            means = [mean(entry["scores"][name][place] for entry in entries) for place in (0, 1)]
            print(f"  decay {name}: balanced accuracy {means[0]:.3f}, log loss {means[1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "mnist"], choices=list(FAR))
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2"])
    parser.add_argument("--schedules", nargs="+", default=["cosine", "constant"])
    parser.add_argument("--epochs", nargs="+", type=int, default=[12, 36])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if options.table:
        return table()
    quiet()
    runs = Runs(RESULTS, ("task", "model", "epochs", "schedule", "seed"))
    for model in options.models:
        for task in options.tasks:
            bench = Bench(Task(task, FAR[task][1]), model)
            for epochs, seed, schedule in product(options.epochs, options.seeds, options.schedules):
                key = {"task": task, "model": model, "epochs": epochs, "schedule": schedule, "seed": seed}
                runs.get(key, lambda e=epochs, s=schedule, n=seed, b=bench: run(b, e, s, n))  # type: ignore[misc]


if __name__ == "__main__":
    main()
