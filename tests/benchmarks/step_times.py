"""Step time and peak memory of every strategy: `python tests/benchmarks/step_times.py`.

A row is a strategy in one of its stages; "recorded" means that the frozen part's or the reference model's output was
computed once before, "live" that every step computes it. A trainer held in that stage, full fine-tuning, and the row's
floor (`floors.py`: a loop in plain torch that does only the necessary passes) take one step each in turn, in random
order; the figures are medians of the ratios of these rounds, with bootstrap 95 % intervals. If the step is very short,
it and its floor take a hundred times as many rounds by themselves. The row of full fine-tuning compares it with itself:
no ratio is more accurate than that row's distance from 1.

Peak memory is measured in a separate process per row: the peak of resident memory during the steps, above what was
resident before the trainer was created. It includes copies of the model, recorded rows, momentum, gradients and
activations, but not what a strategy needs for measurements before training.

Geometry: ResNet-18 (11 M parameters), 96 px, batch 32, SGD with momentum, float32, CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import stepper
import torch
import transformers
from floors import Floor, FloorStepper
from stepper import GEOMETRY, Images, Linear, Stepper, in_turns, ratio, resnet18
from torch import nn
from transformers.utils import logging

from hf_ft import (
    AMCFConfig,
    BlockwiseConfig,
    ChildTuningConfig,
    CollaborativeModel,
    DELTAConfig,
    GradualUnfreezingConfig,
    PEFTConfig,
    SoftConfig,
    TREDConfig,
)
from hf_ft.core.config import strategies

FULL = "full"
SHORT, MORE = 0.05, 100  # of a step of full fine-tuning; rounds more
STEPS = 3  # over which the peak is taken


@dataclass(frozen=True)
class Row:
    """A strategy in one of its stages.

    Attributes:
        name: as shown; the strategy's name, and after a colon what distinguishes its rows.
        strategy: None for the Trainer of Transformers.
        floor: what a step cannot do without; None for a strategy that computes every layer or block twice.
        recorded: whether the frozen part, or the reference, is recorded.
        steps: of the whole run.
        at: the step of the run that is repeated.
        members: models that train together; 0 for a plain one, -1 for a linear layer on features.
    """

    name: str
    strategy: Any
    floor: Floor | None = field(default_factory=Floor)
    recorded: bool = False
    steps: int = 1
    at: int = 0
    members: int = 0

    def stepper(self, folder: str) -> Stepper:
        model: nn.Module | None = None
        data = None
        if self.members > 0:
            model = CollaborativeModel.from_members([resnet18() for _ in range(self.members)])
        elif self.members < 0:
            width = stepper.WIDTHS[-1]
            model, data = Linear(width), Images(stepper.BATCH, "features", (width,))
        return Stepper(self.strategy, folder, self.recorded, steps=self.steps, at=self.at, model=model, data=data)


def live_and_recorded(name: str, strategy: Any, floor: dict[str, Any], what: str, **where: Any) -> tuple[Row, Row]:
    """Two rows: with the frozen part computed in every step, and recorded."""
    sign = "," if ":" in name else ":"
    return (
        Row(f"{name}{sign} live", strategy, Floor(**floor), **where),
        Row(f"{name}{sign} recorded {what}", strategy, Floor(**floor, recorded=True), True, **where),
    )


def referred(name: str, strategy: Any, **floor: Any) -> tuple[Row, Row]:
    """Two rows: with a reference model that runs in every step, and with its states recorded."""
    sign = "," if ":" in name else ":"
    return (
        Row(f"{name}{sign} live reference", strategy, Floor(**floor, references=1)),
        Row(f"{name}{sign} recorded reference", strategy, Floor(**floor), True),
    )


HEAD = {"trains_from": "head"}
GRADUAL = GradualUnfreezingConfig(stages=4)
ROWS = (
    Row(FULL, FULL),
    Row("(stock Trainer): all layers", None),
    Row("(stock Trainer): linear layer on features", None, Floor("head", recorded=True), members=-1),
    *live_and_recorded("linear_probe", "linear_probe", HEAD, "features"),
    *live_and_recorded("lp_ft: probe", "lp_ft", HEAD, "features", steps=2),
    Row("lp_ft: fine-tuning", "lp_ft", Floor(norms="eval"), steps=2, at=1),
    *live_and_recorded("gradual_unfreezing: first stage (head)", GRADUAL, HEAD, "features", steps=4),
    Row("gradual_unfreezing: last stage (all)", GRADUAL, steps=4, at=3),
    Row("layer_decay", "layer_decay"),
    Row("fine_tune: second cycle (all)", "fine_tune", steps=5, at=1),
    Row("auto_rgn", "auto_rgn"),
    Row("child_tuning: F", ChildTuningConfig(mode="F")),
    *live_and_recorded("blockwise: last quarter", BlockwiseConfig(block="last_quarter"), {"trains_from": "stage3"},
                       "activations"),
    Row("l2_sp", "l2_sp"),
    Row("bss", "bss"),
    Row("bi_tuning", "bi_tuning", Floor(references=1)),
    Row("stoch_norm", "stoch_norm"),
    Row("spot_tune", "spot_tune", None),
    Row("ada_filter", "ada_filter", None),
    Row("bitfit", "bitfit", Floor(trains="biases")),
    Row("norms_only", "norms_only", Floor(trains="norms")),
    Row("peft", PEFTConfig(merge=False), Floor(trains="lora", norms="eval")),
    Row("ema", "ema"),
    Row("daft", "daft"),
    *referred("delta", DELTAConfig(head_epochs=1, batches=1)),
    *referred("attention_transfer", "attention_transfer"),
    *referred("tred", TREDConfig(epochs=1)),
    Row("co_tuning", "co_tuning", Floor(source_head=True)),
    *referred("lwf", "lwf", source_head=True),
    *referred("soft: source='head'", SoftConfig(source="head", norm_mode="auto"), source_head=True),
    Row("soft: with source data", SoftConfig(norm_mode="auto"), Floor(batches=2, source_head=True)),
    Row("soft: once its weight is 0", SoftConfig(norm_mode="auto"), at=1),
    *live_and_recorded("amcf: one member, 9 of 17 layers frozen", AMCFConfig(frozen=(9,), norm_mode="auto"),
                       {"trains_from": "stage2"}, "activations"),
    Row("amcf: two members, all layers train", AMCFConfig(frozen=(0, 0), norm_mode="auto"), Floor(members=2),
        members=2),
)  # fmt: skip
# Strategies without a row, each with the reason.
LEFT_OUT: dict[str, str] = {
    "stock": "full fine-tuning with other arguments",
    "auto": "the strategy that it chooses",
    "rifle": "full fine-tuning but for the few steps before which the head is drawn anew",
    "wise_ft": "full fine-tuning; what it adds follows the last step",
}


def rows_of(names: Iterable[str]) -> list[Row]:
    """All rows, plus one without a floor for each of these strategies that has no row."""
    known = {row.name.partition(":")[0] for row in ROWS} | set(LEFT_OUT)
    return [*ROWS, *(Row(name, name, None) for name in names if name not in known)]


def own_strategies() -> list[str]:
    """The names of the package's strategies."""
    return [name for name, kind in strategies().items() if kind.__module__.startswith("hf_ft.")]


