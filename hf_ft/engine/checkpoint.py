"""Saving and loading: weights (strictly), strategy states, and deltas."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_ft.core.compose import shared_option
from hf_ft.core.config import FTConfig, write_configs
from hf_ft.core.context import State
from hf_ft.errors import CheckpointError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.names import covers
from hf_ft.models.preserve import forget_evaluation
from hf_ft.models.sharding import is_sharded, load_tensors, load_whole, plain_class
from hf_ft.models.weight_files import COLLABORATIVE, WEIGHTS_NAME

STATE_NAME = "ft_state.safetensors"
DELTA_NAME = "ft_delta.safetensors"
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
    """The tensors on the CPU, as safetensors saves them: each contiguous, with memory of its own.

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
        CheckpointError: if the weights are missing, damaged, or of another model.
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
    """Save the config of a PEFT model's base, which PEFT does not: it has the names of the classes."""
    base = model.get_base_model()
    config = copy.deepcopy(getattr(base, "config", None))
    if isinstance(config, PreTrainedConfig) and config.model_type != COLLABORATIVE:  # its members would be looked for
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


# --- deltas -----------------------------------------------------------------------------------------------


def digests(model: nn.Module) -> dict[str, str]:
    """Hash every parameter and buffer by name, so that changes can be detected without keeping a copy."""
    return {name: _digest(tensor) for name, tensor in model.state_dict().items()}


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def base_digest(hashes: Mapping[str, str], head: tuple[str, ...]) -> str:
    """One hash of a base model without its head, which every fine-tuning initialises anew."""
    body = sorted(item for item in hashes.items() if not any(covers(prefix, item[0]) for prefix in head))
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def save_delta(
    model: nn.Module,
    folder: str | Path,
    base: Mapping[str, str],
    configs: tuple[FTConfig, ...],
    base_name: str | None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save only the difference from the base: ``ft_delta.safetensors``, ``ft_config.json``, ``config.json``.

    Args:
        model: model after training.
        base: :func:`digests` of the model before training.
        base_name: Hub id of the base, for information.
        state: the model's state dict with whole tensors, if it is sharded.

    Raises:
        CheckpointError: for a PEFT model (its adapter is its delta), or a model whose tensors differ from its base's.
    """
    if isinstance(model, PeftModel):
        raise CheckpointError("a PEFT adapter is already a delta: use save_model or model.save_pretrained.")
    state = model.state_dict() if state is None else state
    if set(state) != set(base):
        raise CheckpointError("the model has different tensors from its base: use save_model, which saves all of them.")
    head = anatomy(model, shared_option(configs, "head"), shared_option(configs, "blocks")).head.modules
    delta = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in state.items()
        if any(covers(prefix, name) for prefix in head) or _digest(tensor) != base[name]
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base_info = {"name": base_name, "sha256": base_digest(base, head), "head": list(head)}
    save_file(delta, folder / DELTA_NAME, metadata={"format": "pt", "base": json.dumps(base_info)})
    write_configs(folder, configs, base_model=base_info)
    if isinstance(model, PreTrainedModel):
        config = copy.deepcopy(model.config)
        config.architectures = [plain_class(model).__name__]
        config.save_pretrained(folder)


def load_delta(base: nn.Module | str, path: str | Path) -> nn.Module:
    """Restore the fine-tuned model, bit for bit, from its base and a delta saved by :func:`save_delta`.

    Args:
        base: the base model with a head of the right size (modified in place), or its Hub id or folder, from which
            it is loaded with the head of the delta.

    Raises:
        CheckpointError: for another base or a damaged file.
    """
    folder = Path(path)
    tensors, metadata = checked(folder / DELTA_NAME)
    try:
        base_info = json.loads(metadata["base"])
        wanted, head, base_name = str(base_info["sha256"]), tuple(base_info["head"]), base_info["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / DELTA_NAME} is damaged: no readable header. Restore it.") from error
    model = _load_base(base, folder) if isinstance(base, str) else base
    digest = base_digest(digests(model), head)
    if digest != wanted:
        raise CheckpointError(
            f"{base if isinstance(base, str) else 'this model'} is not the base of {folder}: its hash without the head "
            f"is {digest[:12]}, but {wanted[:12]} ({base_name or 'unnamed'}) is needed."
        )
    try:
        result = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / DELTA_NAME} does not fit the base: {error}") from error
    if result.unexpected_keys:
        raise CheckpointError(
            f"{folder / DELTA_NAME} contains tensors that the base does not have: {result.unexpected_keys[:5]}."
        )
    return model


def _load_base(name: str, folder: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == COLLABORATIVE:
        model_class: Any = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    else:
        model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
