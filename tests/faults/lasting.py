"""What is the same in every repetition of a command: everything it leaves, except times, memory and the like."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

PASSING = re.compile(r"seconds|runtime|per_second|compute|memory|warnings|worker|started|finished|total_flos|^command$")
FOREIGN = ("notes.txt", "checkpoint-notes/keep.txt")  # what a user put into the folder


def lasting(folder: Path) -> dict[str, Any]:
    """The content of all files in a folder, by name; for files that contain times, only that they exist."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: _content_or_reason(file) for name, file in names.items() if name not in FOREIGN}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    found = [f"{name} is missing" for name in one if name not in other]
    found += [f"{name} is left over" for name in other if name not in one]
    return found + [
        f"{name} differs{_where(one[name], other[name])}" for name in one if other.get(name, one[name]) != one[name]
    ]


def _where(one: Any, other: Any) -> str:
    """The first place where two contents differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return f" at {key}" + _where(one.get(key), other.get(key))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        index = next(index for index, item in enumerate(one) if item != other[index])
        return f"[{index}]" + _where(one[index], other[index])
    return f": {str(one)[:60]} became {str(other)[:60]}"


def _content_or_reason(file: Path) -> Any:
    try:
        return _content(file)
    except (SafetensorError, ValueError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        return f"unreadable: {error}"


def _content(file: Path) -> Any:
    if file.suffix == ".json":
        return _still(json.loads(file.read_text(encoding="utf-8")))
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {name: _hash(opened.get_tensor(name)) for name in opened.keys()} | {  # noqa: SIM118  # no mapping
                key: _still(json.loads(text)) if text.startswith("{") else text for key, text in metadata.items()
            }
    if file.name in ("optimizer.pt", "scheduler.pt"):
        return _still(torch.load(file, weights_only=True))
    return ""


def _still(content: Any) -> Any:
    """Without times and the like; tensors as their hashes."""
    if isinstance(content, dict):
        return {str(key): _still(value) for key, value in content.items() if not PASSING.search(str(key))}
    if isinstance(content, list | tuple):
        return [_still(item) for item in content]
    return _hash(content) if isinstance(content, torch.Tensor) else repr(content)


def _hash(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
