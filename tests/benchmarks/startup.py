"""How long the package and its commands take to start: `python tests/benchmarks/startup.py`.

Every case runs in a fresh process, alternating with the others and with `from transformers import Trainer`, whose time
is the unit, so that the ratio does not depend on the machine. Reported are each case's lowest CPU time (user and
system, one thread) and its lowest wall-clock time, after one round that warms the file caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

UNIT = "from transformers import Trainer"
CASES = {
    "an empty process": ["-c", ""],
    UNIT: ["-c", UNIT],
    "import hf_ft": ["-c", "import hf_ft"],
    "from hf_ft import FTTrainer": ["-c", "from hf_ft import FTTrainer"],
    "hf-ft --version": ["-m", "hf_ft", "--version"],
    "hf-ft --help": ["-m", "hf_ft", "--help"],
    "hf-ft list": ["-m", "hf_ft", "list"],
    "hf-ft describe l2_sp": ["-m", "hf_ft", "describe", "l2_sp"],
    "hf-ft train --help": ["-m", "hf_ft", "train", "--help"],
    "hf-ft compare --help": ["-m", "hf_ft", "compare", "--help"],
}


def once(arguments: list[str]) -> tuple[float, float]:
    """CPU seconds and wall-clock seconds of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for turn in range(options.turns + 1):
        for name, arguments in CASES.items():
            figures = once(arguments)
            if turn:
                runs[name].append(figures)
    shortest = {name: tuple(map(min, zip(*figures, strict=True))) for name, figures in runs.items()}
    unit = shortest[UNIT][0]
    rows = {name: {"cpu_s": cpu, "clock_s": clock, "ratio": cpu / unit} for name, (cpu, clock) in shortest.items()}
    print(f"{'':34}{'CPU s':>8}{'clock s':>9}{'ratio':>8}")
    for name, row in rows.items():
        print(f"{name:34}{row['cpu_s']:8.2f}{row['clock_s']:9.2f}{row['ratio']:8.3f}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
