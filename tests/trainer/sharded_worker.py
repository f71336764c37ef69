"""Two gloo ranks train the same with sharded parameters (FSDP2) as without: `sharded_worker.py FOLDER`."""

import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import ViTForImageClassification

import hf_ft
from hf_ft import (
    BSSConfig,
    GradualUnfreezingConfig,
    L2SPConfig,
    LayerDecayConfig,
    LinearProbeConfig,
    LPFTConfig,
    PEFTConfig,
    WiSEFTConfig,
)
from hf_ft.engine.checkpoint import digests
from hf_ft.engine.step_hooks import unwrapped
from hf_ft.models.sharding import is_sharded, shard, whole_optimizer_state, whole_state
from hf_ft.testing import same_tensors, still, tiny_data, tiny_vit
from hf_ft.testing.training import make_trainer
from tests import quick
from tests.models.heads import headed

quick.set_up()
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
SAVING = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
begun = time.perf_counter()


def vit():
    """The ranks start with different heads, as with a checkpoint that has none: all train the first rank's."""
    model = still(tiny_vit())
    torch.nn.init.normal_(model.classifier.weight, std=0.5, generator=torch.Generator().manual_seed(rank))
    return model


def made(name, model, strategy, **arguments):
    arguments = {"max_steps": 6, "optim": "sgd", "per_device_train_batch_size": 4, "max_grad_norm": 0.5, **arguments}
    trainer = make_trainer(model, strategy, folder / name, **arguments)
    assert trainer.args.world_size == 2
    return trainer


def train(name, model, strategy, resume=None, **arguments):
    trainer = made(name, model, strategy, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def whole(trainer):
    """All of the weights, on every rank."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in trainer.model.state_dict().items()}


def alike(name, strategy, make=vit, tolerance=1e-5, **arguments):
    """Train with and without sharding; compare weights and logs."""
    plain = train(f"{name}-plain", make(), strategy, **arguments)
    sharded = train(f"{name}-sharded", make(), strategy, **FSDP, **arguments)
    assert not is_sharded(plain.model) and is_sharded(sharded.model)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.model.parameters()), "whole after a pass"
    same_tensors(whole(plain), whole(sharded), tolerance)
    for one, other in zip(plain.state.log_history, sharded.state.log_history, strict=True):
        assert set(one) == set(other), (one, other)
        for key in one:
            if "loss" in key or key in ("learning_rate", "grad_norm", "stage"):
                assert abs(one[key] - other[key]) <= 10 * tolerance * max(1, abs(one[key])), (name, key, one, other)
    if rank == 0:
        print(f"{name}: {time.perf_counter() - begun:.1f} s", flush=True)
    return plain, sharded


# The whole penalty gradient on each rank's shards: on the same scale as the task's, and clipped with it.
l2_sp = L2SPConfig(alpha=0.5, beta=0.5)
alike("l2_sp", l2_sp)
alike("accumulated", l2_sp, per_device_train_batch_size=2, gradient_accumulation_steps=2)
alike("full", "full")
alike("layer_decay", LayerDecayConfig())
alike("gradual_unfreezing", GradualUnfreezingConfig(stages=3))
alike("bss", BSSConfig(eta=0.1))
alike("linear_probe", LinearProbeConfig(head_lr="auto"))
alike("wise_ft", ["full", WiSEFTConfig(steps=2)])
alike("lp_ft, fitted", LPFTConfig(probe_solver="lbfgs"))
alike("rms norms", "lp_ft", make=lambda: still(headed("llama")))

# Only adapters are saved, and frozen parameters are sharded as well.
adapters = PEFTConfig(merge=False, head_lr=None)
_, sharded = alike("adapters", adapters, **SAVING)
files = [folder / f"adapters-{kind}" / "checkpoint-2" for kind in ("plain", "sharded")]
same_tensors(*(load_file(file / "adapter_model.safetensors") for file in files), 1e-5)
resumed = train("adapters-again", vit(), adapters, files[1], **FSDP, **SAVING)
same_tensors(whole(resumed), whole(sharded))

# The best model, the last batch that is padded on one rank, and files without traces of shards.
plain, sharded = alike(
    "lp_ft", [LPFTConfig(head_lr="auto"), l2_sp], load_best_model_at_end=True, per_device_eval_batch_size=3, **SAVING
)
saved = [load_file(folder / f"lp_ft-{kind}" / "checkpoint-4" / "model.safetensors") for kind in ("plain", "sharded")]
same_tensors(*saved, 1e-5)
for trainer in (plain, sharded):
    trainer.save_model(str(folder / "saved"))
    trainer.accelerator.wait_for_everyone()
    loaded, notes = ViTForImageClassification.from_pretrained(folder / "saved", output_loading_info=True)
    assert not any(notes.values()) and loaded.config.architectures == ["ViTForImageClassification"]
    same_tensors(loaded.state_dict(), whole(trainer))
    trainer.save_delta(folder / "delta")
    trainer.accelerator.wait_for_everyone()
    assert digests(hf_ft.load_delta(still(tiny_vit()), folder / "delta")) == digests(loaded)
losses = [trainer.evaluate(tiny_data(tiny_vit(), 37, seed=3))["eval_loss"] for trainer in (plain, sharded)]
assert abs(losses[0] - losses[1]) < 1e-6, losses

# Bit for bit after resuming in each stage; and continued from a run without shards.
for name, border in (("within", 2), ("at the border", 3)):
    arguments = {**SAVING, "optim": "adamw_torch_fused", "save_steps": border}
    whole_run = train(name, vit(), ["lp_ft", l2_sp], **FSDP, **arguments)
    resumed = train(name, vit(), ["lp_ft", l2_sp], folder / name / f"checkpoint-{border}", **FSDP, **arguments)
    same_tensors(whole(resumed), whole(whole_run))
    states = [whole_optimizer_state(unwrapped(trainer.optimizer), True)["state"] for trainer in (whole_run, resumed)]
    for index, state in states[0].items():
        same_tensors(state, states[1][index])
end = whole(train("lp_ft-plain", vit(), [LPFTConfig(head_lr="auto"), l2_sp], folder / "lp_ft-plain/checkpoint-4",
                  per_device_eval_batch_size=3, **FSDP, **SAVING))  # fmt: skip
same_tensors(end, whole(train("again", vit(), [LPFTConfig(head_lr="auto"), l2_sp])), 1e-5)

# Half precision if only the head trains at first (pytorch#186998), with master weights and sums in float32.
for strategy in ("lp_ft", "full"):
    _, sharded = alike(f"half, {strategy}", strategy, tolerance=2e-2, bf16=True)
    assert all(parameter.dtype == torch.float32 for parameter in sharded.model.parameters())

# Tied parameters stay one tensor, which is saved once.
tied = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
tied[1].weight = tied[0].weight
shard(tied, torch.device("cpu"), lambda module: False)
state = whole_state(tied)
assert not state or (state["0.weight"] is state["1.weight"] and state["0.bias"] is not state["1.bias"])

# As requested by a launcher.
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
launched = train("launched", vit(), "full")
assert is_sharded(launched.model) and bool(whole_state(launched.model)) == (rank == 0)
print(f"all: {time.perf_counter() - begun:.1f} s")
