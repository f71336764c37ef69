"""Step times as ratios, measured in one run: `python tests/benchmarks/steps.py`.

Two trainers take one step each in turn, in random order, on one batch; the figure is the median of the ratios of these
pairs, with a bootstrap 95 % interval of that median. The first row compares a trainer with itself: no ratio is more
accurate than that row's distance from 1. Terms that compare with the original model are timed with its states computed
in every step, and with them recorded. A step of soft fine-tuning, with as many source as target samples, is compared
with a plain one on twice as many samples and, once its weight is 0, with a plain one. The last row compares whole
training runs of ten epochs: TRED's disentangling, including the pass that records the features, with full fine-tuning.

Geometry: ResNet-18 (11 M parameters), 96 px, batch 32, SGD with momentum, float32, CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from stepper import BATCH, GEOMETRY, Images, Stepper, compare, resnet18
from transformers.utils import logging

from hf_ft import (
    AttentionTransferConfig,
    BSSConfig,
    DELTAConfig,
    FTTrainer,
    L2SPConfig,
    Plan,
    SoftConfig,
    Term,
    TREDConfig,
)
from hf_ft.core.config import FTConfig, register
from hf_ft.testing.training import tiny_arguments


class UsualLoop:
    """L2-SP as it is usually implemented: a loop over the parameters."""

    def __call__(self, view):
        starts = dict(zip(map(id, view.weights(("",))), view.starts(("",)), strict=True))
        return 0.5 * sum(((p - starts[id(p)]) ** 2).sum() for p in view.model.parameters())


@register("usual_loop")
class UsualLoopConfig(FTConfig):
    """For comparison only."""

    def plan(self, model, state):
        return Plan(terms=(Term("usual", UsualLoop(), weight=0.01, anchors=("",)),))


def disentangling(folder: str, epochs: int = 10, images: int = 320, repeats: int = 3) -> dict[str, float]:
    """Ratios of the time of TRED's disentangling to full fine-tuning of as many epochs, alternating."""
    ratios, seconds = [], []
    data = Images(images)
    for _ in range(repeats):
        taken = []
        for strategy in ("full", TREDConfig(epochs=epochs)):
            args = tiny_arguments(folder, max_steps=-1, num_train_epochs=epochs, per_device_train_batch_size=BATCH,
                                  optim="sgd", logging_strategy="no", remove_unused_columns=False)  # fmt: skip
            trainer = FTTrainer(resnet18(), args, strategy=strategy, train_dataset=data)
            started = time.perf_counter()
            if strategy == "full":
                trainer.train()
            else:
                trainer._states()
            taken.append(time.perf_counter() - started)
        ratios.append(taken[1] / taken[0])
        seconds.append(taken[0])
    return {"ratio": float(np.median(ratios)), "low": min(ratios), "high": max(ratios),
            "base_seconds": float(np.median(seconds))}  # fmt: skip


def show(name: str, found: dict[str, float]) -> None:
    met = (
        ""
        if found["goal"] is None
        else f"   goal {found['goal']}: {'met' if found['low'] <= found['goal'] else 'MISSED'}"
    )
    print(f"{name:58s} {found['ratio']:.3f}  [{found['low']:.3f}, {found['high']:.3f}]{met}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--only", default="", help="only rows whose name contains this; the others are kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "steps.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    delta = DELTAConfig(weights="uniform")  # channel weights cost one more multiplication
    rows = {
        "full / full (A/A)": (None, None, "full", "full"),
        "FTTrainer full / stock Trainer": (1.03, None, None, "full"),
        "L2-SP / full": (1.03, None, "full", L2SPConfig()),
        "L2-SP as a loop over parameters / full": (None, None, "full", UsualLoopConfig()),
        "linear probe / full": (None, None, "full", "linear_probe"),
        "BSS / full": (1.02, None, "full", BSSConfig()),
        "DELTA / full": (1.35, False, "full", delta),
        "DELTA, recorded reference / full": (1.10, True, "full", delta),
        "attention transfer / full": (1.35, False, "full", AttentionTransferConfig()),
        "attention transfer, recorded reference / full": (1.10, True, "full", AttentionTransferConfig()),
        "TRED, branches / full": (1.35, False, "full", TREDConfig(epochs=1)),
        "TRED, branches, recorded reference / full": (1.10, True, "full", TREDConfig(epochs=1)),
        "TRED, mask, recorded reference / full": (1.10, True, "full", TREDConfig(epochs=1, disentangler="mask")),
    }
    results = json.loads(options.output.read_text())["rows"] if options.only and options.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (goal, recorded, one, other) in rows.items():
            if options.only in name:
                found = compare(Stepper(one, folder), Stepper(other, folder, bool(recorded)), options.pairs)
                results[name] = {**found, "goal": goal}
                show(name, results[name])
        for schedule, name, goal, batch in (
            ("constant", "soft, 32 + 32 samples / full on 64", 1.05, 2 * BATCH),
            ("linear", "soft once its weight is 0 / full", 1.02, BATCH),  # where the steppers are: at the run's end
        ):
            if options.only in name:
                soft = Stepper(SoftConfig(schedule=schedule, norm_mode="auto"), folder)
                results[name] = {**compare(Stepper("full", folder, batch=batch), soft, options.pairs), "goal": goal}
                show(name, results[name])
        name = "disentangling of TRED / full fine-tuning, 10 epochs each"
        if options.only in name:
            results[name] = {**disentangling(folder), "goal": 0.5}
            show(name, results[name])
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    about |= {"processor": platform.processor() or platform.machine(), "pairs": options.pairs}
    about["geometry"] = GEOMETRY
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"about": about, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
