"""Sharded parameters: FSDP2 where it is supported; all else is rejected by name before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from hf_ft.core.config import FTConfig
from hf_ft.core.context import FrozenCache
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import members_of
from hf_ft.models.norms import batch_norms, drops_layers
from hf_ft.models.sharding import is_sharded, load_optimizer_state, shard, whole_optimizer_state
from hf_ft.models.source_head import has_source_head

SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # in accelerate's environment variables and distributed types
LAUNCHED = (*SHARDED, "PARALLELISM_CONFIG")
ARGUMENTS = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config")
FSDP = "ACCELERATE_USE_FSDP"
USE = (
    "Use DDP (accelerate launch --multi_gpu), and for less memory gradient_checkpointing=True, smaller batches with "
    "gradient accumulation, bf16=True, optim='adamw_bnb_8bit', or adapters."
)
UNSHARDED = (
    "sharded training (DeepSpeed ZeRO, FSDP1, tensor parallelism) is not supported, since strategies address "
    f"individual parameters. FTTrainer supports FSDP2 with some strategies (see docs/scale.md). {USE}"
)
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "adagrad",
    "rmsprop",
)  # whose states have the parameters' shapes


# --- rejected settings ------------------------------------------------------------------------------------


def check_launcher(fsdp2: bool = False) -> None:
    """Reject what ``accelerate launch`` sets in the environment, by its flags or from its config file.

    Args:
        fsdp2: whether FSDP2 is accepted.

    Raises:
        OptionError: naming the flag.
    """
    for name in LAUNCHED:
        if parse_flag_from_env(f"ACCELERATE_USE_{name}") and not (
            name == "FSDP" and fsdp2 and _launched_version() == 2
        ):
            flag = name.lower()
            raise OptionError(f"accelerate launch --use_{flag} (or {flag} in its config file): {UNSHARDED}")


def check_sharding(args: TrainingArguments | Mapping[str, Any], configs: Iterable[FTConfig] = ()) -> None:
    """Reject arguments or a launcher that shard the model, except for FSDP2 where it is supported.

    Args:
        args: training arguments, or those given on a command line, where nothing is ever sharded.
        configs: the strategies.

    Raises:
        OptionError: naming the argument or the strategy.
    """
    given = args if isinstance(args, Mapping) else {name: getattr(args, name, None) for name in ARGUMENTS}
    fsdp2 = not isinstance(args, Mapping) and (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version") == 2
    for name in ARGUMENTS:
        if name.startswith("fsdp") and fsdp2:
            continue
        # Without fsdp, its config only holds defaults.
        if given.get(name) and (name != "fsdp_config" or isinstance(args, Mapping)):
            raise OptionError(f"args.{name}={given[name]!r}: {UNSHARDED}")
    check_launcher(fsdp2=not isinstance(args, Mapping))
    if not isinstance(args, Mapping):
        _check_fsdp2(args, configs)


def _check_fsdp2(args: TrainingArguments, configs: Iterable[FTConfig]) -> None:
    plugin = fsdp_plugin(args)
    if plugin is None:
        return
    for config in configs:
        if not config.needs().sharded:
            raise OptionError(
                f"{config.ft_type} cannot train a model whose parameters are sharded (FSDP): docs/scale.md lists the "
                f"strategies that can. {USE}"
            )
    asked = getattr(args, "fsdp_config", None) or {}  # early versions of Transformers 5 pass on only a part of it
    settings = {
        "cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading,
            "every process needs the weights before training. Set it to false (--fsdp_cpu_ram_efficient_loading false)",
        ),
        "reshard_after_forward": (
            not plugin.reshard_after_forward,
            "stages and terms refer to the shards. Set it to true",
        ),
        "activation_checkpointing": (
            plugin.activation_checkpointing or asked.get("activation_checkpointing"),
            "set gradient_checkpointing=True in the training arguments instead",
        ),
        "cpu_offload": (isinstance(plugin.cpu_offload, CPUOffloadPolicy) or asked.get("cpu_offload"), "leave it out"),
        "ignored_modules": (plugin.ignored_modules is not None, "leave it out"),
    }
    for name, (refused, instead) in settings.items():
        if refused:
            given = getattr(plugin, name) or asked.get(name)
            raise OptionError(f"fsdp_config {name}={given!r} is not supported: {instead}.")
    if args.world_size == 1:
        raise OptionError(
            "FSDP shards a model over several processes, but there is only one: start more, or leave it out."
        )
    optim = getattr(args.optim, "value", args.optim)
    if optim not in OPTIMIZERS:
        raise OptionError(f"optim={optim!r} is not supported with FSDP: choose one of {', '.join(OPTIMIZERS)}.")
    for name, instead in (
        ("fp16", "bf16=True"),
        ("bf16_full_eval", "bf16=True"),
        ("fp16_full_eval", "bf16=True"),
        ("torch_compile", "False"),
        ("auto_find_batch_size", "False, and a batch size that fits"),
        ("save_on_each_node", "False, and a folder that all nodes share"),
    ):
        if getattr(args, name):
            raise OptionError(f"{name}={getattr(args, name)!r} is not supported with FSDP: set {instead}.")


def check_shardable(args: TrainingArguments, model: nn.Module, optimizer: Any = None) -> None:
    """Reject a model that cannot be sharded, if sharding is requested.

    Raises:
        OptionError: naming the module or parameter.
    """
    if fsdp_plugin(args) is None:
        return
    norms = batch_norms(model)
    scalars = [name for name, parameter in model.named_parameters() if not parameter.dim()]
    reasons = {
        "an ensemble": bool(members_of(model)),
        "a source head, which these strategies do not use": has_source_head(model),
        f"BatchNorm ({norms[0][0] if norms else ''}), whose statistics are not synchronised": bool(norms),
        "LayerDrop, which makes processes gather different layers: set the config's layerdrop to 0": drops_layers(
            model
        ),
        f"a parameter without dimensions ({', '.join(scalars[:1])})": bool(scalars),
        "quantised weights": bool(getattr(model, "is_quantized", False)),
        "an optimizer of your own, for parameters that are not sharded: set args.optim": optimizer is not None,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise OptionError(f"FSDP does not support {found[0]}. {USE}")


def without_cache(args: TrainingArguments, cache: FrozenCache) -> FrozenCache:
    """The settings of the frozen cache: off if the model is sharded, since its layers then run on all processes.

    Raises:
        OptionError: if caching was requested.
    """
    if fsdp_plugin(args) is None:
        return cache
    if cache.use == "always":
        raise OptionError("frozen_cache='always' is not supported with FSDP: set 'auto' or 'never'.")
    return dataclasses.replace(cache, use="never")


def check_accelerator(accelerator: Accelerator) -> None:
    """Reject an accelerator that shards: supported FSDP is not set up through the accelerator.

    Raises:
        OptionError: if the accelerator shards the model.
    """
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    if kind in (*SHARDED, "TP"):
        raise OptionError(f"the accelerator is set up for {kind}: {UNSHARDED}")


def check_whole(model: nn.Module) -> None:
    """Reject a model that is sharded already, as by ``from_pretrained(distributed_config=...)``.

    Raises:
        OptionError: if a parameter is a part of a larger one.
    """
    names = [name for name, parameter in model.named_parameters() if hasattr(parameter, "device_mesh")]
    if names or getattr(getattr(model, "config", None), "distributed_config", None) is not None:
        raise OptionError(f"the model is sharded ({', '.join(names[:1]) or 'distributed_config'}): {UNSHARDED}")


# --- FSDP2 ------------------------------------------------------------------------------------------------


def _launched_version() -> int:
    return int(os.environ.get("FSDP_VERSION", "1"))


def fsdp_plugin(args: TrainingArguments) -> FullyShardedDataParallelPlugin | None:
    """Settings of FSDP2 from the training arguments or the launcher; None if the model is not sharded."""
    settings = getattr(args, "fsdp_plugin_args", None)
    if settings is not None:
        return FullyShardedDataParallelPlugin(**settings)
    return FullyShardedDataParallelPlugin() if parse_flag_from_env(FSDP) else None


@contextmanager
def without_fsdp(args: TrainingArguments) -> Iterator[None]:
    """Create an accelerator that does not shard.

    Accelerate would prepare one model together with its optimizer, and no module around it. Here, the model inside the
    objective is sharded by itself, after it was measured and changed, and before anchors and optimizer exist.
    """
    settings, launched = getattr(args, "fsdp_plugin_args", None), os.environ.get(FSDP)
    args.fsdp_plugin_args = None
    if launched is not None:
        os.environ[FSDP] = "false"
    try:
        yield
    finally:
        args.fsdp_plugin_args = settings
        if launched is not None:
            os.environ[FSDP] = launched


def place(args: TrainingArguments, model: nn.Module) -> None:
    """Shard a model in place if the training arguments or the launcher request it; all processes must call it.

    Raises:
        OptionError: if it cannot be sharded after its surgery.
    """
    plugin = fsdp_plugin(args)
    if plugin is None or is_sharded(model):
        return
    check_shardable(args, model)  # which surgery may have changed
    plugin.set_auto_wrap_policy(model)
    layers = fsdp2_prepare_auto_wrap_policy(plugin, model) or (lambda module: False)
    shard(model, args.device, layers, torch.bfloat16 if args.bf16 else None)


def save_training_state(optimizer: Optimizer, scheduler: Any, folder: str, keep: bool) -> None:
    """Save optimizer and scheduler as the Trainer does; the files are those of an unsharded run.

    Args:
        keep: whether this process writes.
    """
    state = whole_optimizer_state(optimizer, keep)
    if keep:
        torch.save(state, Path(folder) / OPTIMIZER_NAME)
        torch.save(scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def load_training_state(optimizer: Optimizer, scheduler: Any, folder: str) -> None:
    """Load what :func:`save_training_state`, or an unsharded run, has saved."""
    path = Path(folder)
    state = torch.load(path / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    load_optimizer_state(optimizer, state)
    scheduler.load_state_dict(torch.load(path / SCHEDULER_NAME, weights_only=True))
