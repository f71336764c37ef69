"""What the search over frozen layers costs, as ratios in one run: `python tests/benchmarks/swarm.py`.

Two MobileNetV2 at 64 px, 200 images of MNIST (150 for training, 50 for scores), batch 32, SGD with momentum, CPU; the
paper's budget: 10 particles, 5 moves, 5 epochs.

- search: as implemented. Every distinct position is trained once, and starts from recorded activations.
- floor: only the training steps and scoring passes of the same positions, from activations that already exist.
- uncached: the same search, with every forward pass starting from the pixels.
- authors: every particle of every generation is trained anew, from the pixels.
- cheaper (`--cheaper`, instead of these): halving, fewer epochs, patience; the epochs that they train, and the score of
  what they find, trained for as long as in the whole search. Nothing is timed.
- gap (`--gap`, likewise): the largest difference between the validation loss after any epoch from recorded activations
  and from the pixels, over twelve positions. Accuracy alone would hide small differences.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import Cells, channels_last
from common import quiet, ready

from hf_ft import AMCFConfig, FTTrainer, SwarmScores, SwarmSearch
from hf_ft.engine.short_training import _epoch
from hf_ft.splits import stratified_split
from hf_ft.strategies.amcf.swarm import begin
from hf_ft.testing.training import tiny_arguments
from hf_ft.zoo.datasets import mnist5k
from hf_ft.zoo.sources import load_sources

IMAGES, BATCH = 200, 32
CONFIG = AMCFConfig(storage="memory", validation=0.25, norm_mode="auto")
CHEAPER = {
    "halving": {"halving": True},
    "2 epochs": {"search_epochs": 2},
    "patience 2": {"patience": 2},
    "2 epochs, patience 2": {"search_epochs": 2, "patience": 2},
}


def searching(model: Any, data: Cells, config: AMCFConfig, cache: str) -> SwarmSearch:
    """A prepared search; nothing is trained or recorded yet."""
    args = tiny_arguments(
        tempfile.mkdtemp(),
        optim="sgd",
        optim_args="momentum=0.9",
        learning_rate=0.01,
        weight_decay=5e-4,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        per_device_train_batch_size=BATCH,
        remove_unused_columns=False,
    )
    trainer = FTTrainer(
        model, args, strategy=config, train_dataset=data, data_collator=channels_last, frozen_cache=cache
    )
    return SwarmSearch(model, config, trainer.context(), progress=False)


def timed(search: SwarmSearch) -> tuple[float, SwarmScores]:
    began = time.perf_counter()
    found = search.run()
    return time.perf_counter() - began, found


def authors(search: SwarmSearch, scores: SwarmScores) -> float:
    """The seconds it takes to train every particle of every generation anew."""
    began = time.perf_counter()
    for generation in scores.generations:
        for position in generation.integers():
            search.trainings.train(search._start(position), 0)
    return time.perf_counter() - began


def floor(search: SwarmSearch, scores: SwarmScores) -> float:
    """The seconds of the steps and scoring passes of all distinct positions; all else is done before timing."""
    trainings, total = search.trainings, 0.0
    recipe, batches = search.context.recipe, trainings._batches
    for evaluation in scores.evaluations:
        run = search._start(evaluation.position)
        objective = run.objective(recipe.task_loss)
        objective.enter(run.plan.stages[0])
        batches.follow(objective)
        optimizer = recipe.optimizer(run.param_groups(recipe.learning_rate, recipe.weight_decay))
        for epoch in range(CONFIG.search_epochs):
            train_rows, held = trainings.rows(0)
            chunks = _epoch(train_rows, recipe, 0, epoch, run.model)
            steps = [batches.take(rows) for rows in chunks]
            scored = [batches.take(held[i : i + BATCH]) for i in range(0, len(held), BATCH)]
            objective.train()
            began = time.perf_counter()
            for batch in steps:
                objective(**batch)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
            objective.eval()
            with torch.no_grad():
                for batch in scored:
                    objective(**batch)
            total += time.perf_counter() - began
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--cheaper", action="store_true")
    parser.add_argument("--gap", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "swarm.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    model, processor = load_sources(["mobilenet_v2", "mobilenet_v2"], num_labels=10, image_size=64)
    data = ready(stratified_split(mnist5k(), IMAGES, 0, 0), processor)["train"]
    config = dataclasses.replace(CONFIG, particles=options.particles)
    searching(model, data, dataclasses.replace(config, particles=1, iterations=1), "always").run()  # warms up
    if options.gap:
        write(options.out, gap(model, data, dataclasses.replace(config, metric="loss")))
        return
    cached, plain = searching(model, data, config, "always"), searching(model, data, config, "never")
    seconds: dict[str, float] = {}
    seconds["search"], scores = timed(cached)
    print(f"best {scores.best.position}: {scores.best.score:.3f}; {len(scores.evaluations)} positions", flush=True)
    if options.cheaper:
        whole = {"position": list(scores.best.position), "score": scores.best.score, "epochs": _epochs(scores)}
        write(options.out, {"whole": whole, **cheaper(model, data, config, cached)})
        return
    seconds["floor"] = floor(cached, scores)
    seconds["uncached"], other = timed(plain)
    gaps = [abs(a.score - b.score) for a, b in zip(scores.evaluations, other.evaluations, strict=True)]
    seconds["authors"] = authors(plain, scores)
    entry: dict[str, Any] = {"best": scores.best.score, "position": list(scores.best.position)}
    entry["largest_gap"] = max(gaps)
    entry |= {
        "positions": len(scores.evaluations),
        "visits": scores.visits,
        "recording_passes": cached.trainings.recordings.passes,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "ratios": {
            f"search / {name}": seconds["search"] / value for name, value in seconds.items() if name != "search"
        },
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    write(options.out, entry)


def cheaper(model: Any, data: Cells, config: AMCFConfig, judge: SwarmSearch) -> dict[str, Any]:
    """The epochs and results of the cheaper searches; what each finds is trained as long as in the whole one."""
    found: dict[str, Any] = {}
    for name, changes in CHEAPER.items():
        scores = searching(model, data, dataclasses.replace(config, **changes), "always").run()
        position = scores.best.position
        judged = max(judge.trainings.train(judge._start(position), 0))
        found[name] = {"position": list(position), "score": judged, "epochs": _epochs(scores)}
        print(name, found[name], flush=True)
    return found


def gap(model: Any, data: Cells, config: AMCFConfig) -> dict[str, Any]:
    """Losses after each epoch for some positions, trained from recorded activations and from the pixels."""
    searches = [searching(model, data, config, use) for use in ("always", "never")]
    found = []
    for position in begin(searches[0].layers, 12, 0).integers():
        one, other = (search.trainings.train(search._start(position), 0) for search in searches)
        found.append(max(abs(a - b) for a, b in zip(one, other, strict=True)))
        print(position, found[-1], flush=True)
    return {"positions": len(found), "equal": sum(value == 0 for value in found), "largest_gap_of_loss": max(found)}


def _epochs(scores: SwarmScores) -> int:
    return sum(evaluation.epochs for evaluation in scores.evaluations)


def write(file: Path, entry: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()
