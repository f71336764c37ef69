"""What sharing a CPU among training runs costs: `python tests/benchmarks/crowding.py`, with nothing else running.

A process takes steps of full fine-tuning (MobileNetV2 with random weights, 16 images of 96 px, AdamW). First, one
process runs alone, with a thread per core; then as many run at once as there are cores: each with all threads, as by
default; the same with threads that sleep while they wait (`OMP_WAIT_POLICY=PASSIVE`); and each with one thread, as with
`--workers`. Reported are wall-clock seconds per step, as ratios to a fair share: the time of one process alone, times
the number of processes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "crowding.json"
STEPS, WARM, ROUNDS = 12, 3, 3
WAYS = {
    "threads of all cores each": {},
    "the same, OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread each": {"OMP_NUM_THREADS": "1"},
    "one thread each, PASSIVE (--workers)": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
}


def work() -> None:
    """One process: wait for the signal to start, take steps, print the seconds per step."""
    import torch
    import transformers

    config = transformers.MobileNetV2Config(num_labels=10, image_size=96)
    model = transformers.MobileNetV2ForImageClassification(config).to(memory_format=torch.channels_last)
    images, labels = torch.randn(16, 3, 96, 96).contiguous(memory_format=torch.channels_last), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()

    for _ in range(WARM):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    print((time.perf_counter() - began) / STEPS, flush=True)


def seconds(processes: int, environment: dict[str, str]) -> float:
    """Mean wall-clock seconds per step, with this many processes at once."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--work"],
            env=clean | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for one in started:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in started:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    return statistics.fmean(float(one.communicate()[0]) for one in started)


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    alone, ratios = [], {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        alone.append(seconds(1, {}))
        for way, environment in WAYS.items():
            ratios[way].append(seconds(cores, environment) / (cores * alone[-1]))
            print(f"{way}: {ratios[way][-1]:.2f}", flush=True)
    found = {way: [round(value, 2) for value in (statistics.median(r), min(r), max(r))] for way, r in ratios.items()}
    RESULT.write_text(
        json.dumps({"cores": cores, "alone": round(statistics.median(alone), 3), "ratios": found}, indent=2) + "\n"
    )
    for way, (middle, low, high) in found.items():
        print(f"{way}: {middle:.2f} ({low:.2f} to {high:.2f}) of a fair share")


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
