"""What was exported, as ``export.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_ft.documents.public import shareable_name
from hf_ft.exports.check import MODEL, Comparison
from hf_ft.exports.graph import BATCH, LOGITS, Example
from hf_ft.inference.checkpoint import Trained
from hf_ft.version import __version__

RECORD = "export.json"
ACTIVATIONS = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid", "regression": "none"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Export:
    """An export.

    Attributes:
        folder: where it is.
        content: the content of ``export.json``: ``classes``, ``temperature``, ``inputs``, ``processing``, ``files``
            with size and differences, ``check`` with the data that they were measured on.
    """

    folder: Path
    content: Mapping[str, Any]

    @property
    def files(self) -> list[Path]:
        """All files, ``export.json`` last."""
        return [self.folder / name for name in (*self.content["files"], RECORD)]


def about(trained: Trained, example: Example, dtype: str) -> dict[str, Any]:
    """What is known about a model, independent of the files and the data.

    Args:
        dtype: the dtype of the checkpoint; the export is in float32.
    """
    wanted = trained.wanted
    return {
        "made_by": f"hf_ft {__version__}",
        "model": shareable_name(trained.name) if trained.name else type(trained.model).__name__,
        "task": wanted.task,
        "problem_type": wanted.problem_type,
        "classes": list(wanted.names),
        "trained_in": dtype,
        "temperature": trained.temperature,
        "activation": ACTIVATIONS[wanted.problem_type],
        "inputs": {name: _tensor(value, example.axes[name]) for name, value in example.inputs.items()},
        "outputs": {LOGITS: {"dtype": "float32", "shape": [BATCH, len(wanted.names)]}},
    }


def _tensor(value: Tensor, axes: Mapping[int, str]) -> dict[str, Any]:
    """Type and shape; free sizes have names."""
    shape = [axes.get(axis, size) for axis, size in enumerate(value.shape)]
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


def checks_of(found: Comparison) -> dict[str, dict[str, Any]]:
    """The measurements of each file."""
    return {
        name: {"largest_difference": one.largest, "agreement": one.agreement, "scores": found.scores(name)}
        for name, one in found.differences.items()
    }


def told_check(found: Comparison, tolerance: float, data: str, rows: int, sizes: Collection[int]) -> dict[str, Any]:
    """The data and batches of the measurement.

    Args:
        data: name of the data.
        rows: number of their samples.
        sizes: batch sizes that were run, besides those of the comparison.
    """
    run = next(iter(found.differences.values()))
    return {
        "data": data,
        "samples": rows - len(found.unreadable),
        "unreadable": len(found.unreadable),
        "batch_sizes": sorted({*sizes, *run.batch_sizes}),
        "tolerance": tolerance,
        "scores": found.scores(MODEL),
    }


def told_files(folder: Path, checks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file in a folder, and the measurements of some."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": _hash(file), **checks.get(file.name, {})}
        for file in sorted(folder.iterdir())
    }


def remove_earlier(folder: Path, names: Collection[str]) -> None:
    """Remove an earlier record, and the files that it names and that are not rewritten."""
    try:
        earlier = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    (folder / RECORD).unlink()
    for name in earlier:
        if name not in names and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()
