"""What computing frozen parts once saves, as ratios in one run: `python tests/benchmarks/frozen.py`.

MobileNetV2 at 96 px, 500 random images, batch 32, SGD with momentum, CPU.

- A linear probe of 30 epochs: compared with its floor (one pass that computes the features, and 30 epochs of a linear
  layer on them in the stock Trainer), and with the same probe without the cache.
- The exhaustive search over the inverted residuals: compared with its floor (one pass that computes all boundaries, and
  the steps and scores of what follows each, in a hand-written loop), and with the same search without the cache.
- The search with successive halving: compared with one full fine-tuning run of the same number of epochs.

Each is run `--repeats` times, alternating; ratios are of the medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_ft import BlockScores, BlockSearch, BlockwiseConfig, FTTrainer
from hf_ft.testing.training import tiny_arguments
from hf_ft.zoo.models import load_model

IMAGES, PIXELS, BATCH, CLASSES = 500, 96, 32, 10
NOISE = 6.0  # hard enough for blocks to differ
CHANNELS_LAST = torch.channels_last


class Images(torch.utils.data.Dataset):
    """Noisy images of ten patterns, kept in memory so that reading them costs neither side anything."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        patterns = nn.functional.interpolate(torch.randn(CLASSES, 3, 6, 6, generator=random), PIXELS, mode="bilinear")
        self.labels = torch.randint(CLASSES, (IMAGES,), generator=random)
        noise = torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=random)
        self.pixels = (patterns[self.labels] + NOISE * noise).contiguous(memory_format=CHANNELS_LAST)

    def __len__(self) -> int:
        return IMAGES

    def __getitems__(self, rows: list[int]) -> list[int]:
        return rows

    def __getitem__(self, row: int) -> int:
        return row

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(rows)
        return {"pixel_values": self.pixels[chosen], "labels": self.labels[chosen]}


class Features(Images):
    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(rows)
        return {"features": self.features[chosen], "labels": self.labels[chosen]}


class Linear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, CLASSES)

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def arguments(folder: str, epochs: int) -> Any:
    args = tiny_arguments(
        folder, max_steps=-1, num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=1e-2,
        optim="sgd", logging_strategy="no", remove_unused_columns=False, log_level="error",
    )  # fmt: skip
    args.optim_args = "momentum=0.9"
    return args


