"""Weight files of a saved model, and whether they are complete and intact."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAMES = (WEIGHTS_NAME, INDEX_NAME, "adapter_model.safetensors")
COLLABORATIVE = "hf_ft_collaborative"  # the model_type of an ensemble


def member_folder(index: int | str) -> str:
    """The subfolder of an ensemble's folder that holds a member."""
    return f"member_{index}"


def has_whole_weights(folder: Path) -> bool:
    """Whether all weights of a saved model, adapter or ensemble exist and no file is truncated."""
    try:
        members = _members(folder)
        return all(map(_readable, (folder, *members))) and all(map(_has_all, members or [folder]))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # damaged JSON, or JSON of another kind
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


def _readable(folder: Path) -> bool:
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):  # checks the header against the file size
                pass
        except SafetensorError:
            return False
    return True


def _has_all(folder: Path) -> bool:
    index = folder / INDEX_NAME
    shards = set(_json(index)["weight_map"].values()) if index.exists() else set()
    has_weights = any((folder / name).exists() for name in WEIGHTS_NAMES)
    return has_weights and all((folder / name).exists() for name in shards)


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))
