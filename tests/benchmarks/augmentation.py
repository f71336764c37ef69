"""The effect of augmentation and mixing: `python tests/benchmarks/augmentation.py FOLDER/cifar10`.

Full fine-tuning and DAFT at their recommended rates (AdamW, 12 epochs, batches of 32), with each way of augmenting or
mixing training images and the same seeds. `--epochs 12 36` adds longer runs, since augmented images take longer to
learn. MobileNetV2 at 96 px on 200 photographs, and at 64 px on 200 of MNIST's digits, of which a mirror image is not a
digit. Test scores are those of the last epoch. Runs are kept in tests/benchmarks/results/augmentation.jsonl; those that
are already there are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import Entry, Runs, quiet
from rates import ADAM, FAR, MOBILE, NEAR, Bench, Task

from hf_ft import DAFTConfig, FTConfig, FullConfig
from hf_ft.core.compose import recommended_arguments

RESULTS = Path(__file__).parent / "results" / "augmentation.jsonl"
STRATEGIES: dict[str, FTConfig] = {"full": FullConfig(), "daft": DAFTConfig()}
# The name of each way: how single images are augmented, and how those of a batch are mixed.
WAYS: dict[str, tuple[str, dict[str, float]]] = {
    "none": ("none", {}),
    "basic": ("basic", {}),
    "trivial": ("trivial", {}),
    "rand": ("rand", {}),
    "auto": ("auto", {}),
    "mixup 0.2": ("none", {"mixup": 0.2}),
    "cutmix 1": ("none", {"cutmix": 1.0}),
    "basic, cutmix 1": ("basic", {"cutmix": 1.0}),
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="*", help="natural tasks: " + ", ".join(NEAR))
    parser.add_argument("--far", nargs="*", default=["mnist"], choices=list(FAR), help="built-in tasks")
    parser.add_argument("--epochs", nargs="+", type=int, default=[12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    quiet()
    runs = Runs(RESULTS, ("task", "strategy", "way", "epochs", "seed"))
    tasks = [Task(folder.name, NEAR[folder.name], folder) for folder in options.folder]
    tasks += [Task(name, FAR[name][1]) for name in options.far]
    for task in tasks:
        benches: dict[str, Bench] = {}
        for epochs in options.epochs:
            for seed in options.seeds:
                for way, (augment, mixing) in WAYS.items():
                    for name, config in STRATEGIES.items():

                        def make(
                            task: Task = task,
                            augment: str = augment,
                            mixing: dict[str, float] = mixing,
                            config: FTConfig = config,
                            epochs: int = epochs,
                            seed: int = seed,
                            benches: dict[str, Bench] = benches,
                        ) -> Entry:
                            bench = benches.setdefault(augment, Bench(task, MOBILE, augment))
                            rate = float(recommended_arguments([config], ADAM)["learning_rate"].value)
                            return bench.run(config, ADAM, rate, seed, mixing=mixing, num_train_epochs=epochs)

                        runs.get(
                            {"task": task.name, "strategy": name, "way": way, "epochs": epochs, "seed": seed}, make
                        )


if __name__ == "__main__":
    main()