class Bench:
    """All measurements on one model and one set of images."""

    def __init__(self, folder: str, probe_epochs: int, search_epochs: int) -> None:
        self.folder, self.probe_epochs, self.search_epochs = folder, probe_epochs, search_epochs
        self.data = Images()
        self.start: Any = load_model("mobilenet_v2", num_labels=CLASSES, image_size=PIXELS)[0]

    # --- the probe ---

    def probe(self, use: str) -> None:
        args = arguments(self.folder, self.probe_epochs)
        data: dict[str, Any] = {"train_dataset": self.data, "data_collator": self.data.collate}
        model = copy.deepcopy(self.start)
        FTTrainer(model, args, strategy="linear_probe", frozen_cache=use, **data).train()  # type: ignore[arg-type]

    def probe_floor(self) -> None:
        model = copy.deepcopy(self.start)
        with torch.inference_mode():
            chunks = [model.mobilenet_v2(chunk).pooler_output.flatten(1) for chunk in self.data.pixels.split(64)]
        features = Features(torch.cat(chunks).clone(), self.data.labels)
        args = arguments(self.folder, self.probe_epochs)
        Trainer(Linear(1280), args, train_dataset=features, data_collator=features.collate).train()

    # --- the search ---

    def search(self, use: str, halving: bool = False) -> BlockScores:
        config = BlockwiseConfig(
            scheme="block", search_epochs=self.search_epochs, storage="memory", baselines=False, halving=halving,
            validation=0.2,
        )  # fmt: skip
        model = copy.deepcopy(self.start)
        trainer = FTTrainer(
            model, arguments(self.folder, 1), strategy=config, frozen_cache=use,  # type: ignore[arg-type]
            train_dataset=self.data, data_collator=self.data.collate,
        )  # fmt: skip
        return BlockSearch(model, config, trainer.context(), progress=False).run()

    def chain(self, model: Any) -> list[nn.Module]:
        backbone = model.mobilenet_v2
        return [backbone.conv_stem, *backbone.layer, backbone.conv_1x1]

    def search_floor(self) -> None:
        """What any search over these blocks must compute: boundaries once, then each suffix forward and backward."""
        train, validation = torch.arange(400), torch.arange(400, 500)
        model = copy.deepcopy(self.start).eval()
        borders: list[list[Tensor]] = []
        with torch.no_grad():
            for chunk in self.data.pixels.split(64):
                found = [chunk]
                for module in self.chain(model)[:-1]:
                    found.append(module(found[-1]))
                borders.append(found)
        inputs = [torch.cat([found[k] for found in borders]) for k in range(len(borders[0]))]
        for k in reversed(range(len(inputs))):
            self._floor_of(k, inputs[k], train, validation)

    def _floor_of(self, k: int, inputs: Tensor, train: Tensor, validation: Tensor) -> None:
        model = copy.deepcopy(self.start)
        model.requires_grad_(False)
        chain = self.chain(model)
        for module in (chain[k], model.classifier):
            module.requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-2, momentum=0.9)

        def logits(rows: Tensor) -> Tensor:
            x = inputs[rows].contiguous(memory_format=CHANNELS_LAST)
            for module in chain[k:]:
                x = module(x)
            return model.classifier(model.dropout(model.mobilenet_v2.pooler(x).flatten(1)))

        for epoch in range(self.search_epochs):
            model.eval()
            chain[k].train()
            order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))]
            for rows in order.split(BATCH):
                nn.functional.cross_entropy(logits(rows), self.data.labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
            chain[k].eval()
            with torch.no_grad():
                (logits(validation).argmax(-1) == self.data.labels[validation]).float().mean().item()

    def full(self) -> None:
        """One full fine-tuning run on the search's training rows, with as many epochs and evaluations."""
        config = BlockwiseConfig(block="all", search_epochs=self.search_epochs, validation=0.2, storage="memory")
        model = copy.deepcopy(self.start)
        trainer = FTTrainer(
            model, arguments(self.folder, 1), strategy=config, frozen_cache="never",
            train_dataset=self.data, data_collator=self.data.collate,
        )  # fmt: skip
        search = BlockSearch(model, config, trainer.context(), progress=False)
        search.candidates = [search.baselines["all"]]
        search.baselines = {}
        search.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probe_epochs", type=int, default=30)
    parser.add_argument("--search_epochs", type=int, default=8)
    parser.add_argument("--parts", default="probe,search", help="which to measure")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "frozen.json")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, options.probe_epochs, options.search_epochs)
        parts: dict[str, dict[str, Callable[[], Any]]] = {
            "probe": {
                "probe, cached": lambda: bench.probe("auto"),
                "probe, floor": bench.probe_floor,
                "probe, not cached": lambda: bench.probe("never"),
            },
            "search": {
                "search, cached": lambda: bench.search("auto"),
                "search, floor": bench.search_floor,
                "search, halving": lambda: bench.search("auto", halving=True),
                "full fine-tuning": bench.full,
                "search, not cached": lambda: bench.search("never"),
            },
        }
        found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
        for part in options.parts.split(","):
            found[part] = measure(parts[part], options.repeats)
            _show(part, found[part])
        found["about"] = {
            "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(), "repeats": options.repeats,
            "geometry": f"MobileNetV2, {PIXELS} px, {IMAGES} images, batch {BATCH}, SGD with momentum, float32",
            "probe_epochs": options.probe_epochs, "search_epochs": options.search_epochs,
        }  # fmt: skip
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in work}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, call in work.items():
            taken, results[name] = timed(call)
            seconds[name].append(taken)
            print(f"  {name}: {taken:.2f} s", flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    if "probe, cached" in median:
        cached = median["probe, cached"]
        ratios = {
            "cached / floor": (cached / median["probe, floor"], "<= 1.5"),
            "not cached / cached": (median["probe, not cached"] / cached, ">= 10"),
        }
        return {"seconds": seconds, "ratios": ratios}
    cached, plain, halved = (results[f"search, {name}"] for name in ("cached", "not cached", "halving"))
    ratios = {
        "cached / floor": (median["search, cached"] / median["search, floor"], "<= 1.2"),
        "cached / not cached": (median["search, cached"] / median["search, not cached"], "about 0.7"),
        "halving / full fine-tuning": (median["search, halving"] / median["full fine-tuning"], "<= 2"),
    }
    rank = [[s.candidate.name for s in sorted(x.scores, key=lambda s: -s.mean)] for x in (cached, plain)]
    chosen = next(s for s in cached.scores if s.candidate.name == halved.best.candidate.name)
    return {
        "seconds": seconds,
        "ratios": ratios,
        "same ranking with and without the cache": rank[0] == rank[1],
        "largest difference of a score": max(
            abs(a.mean - b.mean) for a, b in zip(cached.scores, plain.scores, strict=True)
        ),
        "best": cached.best.candidate.name,
        "exhaustive score of the best": cached.best.mean,
        "chosen by halving": halved.best.candidate.name,
        "exhaustive score of that": chosen.mean,
        "scores": {s.candidate.name: s.mean for s in cached.scores},
    }


def _show(part: str, found: dict[str, Any]) -> None:
    print(part)
    for name, (ratio, goal) in found["ratios"].items():
        print(f"  {name:30s}{ratio:.3f}   goal {goal}", flush=True)
    for name, value in found.items():
        if name not in ("seconds", "ratios", "scores"):
            print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