# --- time -------------------------------------------------------------------------------------------------


def times(row: Row, full: Stepper, folder: str, rounds: int) -> dict[str, Any]:
    """Ratios of a row's step time to that of full fine-tuning and to its floor."""
    return times_of(row.stepper(folder), None if row.floor is None else FloorStepper(row.floor), full, rounds)


def times_of(one: Stepper, floor: FloorStepper | None, full: Stepper, rounds: int) -> dict[str, Any]:
    """Ratios of one stepper's step time to that of full fine-tuning and to its floor."""
    seconds = in_turns([full, one, *([floor] if floor else [])], rounds)
    found: dict[str, Any] = {"full": ratio(seconds[:, 1], seconds[:, 0]), "seconds": float(np.median(seconds[:, 1]))}
    if floor is not None:
        if found["full"]["ratio"] < SHORT:
            own, least = in_turns([one, floor], MORE * rounds).T
            found["seconds"] = float(np.median(own))
        else:
            own, least = seconds[:, 1], seconds[:, 2]
        found["floor"] = {**ratio(own, least), "seconds": float(np.median(least))}
    return found


# --- memory -----------------------------------------------------------------------------------------------


def resident(key: str) -> float:
    """Resident memory in MB: current (VmRSS), or the peak since the last reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def peak_of(row: Row) -> float:
    """The peak memory of a row in MB, measured in this process."""
    gc.collect()
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        stepper = row.stepper(folder)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
        for _ in range(STEPS):
            stepper.step()
        return resident("VmHWM") - before


def peak_by_name(name: str, threads: int) -> float:
    """The peak memory of a row in MB, in this process, which has only done imports so far."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    return peak_of(next(row for row in rows_of(own_strategies()) if row.name == name))


