"""Which learning rate suits a linear head, and what predicts it: `python tests/benchmarks/head_rates.py FOLDER`.

FOLDER holds the image folders caltech40 and cifar10; the far tasks of rates.py are built in. The features of each
network and task are computed once; heads then train on them for 12 epochs (batches of 32, cosine, no weight decay;
three seeds) over a grid of rates, with SGD (momentum 0.9) and with AdamW, and at the rates that several rules give.
Scores are kept in tests/benchmarks/results/head_rates.jsonl; networks and tasks that are already there are not
repeated. The tables are written into docs/rates.md (with `--page` only that).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Entry, Runs, quiet
from rates import ADAM, FAR, NEAR, OWN_PIXELS, SGD, Bench, Task, markdown_table, write_tables
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_ft.core.head_rate import LOOKED_AT, STEP, HeadFit
from hf_ft.functional import feature_spread, head_curvature, stable_rate
from hf_ft.models.anatomy import anatomy
from hf_ft.models.head_layers import logit_layers

RESULTS = Path(__file__).parent / "results" / "head_rates.jsonl"
MODELS = ("mobilenet_v2", "efficientnet-lite0", "dinov2-small")
EPOCHS, BATCH, SEEDS = 12, 32, (0, 1, 2)
GRID = {
    SGD: (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1),
    ADAM: (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2),
}
# What a rate is computed from, given the features that are looked at.
MEASURES: dict[str, Callable[[Tensor], float]] = {
    "curvature": lambda f: float(head_curvature(f)),
    "centred curvature": lambda f: float(head_curvature(f - f.mean(dim=0))),
    "spread": lambda f: float(feature_spread(f)),
    "norm": lambda f: float(f.double().abs().sum(dim=1).mean()),
}
SPREAD, BOUND = "mean L1 distance from the mean", "the bound"
Rule = Callable[[Entry], float]


def step_of(size: float, measure: str) -> Rule:
    return lambda entry: size / entry[measure]


def part_of(fraction: float, measure: str) -> Rule:
    return lambda entry: fraction * stable_rate(entry[measure] / 2, 0.9)


RULES: dict[str, dict[str, Rule]] = {
    ADAM: {f"{size:g} / {SPREAD}": step_of(size, "spread") for size in (1, STEP, 4)}
    | {f"{size:g} / mean L1 norm": step_of(size, "norm") for size in (2, 4)}
    | {"0.003 for all": lambda entry: 3e-3, "0.005 for all": lambda entry: 5e-3},
    SGD: {f"half {BOUND}": part_of(0.5, "curvature"), BOUND: part_of(1, "curvature")}
    | {f"twice {BOUND}": part_of(2, "curvature")}
    | {f"{part:g} of the bound for centred features": part_of(part, "centred curvature") for part in (0.1, 0.25)}
    | {"0.01 for all": lambda entry: 1e-2},
}


def features_of(task: Task, model: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The head's inputs and the labels, of the training and the test split."""
    bench = Bench(task, model)
    network, _ = bench.load(0)
    (layer,) = logit_layers(network.eval(), anatomy(network).head.modules)
    seen: list[Tensor] = []
    network.get_submodule(layer).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(1)))
    found = {}
    for split in ("train", "test"):
        seen.clear()
        labels = []
        with torch.inference_mode():
            for batch in DataLoader(bench.ready.splits[split], batch_size=BATCH, collate_fn=bench.ready.collate):
                labels.append(batch["labels"])
                network(**batch)
        found[split] = (torch.cat(seen).clone(), torch.cat(labels).clone())
    return found


def probe(data: dict[str, tuple[Tensor, Tensor]], optim: str, rate: float) -> float:
    """The mean balanced test accuracy of a head trained on features, over the seeds."""
    (features, labels), (others, wanted) = data["train"], data["test"]
    classes, scores = int(labels.max()) + 1, []
    for seed in SEEDS:
        torch.manual_seed(seed)
        head = nn.Linear(features.shape[1], classes)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(head.parameters(), rate, momentum=0.9)
            if optim == SGD
            else torch.optim.AdamW(head.parameters(), rate, weight_decay=0.0)
        )
        steps = EPOCHS * math.ceil(len(labels) / BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(labels)).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(features[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            right = (head(others).argmax(dim=1) == wanted).double()
        scores.append(float(torch.stack([right[wanted == label].mean() for label in wanted.unique()]).mean()))
    return round(float(np.mean(scores)), 4)


def measured(task: Task, model: str) -> Entry:
    began = time.perf_counter()
    data = features_of(task, model)
    features, _ = data["train"]
    looked_at = features[torch.linspace(0, len(features) - 1, min(LOOKED_AT, len(features))).round().long()]
    entry: Entry = {name: round(measure(looked_at), 1) for name, measure in MEASURES.items()}
    entry["grid"] = {optim: {f"{rate:g}": probe(data, optim, rate) for rate in GRID[optim]} for optim in GRID}
    entry["rules"] = {
        optim: {name: probe(data, optim, rule(entry)) for name, rule in RULES[optim].items()} for optim in RULES
    }
    return entry | {"seconds": time.perf_counter() - began}


def tables(entries: list[Entry]) -> dict[str, str]:
    """The fitted rates with their scores beside the best of the grid, and what each rule loses, as Markdown."""
    rows, lost = [], {optim: {name: [] for name in RULES[optim]} for optim in RULES}
    own = {ADAM: f"{STEP:g} / {SPREAD}", SGD: BOUND}  # the rules in use
    for entry in entries:
        fit = HeadFit(entry["curvature"], entry["spread"])
        cells = [entry["task"], entry["model"], f"{entry['curvature']:.0f}", f"{entry['spread']:.0f}"]
        for optim in (ADAM, SGD):
            grid = entry["grid"][optim]
            best = max(grid, key=lambda rate: (grid[rate], -float(rate)))
            fitted = entry["rules"][optim][own[optim]]
            cells += [f"{fit.rate(optim):g}: {fitted:.3f}", f"{best}: {grid[best]:.3f}"]
            for name, score in entry["rules"][optim].items():
                lost[optim][name].append((entry["model"], grid[best] - score))
        rows.append(cells)
    heads = ("task", "model", "λ", "spread", "AdamW, fitted", "best", "SGD, fitted", "best")
    rules = []
    for optim, name in ((ADAM, "AdamW"), (SGD, "SGD")):
        for rule, losses in lost[optim].items():
            means = [np.mean([loss for model, loss in losses if model == one]) for one in MODELS]
            shown = f"**{rule}**" if rule == own[optim] else rule
            rules.append([name, shown, *(f"{mean:.3f}" for mean in means), f"{max(loss for _, loss in losses):.3f}"])
    return {
        "probes": markdown_table(heads, rows),
        "head rules": markdown_table(("optimizer", "rate", *MODELS, "largest"), rules),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the folder of the natural images")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/rates.md")
    options = parser.parse_args()
    runs = Runs(RESULTS, ("task", "model"))
    if not options.page:
        quiet()
        for model in options.models:
            for name, pixels in (NEAR | {name: pixels for name, (_, pixels) in FAR.items()}).items():
                folder = options.folder / name if name in NEAR else None
                task = Task(name, OWN_PIXELS.get(model, pixels), folder)
                runs.get({"task": name, "model": model}, partial(measured, task, model))
    entries = list(map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()))
    write_tables(tables(sorted(entries, key=lambda entry: (entry["task"], MODELS.index(entry["model"])))))


if __name__ == "__main__":
    main()
