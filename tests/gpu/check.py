"""Checks this package's promises on a GPU: `python -m tests.gpu.check` from the root of a clone.

It checks the laws of `hf_ft.testing` and of `tests/gpu/laws.py`, each strategy on one of the tiny models, in float32,
in bfloat16 and in float16 with scaled gradients; then that no step waits for the GPU. Finally it measures the step time
and peak memory of every strategy relative to full fine-tuning and to its floor, as `tests/benchmarks/step_times.py`
does on a CPU. It prints a table, and exits with 1 if a law is broken.

Without a GPU, or with `--tiny`, the same runs on the CPU with a tiny network, which only shows that the script works.
It takes about five minutes on a GPU; what does not fit into `--minutes` is counted as not run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging as logs
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for reproducible results; read at the first product

import torch
import transformers
from transformers.utils import logging

from docs.tools.measured import table_of_gpu
from docs.tools.tables import _table, documented
from hf_ft.comparison.cost import PeakMemory
from hf_ft.testing import suited
from hf_ft.testing.conditions import under
from tests.gpu.laws import COMPILED, laws_of
from tests.testing.test_laws import OPTIONS, in_turn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step_times
import stepper
from floors import FloorStepper

# The kit's tolerances are for float32. A step's gradients have the relative error of the type they are computed
# in, 2^-8 or 2^-11, which rates of up to 0.15 turn into differences of weights.
SLACK = {"fp32": 10.0, "bf16": 2_000.0, "fp16": 500.0}
# So that no first step of a tiny model overflows: a skipped step would make a different run, not a broken law.
FIRST_SCALE = 256.0
NETWORK_OF_LAWS = 3  # tiny models; each law uses a different one
# Rows whose step must wait for the GPU, each with the reason.
WAITS = {
    "bss": "LAPACK reports whether the singular values were found",
    "soft: with source data": "a step fetches its source batch",
}


@dataclass
class Checked:
    """One law, for one strategy on one model."""

    precision: str
    law: str
    strategy: str
    model: str
    seconds: float = 0.0
    error: str | None = None
    ran: bool = True

    @property
    def said(self) -> str:
        return f"{self.strategy} breaks {self.law} on {self.model} in {self.precision}: {self.error}"


def on_gpu() -> bool:
    return torch.cuda.is_available()


# --- the laws ---------------------------------------------------------------------------------------------


def precisions() -> list[str]:
    """The precisions of this machine: on a CPU, gradients cannot be scaled, so there is no float16."""
    if not on_gpu():
        return ["fp32", "bf16"]
    return ["fp32", *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else []), "fp16"]


def smaller_scale(trainer: Any) -> None:
    """Let the gradient scaler of a trainer begin with a small factor."""
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler(trainer.args.device.type, init_scale=FIRST_SCALE)


def in_precision(precision: str, gpu: bool) -> AbstractContextManager[None]:
    """Within this context, tiny models train in this precision, on the GPU if there is one."""
    arguments = {"use_cpu": not gpu} | ({} if precision == "fp32" else {precision: True})
    return under(arguments, SLACK[precision] if gpu or precision != "fp32" else 1.0, smaller_scale)


@contextlib.contextmanager
def the_same_each_time() -> Iterator[None]:
    """Use deterministic algorithms, and real float32 instead of TF32."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends], torch.backends.cudnn.benchmark
    for backend in backends:
        backend.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        for backend, allowed in zip(backends, before[0], strict=True):
            backend.allow_tf32 = allowed
        torch.backends.cudnn.benchmark = before[1]


def plan_of(strategies: Iterable[str], laws: Iterable[str], chosen: Iterable[str]) -> Iterator[tuple[Checked, Any]]:
    """What to check, with the model's factory, precision by precision."""
    strategies, wanted = set(strategies), set(laws)
    for precision in chosen:
        for turn, law in enumerate(laws_of(precision)):
            for name, make in in_turn(turn % NETWORK_OF_LAWS):
                compiles = law != "compiling_changes_nothing" or name in COMPILED
                if name in strategies and (not wanted or law in wanted) and compiles:
                    yield Checked(precision, law, name, make.__name__), make


def check_laws(strategies: Iterable[str], laws: Iterable[str], gpu: bool, until: float) -> list[Checked]:
    """Check laws until a given time; the rest are marked as not run."""
    checked = []
    with the_same_each_time():
        for one, make in plan_of(strategies, laws, precisions()):
            started = time.perf_counter()
            one.ran = started < until
            if one.ran:
                one.error = broken(one, make, gpu)
                one.seconds = round(time.perf_counter() - started, 2)
            if one.error is not None:
                print(one.said, flush=True)
            checked.append(one)
    return checked


