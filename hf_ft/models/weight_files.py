"""Weight files of a saved model, and whether they are complete and intact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME

WEIGHTS_NAME = "model.safetensors"
DELTA_NAME = "ft_delta.safetensors"  # what training changed in a base
INDEX_NAME = "model.safetensors.index.json"
BAD_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # damaged, or of another kind
WEIGHTS_NAMES = (WEIGHTS_NAME, INDEX_NAME, "adapter_model.safetensors")
OURS = "hf_ft_"  # prefix of the model types that Transformers only knows from this package
COLLABORATIVE = OURS + "collaborative"  # the model_type of an ensemble
GATED = OURS + "gated"  # the model_type of a model with two paths


def member_folder(index: int | str) -> str:
    """The subfolder of an ensemble's folder that holds a member."""
    return f"member_{index}"


def has_whole_weights(folder: Path) -> bool:
    """Whether all weights of a saved model, adapter or ensemble exist and no file is truncated."""
    try:
        members = _members(folder)
        whole = not any(map(damaged_file, (folder, *members)))
        return whole and all(map(_has_all, members or [folder]))
    except (OSError, *BAD_JSON):
        return False


def _members(folder: Path) -> list[Path]:
    """The folders of an ensemble's members, each with a readable config; empty for any other model."""
    if not (folder / CONFIG_NAME).exists():  # an adapter, or a model without a config
        return []
    config = _json(folder / CONFIG_NAME)
    if config.get("model_type") != COLLABORATIVE:
        return []
    members = [folder / member_folder(index) for index in range(len(config["members"]))]
    for member in members:
        _json(member / CONFIG_NAME)
    return members


@dataclass(frozen=True)
class Damaged:
    """A weight file that cannot be read."""

    file: Path
    reason: str


def damaged_file(folder: Path) -> Damaged | None:
    """The first weight file of a model that cannot be read, if any; members of an ensemble are separate models."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # checks the header against the file size
                pass
        except (SafetensorError, OSError) as error:
            return Damaged(file, str(error))
    for file in sorted(folder.glob("pytorch_model*.bin")):
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # a damaged pickle raises almost anything
            return Damaged(file, str(error) or type(error).__name__)
    index = folder / INDEX_NAME
    if index.exists():
        try:
            _shards(index)
        except (OSError, *BAD_JSON) as error:
            return Damaged(index, str(error))
    return None


def _has_all(folder: Path) -> bool:
    index = folder / INDEX_NAME
    shards = _shards(index) if index.exists() else set()
    has_weights = any((folder / name).exists() for name in WEIGHTS_NAMES)
    return has_weights and all((folder / name).exists() for name in shards)


def _shards(index: Path) -> set[str]:
    """The files that an index names."""
    files = _json(index)["weight_map"].values()
    if not all(isinstance(file, str) for file in files):
        raise TypeError("it does not map names to files")
    return set(files)


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))
