"""Saving and loading: weights (strictly), and strategy states."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_ft.core.context import State
from hf_ft.errors import CheckpointError
from hf_ft.models.preserve import forget_evaluation
from hf_ft.models.sharding import is_sharded, load_tensors, load_whole, plain_class
from hf_ft.models.weight_files import COLLABORATIVE, WEIGHTS_NAME

STATE_NAME = "ft_state.safetensors"
MODULES_NAME = "ft_modules.safetensors"
BUFFERS_NAME = "ft_buffers.safetensors"
LIVE_NAME = "ft_live.safetensors"


def checked(tensors_file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: if it is missing, truncated or damaged.
    """
    try:
        with safe_open(tensors_file, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(tensors_file), metadata
    except FileNotFoundError as error:
        raise CheckpointError(f"{tensors_file} is missing: the folder is incomplete. Use another one.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{tensors_file} is damaged ({error}). Restore it, or use another one.") from error


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, as safetensors saves them: each contiguous, with its own memory.

    Modules that share weights have them under two names.
    """
    kept = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in kept.items():
        kept[name] = tensor.clone() if tensor.numel() and tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return kept


def write_states(folder: Path, states: Mapping[str, State]) -> None:
    """Write ``ft_state.safetensors``: every strategy's tensors under its name, and JSON values in the header."""
    tensors = {f"{name}/{key}": t.contiguous().cpu() for name, s in states.items() for key, t in s.tensors.items()}
    info = json.dumps({name: dict(state.info) for name, state in states.items()})
    save_file(tensors, folder / STATE_NAME, metadata={"format": "pt", "info": info})


def read_states(folder: str | Path) -> dict[str, State]:
    """Load the strategy states saved in a folder, by strategy.

    Raises:
        CheckpointError: if they are missing or damaged.
    """
    file = Path(folder) / STATE_NAME
    tensors, metadata = checked(file)
    try:
        infos = json.loads(metadata["info"])
        if not isinstance(infos, dict) or not all(isinstance(info, dict) for info in infos.values()):
            raise TypeError("not a dictionary for each strategy")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: no readable header. Restore it, or use another one.") from error
    return {
        name: State({key.partition("/")[2]: t for key, t in tensors.items() if key.partition("/")[0] == name}, info)
        for name, info in infos.items()
    }


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights saved in a folder into a model, strictly.

    They are read by the model class's own loader: for some families (ViT, Swin) the names in ``model.safetensors``
    differ from those of ``state_dict()``, so that loading the file by name would leave most weights unchanged.

    Raises:
        CheckpointError: if the weights are missing, damaged, or from another model.
    """
    folder = Path(folder)
    try:
        if isinstance(model, PeftModel):
            _load_adapter(model, folder)
        elif isinstance(model, PreTrainedModel):
            load_whole(model, _read_pretrained(model, folder))
        else:
            load_whole(model, checked(folder / WEIGHTS_NAME)[0])
    except (RuntimeError, SafetensorError, OSError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be loaded: {error}") from error
    forget_evaluation(model)


def _read_pretrained(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    with _quietly(), torch.random.fork_rng(devices=[]):
        loader: Any = plain_class(model)
        fresh, info = loader.from_pretrained(
            folder, config=copy.deepcopy(model.config), output_loading_info=True, local_files_only=True
        )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(f"the weights in {folder} do not fit the model: {wrong}. Use the model they belong to.")
    return fresh.state_dict()


def _load_adapter(model: PeftModel, folder: Path) -> None:
    adapter = model.active_adapters[0]
    tensors = load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(model, adapter_name=adapter)
    names = set(own)
    if set(tensors) != names:
        raise CheckpointError(
            f"the adapter in {folder} does not fit the model: missing {sorted(names - set(tensors))[:5]}, unexpected "
            f"{sorted(set(tensors) - names)[:5]}. Use the model and tuner they belong to."
        )
    if is_sharded(model):
        load_tensors(own, tensors)
    else:
        set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    result = model.load_state_dict(checked(folder / BUFFERS_NAME)[0], strict=False)
    if result.unexpected_keys:
        raise CheckpointError(
            f"{folder / BUFFERS_NAME} contains buffers that the model does not have: {result.unexpected_keys}."
        )


def save_buffers(model: PeftModel, folder: Path) -> None:
    """Save the buffers of a PEFT model: PEFT saves only parameters, but BatchNorm statistics may have changed."""
    buffers = {name: b.detach().cpu().contiguous() for name, b in model.named_buffers() if name in model.state_dict()}
    save_file(buffers, folder / BUFFERS_NAME)


def save_base_config(model: PeftModel, folder: Path) -> None:
    """Save the config of a PEFT model's base, which holds the class names; PEFT does not save it."""
    base = model.get_base_model()
    config = copy.deepcopy(getattr(base, "config", None))
    if isinstance(config, PreTrainedConfig) and config.model_type != COLLABORATIVE:  # its members would be searched for
        config.architectures = [type(base).__name__]
        config.save_pretrained(folder)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence progress bars and loading reports for a checkpoint of our own."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def digests(model: nn.Module) -> dict[str, str]:
    """Hash every parameter and buffer by name, so that changes can be detected without keeping a copy."""
    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def digest(tensor: Tensor) -> str:
    """Hash a tensor with its type and shape."""
    tensor = tensor.detach().cpu().contiguous()
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
