"""Deltas: the tensors and buffers that training changed, with the name, revision and hash of the base."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from hf_ft.core.compose import shared_option
from hf_ft.core.config import FTConfig, write_configs
from hf_ft.engine.checkpoint import checked, digest, digests
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.names import covers
from hf_ft.models.sharding import plain_class
from hf_ft.models.weight_files import COLLABORATIVE, DELTA_NAME
from hf_ft.zoo.bases import load_base


@dataclass(frozen=True)
class Base:
    """The model that a delta belongs to.

    Attributes:
        name: Hub id, or the last part of a local path; None if unknown.
        revision: commit on the Hub.
        sha256: hash of its tensors without the head.
        head: names of the head's modules, which every fine-tuning run initialises anew.
    """

    name: str | None
    revision: str | None
    sha256: str
    head: tuple[str, ...]


def base_digest(hashes: Mapping[str, str], head: tuple[str, ...]) -> str:
    """One hash of a base model without its head, which every fine-tuning run initialises anew."""
    body = sorted(item for item in hashes.items() if not any(covers(prefix, item[0]) for prefix in head))
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def save_delta(
    model: nn.Module,
    folder: str | Path,
    base: Mapping[str, str],
    configs: tuple[FTConfig, ...],
    base_name: str | None,
    base_revision: str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save only the difference from the base: ``ft_delta.safetensors``, ``ft_config.json``, ``config.json``.

    Args:
        model: model after training.
        base: :func:`digests` of the model before training.
        base_name: Hub id of the base, from which :func:`load_delta` fetches it.
        base_revision: its commit there.
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
        if any(covers(prefix, name) for prefix in head) or digest(tensor) != base[name]
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"name": base_name, "revision": base_revision, "sha256": base_digest(base, head), "head": list(head)}
    save_file(delta, folder / DELTA_NAME, metadata={"format": "pt", "base": json.dumps(info)})
    write_configs(folder, configs, base_model=info)
    if isinstance(model, PreTrainedModel):
        config = copy.deepcopy(model.config)
        config.architectures = [plain_class(model).__name__]
        config.save_pretrained(folder)


def load_delta(
    base: nn.Module | str | Path,
    path: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Any:
    """Restore the fine-tuned model, bit for bit, from a delta and its base, which is checked by its hash.

    ``load_delta("user/delta")`` also loads the base, by the id and the revision that the delta names.

    Args:
        base: the base model with a head of the right size (modified in place), or its Hub id or folder; as the only
            argument the delta, as ``path``.
        path: folder or Hub id of the delta.
        revision: branch, tag or commit of the delta on the Hub.
        token: for private repositories (default: that of ``hf auth login``).

    Raises:
        CheckpointError: for another base, or a file that is missing or damaged.
        OptionError: if no delta is given, or the delta does not name its base.
    """
    given: nn.Module | str | None = base if isinstance(base, nn.Module) else str(base)
    if path is None:
        if isinstance(base, nn.Module):
            raise OptionError("load_delta: no delta is given: pass its folder or Hub id after the model.")
        given, path = None, base
    folder = _delta_folder(path, revision, token)
    tensors, needed = _read(folder)
    model = given if isinstance(given, nn.Module) else _load_base(given, needed, folder, str(path), token)
    found = base_digest(digests(model), needed.head)
    if found != needed.sha256:
        raise CheckpointError(
            f"{'this model' if model is base else given or needed.name} is not the base of {path}: its hash without "
            f"the head is {found[:12]}, but {needed.sha256[:12]} ({needed.name or 'unnamed'}) is needed: "
            "pass the base itself, loaded with the revision it was trained from, before the delta."
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


def base_of(folder: str | Path) -> Base:
    """The base that a delta in a folder names.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    return _read(Path(folder))[1]


def _read(folder: Path) -> tuple[dict[str, Tensor], Base]:
    file = folder / DELTA_NAME
    tensors, metadata = checked(file)
    try:
        info = json.loads(metadata["base"])
        return tensors, Base(info["name"], info.get("revision"), str(info["sha256"]), tuple(info["head"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: no readable header. Restore it.") from error


def _delta_folder(path: str | Path, revision: str | None, token: str | None) -> Path:
    """The folder with the files of a delta; from the Hub, that of one commit in the cache."""
    if Path(path).is_dir():
        return Path(path)
    try:
        file = str(cached_file(str(path), DELTA_NAME, revision=revision, token=token))
        cached_file(str(path), CONFIG_NAME, revision=extract_commit_hash(file, None), token=token)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{path} is not a local folder, and no delta can be read from the Hub: {reason}."
        ) from error
    return Path(file).parent


def _load_base(given: str | None, needed: Base, folder: Path, path: str, token: str | None) -> Any:
    name = given or needed.name
    if name is None:
        raise OptionError(f"{path} does not name its base: pass the base's Hub id or folder before the delta's.")
    config = AutoConfig.from_pretrained(folder)
    loader = _model_class(config, path)
    try:
        if needed.revision is not None and name == needed.name:
            try:
                return load_base(name, config, loader, needed.revision, token=token)[0]
            except OSError:  # the commit may be gone, or only another one cached: the hash decides
                pass
        return load_base(name, config, loader, token=token)[0]
    except OSError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{name}, the base of {path}, cannot be loaded: {reason}. Pass its Hub id or folder before the delta's."
        ) from error


def _model_class(config: Any, path: str) -> Any:
    if config.model_type == COLLABORATIVE:
        return transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(f"{path}: config.json names no model class of Transformers: {name!r}. Restore it.")
    return found
