"""The checkpoint folders of a run: which are complete, and how one gets its name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from transformers.utils import logging

from hf_ft.core.config_files import read_config_file
from hf_ft.engine.checkpoint import read_states
from hf_ft.errors import CheckpointError
from hf_ft.models.weight_files import has_whole_weights

logger = logging.get_logger(__name__)
TRAINER_STATE = "trainer_state.json"
INCOMPLETE = "incomplete-"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint can be resumed from: all its files exist and are intact."""
    try:
        json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        read_config_file(folder)
        read_states(folder)
        return has_whole_weights(folder)
    except (OSError, ValueError):
        return False


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    folders = [(int(m[1]), p) for p in Path(output_dir).glob("checkpoint-*") if (m := _CHECKPOINT.match(p.name))]
    return [path for _, path in sorted(folders)]


def last_checkpoint(output_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run; incomplete ones are skipped.

    Raises:
        CheckpointError: if there is none.
    """
    for folder in reversed(checkpoints(output_dir)):
        if is_complete(folder):
            return folder
        logger.warning(f"{folder} is incomplete or damaged; skipping it.")
    raise CheckpointError(f"no complete checkpoint in {output_dir}: start without resume_from_checkpoint.")


def remove_incomplete(output_dir: str | Path) -> None:
    """Delete partially written checkpoints of a killed process."""
    for folder in Path(output_dir).glob(f"{INCOMPLETE}*"):
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(written: Path, final: Path) -> None:
    """Rename a completely written folder to its final name; an existing one is only removed once replaced."""
    if final.exists():
        old = final.with_name(f"{INCOMPLETE}old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        written.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        written.rename(final)