# --- the command ------------------------------------------------------------------------------------------


def run_times(results: dict[str, Any], chosen: list[Row], rounds: int, output: Path) -> None:
    """Measure the times of these rows, and write each as soon as it is available."""
    with tempfile.TemporaryDirectory() as folder:
        full = Row(FULL, FULL).stepper(folder)
        for row in chosen:
            try:
                found = times(row, full, folder, rounds)
            except Exception as error:
                if row in ROWS:
                    raise
                results["left_out"][row.name] = f"{type(error).__name__}: {error}"
                print(f"{row.name:58s} left out: {error}", flush=True)
                continue
            described = {"definition": asdict(row.floor)} if row.floor else {}
            results["rows"].setdefault(row.name, {}).update({"floor": None, **found, **described})
            show(row.name, found)
            write(results, output)


def run_memory(results: dict[str, Any], chosen: list[Row], threads: int, output: Path) -> None:
    """Measure the peaks of these rows, each in a new process, forked from one that has only imported the package.

    These processes return memory that they no longer use to the system at once.
    """
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_ft"])
    for name in [row.name for row in chosen if row.name in results["rows"]]:
        with ProcessPoolExecutor(1, context) as pool:
            peak = pool.submit(peak_by_name, name, threads).result()
        results["rows"][name]["peak_mb"] = peak
        print(f"{name:58s} {peak:5.0f} MB", flush=True)
        write(results, output)


def show(name: str, found: dict[str, Any]) -> None:
    full, floor = found["full"], found.get("floor")
    told = f"{floor['ratio']:6.3f} [{floor['low']:.3f}, {floor['high']:.3f}] of the floor" if floor else ""
    print(f"{name:58s} {full['ratio']:.3f} [{full['low']:.3f}, {full['high']:.3f}] of full  {told}", flush=True)


def write(results: dict[str, Any], output: Path) -> None:
    names = [row.name for row in rows_of(own_strategies())]
    results["rows"] = {name: results["rows"][name] for name in names if name in results["rows"]}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="rounds in which each trainer takes a step")
    parser.add_argument("--only", default="", help="only rows whose name contains this; the others are kept")
    parser.add_argument("--no-memory", action="store_true", help="only measure times")
    parser.add_argument("--no-time", action="store_true", help="only measure memory, for rows whose times are known")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_times.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    rows = rows_of(own_strategies())
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": options.threads}
    about |= {"processor": platform.processor() or platform.machine(), "pairs": options.pairs, "geometry": GEOMETRY}
    about["load"] = round(os.getloadavg()[0], 2)
    results: dict[str, Any] = {"about": about, "left_out": dict(LEFT_OUT), "rows": {}}
    if options.output.exists() and (options.only or options.no_time):
        found = json.loads(options.output.read_text(encoding="utf-8"))
        results["rows"] = found["rows"]
        results["about"] = found["about"] if options.no_time else about
    chosen = [row for row in rows if options.only in row.name]
    if not options.no_time:
        run_times(results, chosen, options.pairs, options.output)
    if not options.no_memory:
        run_memory(results, chosen, options.threads, options.output)


if __name__ == "__main__":
    main()
