"""Peak memory against the number of members: `python tests/benchmarks/members.py`.

Training steps of one to four MobileNetV2 at 96 px, batch 32, SGD with momentum, CPU; either all layers train, or the
first 40 of each one's 52 stay frozen and are recorded. Every case runs in its own process; reported is the peak of its
resident memory above the level before the first step.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hf_ft import AMCFConfig, FTTrainer
from hf_ft.testing.training import tiny_arguments
from hf_ft.zoo.sources import load_sources

IMAGES, PIXELS, BATCH, STEPS = 96, 96, 32, 9


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(members: int, frozen: int) -> dict[str, float]:
    """The memory of a case in MB, measured in this process."""
    torch.set_num_threads(1)
    model, _ = load_sources(["mobilenet_v2"] * members, num_labels=10, image_size=PIXELS)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=random)
    rows = [{"pixel_values": image, "labels": number % 10} for number, image in enumerate(images)]
    args = tiny_arguments(
        tempfile.mkdtemp(), max_steps=STEPS, per_device_train_batch_size=BATCH, optim="sgd", optim_args="momentum=0.9"
    )
    trainer = FTTrainer(model, args, strategy=AMCFConfig(frozen=[frozen] * members), train_dataset=rows)
    before = peak()
    trainer.train()
    state = sum(v.numel() for s in trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    return {"members": members, "frozen": frozen, "mb": peak() - before, "momentum_mb": 4 * state / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "members.json")
    options = parser.parse_args()
    if options.case:
        print("\n" + json.dumps(one(*options.case)))
        return
    found = []
    for frozen in (0, 40):
        for members in (1, 2, 3, 4):
            command = [sys.executable, __file__, "--case", str(members), str(frozen)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print("{frozen:>3} of 52 frozen, {members} members: {mb:.0f} MB".format(**found[-1]), flush=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
