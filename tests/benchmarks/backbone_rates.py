"""What predicts the best learning rate of full fine-tuning: `python tests/benchmarks/backbone_rates.py FOLDER/cifar10`.

For each pair of a network and a task for which `rates.py` has a grid, three quantities are measured at the pretrained
weights with a new head:

- *sharpness*: the largest eigenvalue λ of the Hessian of the loss on 64 samples, by power iteration. Under SGD with
  momentum m, a quadratic loss is stable up to the rate 2 (1 + m) / λ. Under AdamW, λ is that of the Hessian scaled by
  Adam's own preconditioner, and the limit is 38 / λ (Cohen et al., 2022, arXiv:2207.14484).
- *stable*: the largest rate of a geometric grid at which the loss after 12 steps is lower than at the start.
- *fastest*: the rate of that grid with the lowest loss after 12 steps.

Each is converted to a rate by one factor per optimizer, fitted on the other pairs (the geometric mean of best /
quantity). These rates are compared with a constant fitted in the same way, and with the recommended rate: by the test
score that each loses relative to the best of the pair's grid, interpolated in the logarithm of the rate. The quantities
are kept in tests/benchmarks/results/backbone_rates.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import Entry, Runs, quiet
from rates import ADAM, BATCH, FAR, KINDS, NEAR, RESULTS, SGD, Bench, Task
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_ft import FullConfig
from hf_ft.data.rows import read_rows

FOUND = RESULTS.with_name("backbone_rates.jsonl")
STEPS, LAST, SAMPLES, ROUNDS = 12, 4, 64, 12
LEAST = 3  # rates of a grid
PROBED = {SGD: np.geomspace(1e-4, 1e-1, 7), ADAM: np.geomspace(3e-5, 3e-2, 7)}
MOMENTUM = 0.9
Pair = tuple[str, str]


def grids() -> dict[str, dict[Pair, dict[float, float]]]:
    """The test scores of full fine-tuning by rate, for each optimizer and pair, averaged over seeds."""
    rows: dict[str, dict[Pair, dict[float, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for entry in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        if entry["strategy"] == "full":
            rows[entry["optim"]][entry["model"], entry["task"]][entry["rate"]].append(entry["test"])
    return {
        optim: {
            pair: {rate: float(np.mean(found)) for rate, found in grid.items()}
            for pair, grid in pairs.items()
            if len(grid) >= LEAST
        }
        for optim, pairs in rows.items()
    }


class Start:
    """The loss of a network at its pretrained weights with a new head, on training samples."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.data = bench.ready.splits["train"]
        order = np.random.default_rng(0).permutation(len(self.data)).tolist()
        self.rows = (order * math.ceil(STEPS * BATCH / len(order)))[: STEPS * BATCH]

    def batch(self, rows: Sequence[int]) -> Any:
        return self.bench.ready.collate(read_rows(self.data, list(rows)))

    def model(self) -> Any:
        transformers.set_seed(1)
        return self.bench.load(1)[0].train()

    def sharpness(self, optim: str) -> float:
        """The largest eigenvalue of the Hessian; under AdamW, of the preconditioned one."""
        model, batch = self.model(), self.batch(self.rows[:SAMPLES])
        parameters = [p for p in model.parameters() if p.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
            found = torch.autograd.grad(model(**batch).loss, parameters, create_graph=True, allow_unused=True)
        used = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
        parameters, gradients = [p for p, _ in used], [g for _, g in used]
        scale = [torch.ones_like(p) for p in parameters]
        if optim == ADAM:  # the square root of Adam's denominator after its first step
            scale = [(g.detach().abs() + 1e-8).sqrt() for g in gradients]
        random = torch.Generator().manual_seed(0)
        vector = [torch.randn(p.shape, generator=random) for p in parameters]
        value = 0.0
        for _ in range(ROUNDS):
            norm = torch.sqrt(sum(((v**2).sum() for v in vector), torch.zeros(())))
            vector = [v / norm for v in vector]
            inner = sum(
                ((g * (v / s)).sum() for g, v, s in zip(gradients, vector, scale, strict=True)), torch.zeros(())
            )
            product = torch.autograd.grad(inner, parameters, retain_graph=True)
            product = tuple(p / s for p, s in zip(product, scale, strict=True))
            value = float(sum(((p * v).sum() for p, v in zip(product, vector, strict=True)), torch.zeros(())))
            vector = [p.detach() for p in product]
        return abs(value)

    def losses(self, optim: str, rate: float) -> list[float]:
        """The loss of each of a few steps at a constant rate."""
        model = self.model()
        made: Callable[..., Any] = torch.optim.AdamW if optim == ADAM else torch.optim.SGD
        more = {"weight_decay": 0.0} if optim == ADAM else {"momentum": MOMENTUM}
        optimizer = made(model.parameters(), lr=rate, **more)
        found = []
        for step in range(STEPS):
            loss = model(**self.batch(self.rows[step * BATCH : (step + 1) * BATCH])).loss
            loss.backward()
            if optim == ADAM:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found


def quantities(start: Start, optim: str) -> Entry:
    began = time.perf_counter()
    limit = 38.0 if optim == ADAM else 2 * (1 + MOMENTUM)
    sharp = limit / start.sharpness(optim)
    curves = {float(rate): start.losses(optim, float(rate)) for rate in PROBED[optim]}
    return {"sharpness": sharp, "curves": curves, "seconds": time.perf_counter() - began}


def predictors(found: Entry) -> dict[str, float]:
    """The rate that each quantity predicts, up to its factor."""
    late = {float(rate): float(np.mean(curve[-LAST:])) for rate, curve in found["curves"].items()}
    late = {rate: loss if math.isfinite(loss) else math.inf for rate, loss in late.items()}
    first = next(iter(found["curves"].values()))[0]
    stable = [rate for rate, loss in late.items() if loss < first]
    return {
        "sharpness": found["sharpness"],
        "stable": max(stable, default=min(late)),
        "fastest": min(late, key=late.__getitem__),
        "constant": 1.0,
    }


def lost(grid: dict[float, float], rate: float) -> float:
    """The test score that a rate loses relative to the best of a grid."""
    rates = sorted(grid)
    score = float(np.interp(math.log(rate), np.log(rates), [grid[r] for r in rates]))
    return max(grid.values()) - score


def table(optim: str, found: dict[Pair, Entry], scores: dict[Pair, dict[float, float]]) -> list[str]:
    """A line for each predictor: what it loses on each pair, with its factor fitted on the others."""
    quantity = {pair: predictors(entry) for pair, entry in found.items()}
    best = {pair: max(scores[pair], key=scores[pair].__getitem__) for pair in found}
    recommended = FullConfig.recommended["learning_rate"]
    lines = []
    for name in ("recommended", "constant", "sharpness", "stable", "fastest"):
        losses = []
        for pair in found:
            others = [other for other in found if other != pair]
            ratios = [] if name == "recommended" else [math.log(best[o] / quantity[o][name]) for o in others]
            family, batch_norm = KINDS[pair[0]]
            own = recommended.under(optim, batch_norm, family=family).value
            rate = own if name == "recommended" else quantity[pair][name] * math.exp(float(np.mean(ratios)))
            losses.append(lost(scores[pair], rate))
        each = " | ".join(f"{value:.3f}" for value in losses)
        lines.append(f"| {name} | {each} | {np.mean(losses):.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="*", help="natural tasks: " + ", ".join(NEAR))
    options = parser.parse_args()
    quiet()
    folders = {folder.name: folder for folder in options.folder}
    runs = Runs(FOUND, ("optim", "model", "task"))
    benches: dict[Pair, Start] = {}
    for optim, pairs in grids().items():
        found: dict[Pair, Entry] = {}
        for model, task in sorted(pairs):
            pixels = FAR[task][1] if task in FAR else NEAR[task]

            def make(model: str = model, task: str = task, pixels: int = pixels, optim: str = optim) -> Entry:
                if (model, task) not in benches:
                    benches[model, task] = Start(Bench(Task(task, pixels, folders.get(task)), model))
                return quantities(benches[model, task], optim)

            found[model, task] = runs.get({"optim": optim, "model": model, "task": task}, make)
        head = " | ".join(" ".join(pair) for pair in found)
        print(f"| {optim}: by | {head} | mean |\n{'| --- ' * (len(found) + 2)}|")
        print("\n".join(table(optim, found, pairs)))


if __name__ == "__main__":
    main()
