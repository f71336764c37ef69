"""What channels-last images and bfloat16 save on a CPU, as ratios in one run: `python tests/benchmarks/cpu_formats.py`.

Steps of full fine-tuning (AdamW, float32 weights, bfloat16 by autocast) and predictions, one thread, 16 images per
batch: the four variants alternate, and ratios are of the medians. `--scores FOLDER` instead trains full fine-tuning and
DAFT with their defaults on the image folder (splits train, validation, test) at 96 px, in float32 and in bfloat16, with
the same seeds, and records test scores. Runs are kept in tests/benchmarks/results/; those that are already there are
not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import Entry, Runs, quiet
from rates import ADAM, Bench, Task

from hf_ft import DAFTConfig, FTConfig, FullConfig
from hf_ft.core.compose import recommended_arguments
from hf_ft.zoo.models import load_model

RESULTS = Path(__file__).parent / "results"
MODELS = {"mobilenet_v2": 96, "efficientnet-lite0": 96, "resnet-18": 96, "dinov2-small": 112}
IMAGES = 16
Way = tuple[bool, bool]  # channels last, bfloat16
WAYS: dict[str, Way] = {
    "plain": (False, False),
    "channels last": (True, False),
    "bfloat16": (False, True),
    "channels last, bfloat16": (True, True),
}


def model_of(name: str, pixels: int) -> Any:
    """A pretrained network, or a ResNet-18 with random weights, which do not affect the time."""
    if name != "resnet-18":
        return load_model(name, num_labels=10, image_size=pixels)[0]
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


def measured(name: str, pixels: int, rounds: int) -> Entry:
    """Median ratios to plain float32, for training steps and predictions, with the smallest and the largest."""
    images, labels = torch.randn(IMAGES, 3, pixels, pixels), torch.arange(IMAGES) % 10
    seconds: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in WAYS} for kind in ("train", "predict")}
    made = {}
    for way, (last, _) in WAYS.items():
        model = model_of(name, pixels)
        batch = images.contiguous(memory_format=torch.channels_last) if last else images
        made[way] = model, batch, torch.optim.AdamW(model.parameters(), 1e-4)
    for number in range(rounds + 1):
        for way in random.sample(list(WAYS), len(WAYS)):
            model, batch, optimizer = made[way]

            def computed(model: Any = model, batch: Any = batch, low: bool = WAYS[way][1]) -> Any:
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    return model(pixel_values=batch, labels=labels)

            def step(computed: Callable[[], Any] = computed, optimizer: Any = optimizer) -> None:
                computed().loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            spent = timed(model.train(), step), timed(model.eval(), torch.no_grad()(computed))
            if number:  # the first round warms up
                seconds["train"][way].append(spent[0])
                seconds["predict"][way].append(spent[1])
    return {kind: {way: speed_up(of["plain"], of[way]) for way in WAYS} for kind, of in seconds.items()}


def timed(_: Any, run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def speed_up(plain: list[float], other: list[float]) -> list[float]:
    ratios = [one / two for one, two in zip(plain, other, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def trained(bench: Bench, config: FTConfig, seed: int, low: bool) -> Entry:
    """A training run at the recommended learning rate and warm-up under AdamW."""
    wanted = {name: one.value for name, one in recommended_arguments([config], ADAM, bench.load(seed)[0]).items()}
    warmup = wanted.get("warmup_steps", 0)
    return bench.run(config, ADAM, wanted["learning_rate"], seed, bf16=low, use_cpu=True, warmup_steps=warmup)


def processor() -> str:
    """The instructions for fast bfloat16 that the processor has."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
    return ", ".join(name for word, name in known.items() if word in words) or "no bfloat16 instructions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, metavar="FOLDER", help="train on these images instead")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    if options.scores is None:
        found = {name: measured(name, MODELS[name], options.rounds) for name in options.models}
        about = {"rounds": options.rounds, "images": IMAGES, "torch": torch.__version__, "processor": processor()}
        content = json.dumps({"about": about, "rows": found}, indent=1)
        (RESULTS / "cpu_formats.json").write_text(content + "\n", encoding="utf-8")
        for name, kinds in found.items():
            for kind, ways in kinds.items():
                print(name, kind, {way: f"{m:.2f} ({a:.2f} to {b:.2f})" for way, (m, a, b) in ways.items()})
        return
    runs = Runs(RESULTS / "cpu_formats.jsonl", ("model", "strategy", "bf16", "seed"))
    for name in options.models:
        bench = Bench(Task(options.scores.name, MODELS[name], options.scores), name)
        strategies: dict[str, FTConfig] = {"full": FullConfig()}
        if name != "dinov2-small":  # has no BatchNorm
            strategies["daft"] = DAFTConfig()
        for strategy, config in strategies.items():
            for seed in options.seeds:
                for low in (False, True):
                    key = {"model": name, "strategy": strategy, "bf16": low, "seed": seed}
                    runs.get(
                        key,
                        lambda c=config, low=low, s=seed, b=bench: trained(b, c, s, low),  # type: ignore[misc]
                    )


if __name__ == "__main__":
    main()
