"""Sharded training is rejected by name, however it was asked for, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainingArguments

from hf_ft.errors import OptionError

SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # in accelerate's environment variables and distributed types
LAUNCHED = (*SHARDED, "PARALLELISM_CONFIG")
ARGUMENTS = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config")
UNSHARDED = (
    "sharded training (DeepSpeed ZeRO, FSDP, tensor parallelism) is not supported, since strategies address individual "
    "parameters. Use DDP (accelerate launch --multi_gpu), and for less memory gradient_checkpointing=True, smaller "
    "batches with gradient accumulation, bf16=True, optim='adamw_bnb_8bit', or adapters."
)


def check_launcher() -> None:
    """Reject what ``accelerate launch`` sets in the environment, by its flags or from its config file.

    Raises:
        OptionError: naming the flag.
    """
    for name in LAUNCHED:
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            flag = name.lower()
            raise OptionError(f"accelerate launch --use_{flag} (or {flag} in its config file): {UNSHARDED}")


def check_sharding(args: TrainingArguments | Mapping[str, Any]) -> None:
    """Reject arguments that shard the model, and a launcher that does.

    Args:
        args: training arguments, or those that were given.

    Raises:
        OptionError: naming the argument.
    """
    given = args if isinstance(args, Mapping) else {name: getattr(args, name, None) for name in ARGUMENTS}
    for name in ARGUMENTS:
        # Without fsdp, its config holds defaults alone.
        if given.get(name) and (name != "fsdp_config" or isinstance(args, Mapping)):
            raise OptionError(f"args.{name}={given[name]!r}: {UNSHARDED}")
    check_launcher()


def check_accelerator(accelerator: Accelerator) -> None:
    """Reject sharded training, however it was configured.

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
