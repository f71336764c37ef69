"""The bytes that a process holds in training, alone and as one of several, unsharded (DDP) and sharded (FSDP2).

    python -m tests.benchmarks.memory_ranks

Measured in CPU processes (gloo) with a small random ViT, just before the optimizer takes its last step: every tensor's
memory is counted once, by purpose. The peak of that step is what torch's profiler adds to what existed before it,
including activations and temporary tensors. The sizes of large models are determined without memory for their weights;
docs/tools/memory.py models the rest. It takes about ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Dinov2Config,
    LlamaConfig,
    PrinterCallback,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from docs.tools.memory import sizes
from hf_ft import DELTAConfig, EMAConfig, FTTrainer, FullConfig, L2SPConfig, LPFTConfig, PEFTConfig, WiSEFTConfig
from hf_ft.engine.set_up import set_up
from hf_ft.models.sharding import local
from hf_ft.testing import tiny_data
from hf_ft.testing.training import tiny_arguments
from tests.forked import python

FILE = Path(__file__).with_name("results") / "memory_ranks.json"
RANKS = (1, 2, 4)
STEPS = 4  # two in each stage: Adam's moments exist from the second step on
STRATEGIES = (
    FullConfig(),
    L2SPConfig(),
    LPFTConfig(head_lr=1e-2),
    PEFTConfig(merge=False, head_lr=1e-2),
    WiSEFTConfig(alpha=0.5),
    EMAConfig(),
    DELTAConfig(weights="uniform"),
)
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
GIANT = Dinov2Config(
    hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True, image_size=518, patch_size=14,
    num_labels=1000,
)  # fmt: skip
LARGE = {
    "ViT-g/14 (DINOv2 giant)": (AutoModelForImageClassification, GIANT),
    "7B text classifier (Llama 2)": (AutoModelForSequenceClassification, LlamaConfig(num_labels=2)),
}


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    return ViTForImageClassification(ViTConfig(**small, image_size=32, patch_size=16, num_labels=4))


# --- what a process holds ---------------------------------------------------------------------------------


def memory(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of tensors, several of which may share memory; for DTensors, those of this process."""
    storages = [local(tensor.detach()).untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Count(TrainerCallback):
    """Counts what exists just before the optimizer's last step, and the peak of that step."""

    def __init__(self, trainer: FTTrainer) -> None:
        self.trainer, self.profiler = trainer, profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.held: dict[str, int] = {}
        self.peak = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS - 1:
            self.held = self._held()
            assert not self.held["gradients"]
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS:
            self.profiler.stop()
            events = self.profiler.profiler.kineto_results.events()
            changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
            growth = max(accumulate(number for _, number in changes))
            self.peak += growth

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS - 1:
            self.peak = sum(self.held.values()) - self.held["origin"]
            self.held = self._held()

    def _held(self) -> dict[str, int]:
        run, objective = self.trainer._run, self.trainer._attempt.objective
        parameters = list(objective.parameters())
        reference = [] if run.reference is None else [*run.reference.model.parameters(), *run.reference.model.buffers()]
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        states = [value for of in optimizer.state.values() for value in of.values()]
        return {
            "weights": memory([*parameters, *objective.buffers()]),
            "gradients": memory(parameter.grad for parameter in parameters),
            "buckets": self._buckets(),
            "optimizer": memory(value for value in states if isinstance(value, Tensor)),
            "starting weights": memory(run.anchors.values()),
            "reference model": memory(reference),
            "average": 0 if run.average is None else memory(run.average._averages.values()),
            "origin": 0 if run.origin is None else memory(run.origin.weights.values()),
        }

    def _buckets(self) -> int:
        """The buckets that DDP keeps in addition to the gradients."""
        wrapped = self.trainer.model_wrapped
        if not isinstance(wrapped, DistributedDataParallel):
            return 0
        assert not wrapped.gradient_as_bucket_view
        return sum(map(int, wrapped._get_ddp_logging_data()["bucket_sizes"].split(",")))


def measure(folder: str) -> None:
    """Measure what this rank holds with each strategy; the first rank writes the result."""
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rows = []
    for config in STRATEGIES:
        for sharded in (False, True) if ranks > 1 and config.needs().sharded else (False,):
            model = small_vit()
            args = tiny_arguments(
                Path(folder, "runs"),
                max_steps=STEPS,
                per_device_train_batch_size=1,
                bf16=True,
                **FSDP if sharded else {},
            )
            assert args.world_size == ranks
            data = tiny_data(model, 4 * ranks)
            trainer = FTTrainer(model, args, strategy=config, train_dataset=data, frozen_cache="never")
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(counted := Count(trainer))
            trainer.train()
            rows.append(
                {
                    "strategy": config.ft_type,
                    "ranks": ranks,
                    "sharded": sharded,
                    "held": counted.held,
                    "peak": counted.peak,
                }
            )
    if int(os.environ.get("RANK", "0")) == 0:  # it holds the largest shards
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")


# --- what a model consists of -----------------------------------------------------------------------------


def sizes_of(model: nn.Module, config: Any) -> dict[str, int]:
    # Starting weights for a choice are moved to the CPU, which meta tensors do not allow; PEFT refuses fake tensors.
    with FakeTensorMode(allow_non_fake_inputs=True) if config.averages else nullcontext():
        return asdict(sizes(set_up(model, config)))


def large(kind: Any, config: Any) -> dict[str, dict[str, int]]:
    found = {}
    for strategy in STRATEGIES:
        with torch.device("meta"):
            found[strategy.ft_type] = sizes_of(kind.from_config(config), strategy)
    return found


def measured(ranks: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        done = python("-m", "tests.benchmarks.memory_ranks", folder, ranks=ranks)
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
        return rows


def main() -> None:
    content = {
        "about": {"torch": torch.__version__, "parameters": sum(p.numel() for p in small_vit().parameters())},
        "small": {config.ft_type: sizes_of(small_vit(), config) for config in STRATEGIES},
        "large": {name: large(*made) for name, made in LARGE.items()},
        "measured": [row for ranks in RANKS for row in measured(ranks)],
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    measure(sys.argv[1]) if sys.argv[1:] else main()