def broken(one: Checked, make: Any, gpu: bool) -> str | None:
    """What is wrong, in one line; None if the law holds."""
    config = documented()[one.strategy](**OPTIONS.get(one.strategy, {}))
    with tempfile.TemporaryDirectory() as folder, in_precision(one.precision, gpu), quiet():
        try:
            laws_of(one.precision)[one.law](suited(config, make()), make, Path(folder))
        except Exception as error:  # also other errors than assertions, such as tensors on two devices
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            said = (str(error).splitlines() or [""])[0]
            return f"{kind}{said} ({Path(place.filename).name}:{place.lineno})"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the Trainer's output and warnings."""
    logs.disable(logs.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logs.disable(logs.NOTSET)


# --- steps ------------------------------------------------------------------------------------------------


def waits(one: Any) -> str | None:
    """Where a step makes the host wait for the GPU; None if nowhere."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.body()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "hf_ft" in frame.filename]
        last = (frames or traceback.extract_tb(error.__traceback__))[-1]
        return f"{Path(last.filename).name}:{last.lineno} ({last.name})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def peak_of(make: Any, device: str) -> tuple[Any, float]:
    """The stepper, and the MB that it needs for some steps."""
    before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else 0.0
    with PeakMemory(device) as memory:
        one = make()
        for _ in range(step_times.STEPS):
            one.step()
    return one, memory.mb - before


@contextlib.contextmanager
def a_small_network() -> Iterator[None]:
    """ResNet-18 with few channels, on a few small images."""
    with mock.patch.multiple(stepper, WIDTHS=[8, 8, 16, 16], PIXELS=32, BATCH=8):
        yield


def measure(rows: list[Any], rounds: int, device: str, until: float) -> tuple[dict[str, Any], list[Checked]]:
    """Times, peaks, and whether a step waits, for these rows."""
    found: dict[str, Any] = {}
    checked: list[Checked] = []
    with tempfile.TemporaryDirectory() as folder, under({"use_cpu": device == "cpu"}):
        full, of_full = peak_of(lambda: step_times.Row(step_times.FULL, step_times.FULL).stepper(folder), device)
        for row in rows:
            if time.perf_counter() > until:
                found[row.name] = None
                continue
            one, peak = peak_of(lambda row=row: row.stepper(folder), device)
            floor, of_floor = None, None
            if row.floor is not None:
                floor, of_floor = peak_of(lambda row=row: FloorStepper(row.floor, device), device)
            entry = step_times.times_of(one, floor, full, rounds)
            memory = {"mb": peak, "full": peak / of_full, "floor": None if of_floor is None else peak / of_floor}
            found[row.name] = {"floor": None, **entry} | ({"memory": memory} if device == "cuda" else {})
            if device == "cuda" and row.strategy is not None:
                where = waits(one)
                found[row.name]["waits"] = where
                known = row.name in WAITS
                error = None if where is None or known else f"it waits at {where}"
                checked.append(Checked("fp32", "no_step_waits", row.name, "ResNet-18", error=error))
    return found, checked


# --- the command ------------------------------------------------------------------------------------------


def about(gpu: bool, tiny: bool, rounds: int) -> dict[str, Any]:
    """The machine, and what ran on it."""
    result = {"device": "CPU", "torch": torch.__version__, "transformers": transformers.__version__, "rounds": rounds}
    result["geometry"] = "a tiny ResNet" if tiny else stepper.GEOMETRY
    if gpu:
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        result |= {"device": f"{name} ({memory / 2**30:.0f} GB)", "cuda": torch.version.cuda, "driver": driver()}
    return result


def driver() -> str | None:
    """The version of the driver; None if unknown."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def summary(checked: list[Checked]) -> list[dict[str, Any]]:
    """For each precision and law: how many strategies keep it, which break it, and how many were not run."""
    groups: dict[tuple[str, str], list[Checked]] = {}
    for one in checked:
        groups.setdefault((one.precision, one.law), []).append(one)
    return [
        {
            "precision": precision,
            "law": law,
            "kept": sum(one.ran and one.error is None for one in ones),
            "broken": [one.strategy for one in ones if one.error is not None],
            "not_run": sum(not one.ran for one in ones),
        }
        for (precision, law), ones in groups.items()
    ]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with a tiny network")
    parser.add_argument("--strategies", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--laws", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, default=12, help="in which each takes a step; 0 measures nothing")
    parser.add_argument("--minutes", type=float, default=5.5, help="begin nothing after these")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args(given)
    gpu = on_gpu() and not options.tiny
    began = time.perf_counter()
    logging.disable_progress_bar()
    names = [name for name in options.strategies.split(",") if name] or list(documented())
    laws = [law for law in options.laws.split(",") if law]
    unknown = sorted({*names} - {*documented()} | {*laws} - {*laws_of("fp32")})
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}. Choose of {', '.join([*documented(), *laws_of('fp32')])}.")
    # A third of the time is reserved for the steps.
    share = 2 / 3 if options.rounds else 1.0
    checked = check_laws(names, laws, gpu, began + 60 * options.minutes * share)
    rows: dict[str, Any] = {}
    if options.rounds:
        chosen = [row for row in step_times.rows_of(names) if row.name.partition(":")[0] in {*names, "(stock Trainer)"}]
        with contextlib.nullcontext() if gpu else a_small_network(), quiet():
            device = "cuda" if gpu else "cpu"
            rows, steps = measure(chosen, options.rounds, device, began + 60 * options.minutes)
        checked += steps
    errors = [one for one in checked if one.error is not None]
    content = {
        "about": {**about(gpu, not gpu, options.rounds), "seconds": round(time.perf_counter() - began)},
        "laws": summary(checked),
        "errors": [asdict(one) for one in errors],
        "rows": rows,
    }
    print(table_of_gpu(_table, content))
    if options.json:
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for one in errors:
        print(one.said)
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
