"""The checkpoint folders of a run: which are complete, and how a folder gets its final name."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

from hf_ft.core.config_files import read_config_file
from hf_ft.engine.checkpoint import BUFFERS_NAME, read_states
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.models.weight_files import has_whole_weights
from hf_ft.processes import is_gone, process_name

logger = logging.get_logger(__name__)
TRAINER_STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
FILE_LIST = "ft_files.json"
INCOMPLETE = "incomplete-"
_ARCHIVES = (".pt", ".pth")  # as written by torch.save
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# What a model is loaded from, as `save_pretrained` names it: other files may be the user's.
_LOADED = (
    *(ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, BUFFERS_NAME),
    *(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-?????-of-?????.safetensors"),
)
# As named by `incomplete`.
_WRITER = re.compile(rf"^{INCOMPLETE}((?:[0-9a-f]{{12}}-\d+-)?\d+)-(?:old-.+|checkpoint-\d+|files)$")


def seal(folder: Path) -> None:
    """List the files of a completely written folder, and wait until all of it is on disk."""
    listed = (file for file in folder.rglob("*") if file.suffix in (*_ARCHIVES, ".safetensors", ".json"))
    names = sorted(file.relative_to(folder).as_posix() for file in listed)
    (folder / FILE_LIST).write_text(json.dumps(names, indent=1), encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk: otherwise, a power failure can leave a name without its content."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and flushes only writable files
        return
    opened = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check_complete(folder: Path) -> None:
    """Check that a run can be resumed from a checkpoint: all its files exist and are intact. Executes nothing in them.

    Raises:
        CheckpointError: if it cannot; the message names the file.
        OptionError: if ``ft_config.json`` is missing or damaged.
    """
    read_config_file(folder)
    read_states(folder)
    names = _listed(folder)
    if OPTIMIZER not in names:
        raise CheckpointError(
            f"{folder} was saved with save_only_model=True, without the optimizer, the schedule and the random states: "
            "no run can be resumed from it. Use another checkpoint, or start without resume_from_checkpoint."
        )
    for name in (TRAINER_STATE, *names):
        _check_intact(folder / name)
    if not has_whole_weights(folder):
        raise CheckpointError(f"the weights in {folder} are incomplete or damaged. Use another checkpoint.")


def _listed(folder: Path) -> list[str]:
    """The files that :func:`seal` listed."""
    file = folder / FILE_LIST
    if not file.exists():  # written by an earlier version
        random_states = [found.name for found in folder.glob("rng_state*.pth")]
        return [OPTIMIZER, "scheduler.pt", *(random_states or ["rng_state.pth"])]
    _check_intact(file)
    return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))]


def _check_intact(file: Path) -> None:
    try:
        if file.name == TRAINER_STATE:
            TrainerState.load_from_json(str(file))
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):  # checks the header against the file size
                pass
        else:
            _check_archive(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete. Use another one.") from error
    except (OSError, TypeError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Restore it, or use another checkpoint.") from error


def _check_archive(file: Path) -> None:
    """Check a file of ``torch.save``, a zip archive, by its checksums: unpickling could execute code."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} in it has another checksum")


def is_complete(folder: Path) -> bool:
    """Whether a run can be resumed from a checkpoint; see :func:`check_complete`."""
    try:
        check_complete(folder)
    except (CheckpointError, OptionError):
        return False
    return True


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    folders = [(int(m[1]), p) for p in Path(output_dir).glob("checkpoint-*") if (m := _CHECKPOINT.match(p.name))]
    return [path for _, path in sorted(folders)]


def last_checkpoint(output_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run; incomplete ones are skipped.

    Raises:
        CheckpointError: if there is none.
    """
    reasons = []
    for folder in reversed(checkpoints(output_dir)):
        try:
            check_complete(folder)
        except (CheckpointError, OptionError) as error:
            logger.warning(f"skipping {folder.name}: {error}")
            reasons.append(f" The newest: {error}")
        else:
            return folder
    raise CheckpointError(
        f"no complete checkpoint in {output_dir}: start without resume_from_checkpoint.{''.join(reasons[:1])}"
    )


def remove_incomplete(output_dir: str | Path) -> None:
    """Delete what this process, or one that is gone, wrote only in part, and nothing with other names."""
    for folder in Path(output_dir).glob(f"{INCOMPLETE}*"):
        if (match := _WRITER.match(folder.name)) and (match[1] == process_name() or is_gone(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def incomplete(final: Path, process: str | None = None) -> Path:
    """The folder in which a process, by default this one, writes what becomes ``final``."""
    return final.with_name(f"{INCOMPLETE}{process or process_name()}-{final.name}")


@contextmanager
def files_written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved to ``folder`` once all are written; if that fails, nothing is left."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_incomplete(folder)
    written = incomplete(folder / "files")
    written.mkdir()
    try:
        yield written
        for path in sorted(written.iterdir()):
            final = folder / path.name
            if path.is_dir():  # a member of an ensemble
                move_into_place(path, final)
            else:
                os.replace(path, final)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def remove_replaced(folder: Path, saved: Collection[str], ours: bool) -> None:
    """Remove the weights that an earlier save left, since loaders prefer an adapter, and one file to several.

    Args:
        saved: names of the files that were saved now.
        ours: whether the earlier save was ours; otherwise, there is only a warning.
    """
    left = [path for pattern in _LOADED for path in sorted(folder.glob(pattern)) if path.name not in saved]
    if ours:
        for path in left:
            path.unlink()
    elif left:
        logger.warning(
            f"{folder} also contains {', '.join(path.name for path in left)}, not written by hf_ft: loaders may use "
            "it in place of what was saved now. Move it, or save to another folder."
        )


def move_into_place(written: Path, final: Path) -> None:
    """Rename a completely written folder to its final name; an existing one is only removed once replaced."""
    if final.exists():
        old = incomplete(final.with_name(f"old-{final.name}"))
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        written.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        written.rename(final)
    _flush(final.parent)
