"""Uploads to the Hub: the files of a saved model, and nothing that reveals on which machine it was trained."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from hf_ft.documents.public import shareable_name, shareable_text
from hf_ft.errors import Error, HubError, OptionError
from hf_ft.models.weight_files import member_folder
from hf_ft.version import __version__

# A folder may also hold logs, studies and other files whose names or contents reveal things about the machine, such as
# the `training_args.bin` of a plain Trainer, a pickle that holds the token.
KINDS = (".safetensors", ".json", ".md", ".txt", ".model", ".spm", ".codes", ".jinja", ".png", ".svg")
_DATA_CHECKS = "data_checks.json"  # names files of the training data
# In checkpoints: files that only a resumed run needs.
_FOR_RESUMING = ("trainer_state.json", "ft_files.json", "ft_live.safetensors", "ft_modules.safetensors")
_LOCAL_KEYS = {
    "base_model_name_or_path": shareable_name,
    "_name_or_path": shareable_name,
    "name_or_path": shareable_name,
    "best_model_checkpoint": shareable_name,
    "tokenizer_file": shareable_text,
    "special_tokens_map_file": shareable_text,
    "vocab_file": shareable_text,
}


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a saved model, adapter, ensemble or delta to the Hub, whoever saved it; the repository is created.

    Weights, configs, processors, plots and the card are uploaded, but no checkpoints, logs or other files of a training
    run; a base model with a local path is named without the path. Files that are already on the Hub are not sent again,
    so this also continues an upload that failed.

    Args:
        folder: the folder that holds the result, such as ``output_dir``.
        revision: branch to commit to, created if there is none.
        private: whether a new repository is private (default: as the account's settings say).
        token: default: that of ``hf auth login``.
        create_pr: open a pull request instead.

    Raises:
        OptionError: if the folder holds no model.
        HubError: if it cannot be uploaded.
    """
    folder = Path(folder).expanduser()
    names = model_files(folder)
    if not any(name.endswith((".safetensors", "config.json")) for name in names):
        raise OptionError(f"{folder} holds no saved model: give the folder that training or save_pretrained wrote.")
    with upload_of(folder, repo_id):
        repo_id = created(repo_id, private=private, token=token, revision=None if create_pr else revision)
        files = {name: folder / name for name in names}
        return commit(repo_id, files, commit_message, revision=revision, token=token, create_pr=create_pr)


def model_files(folder: Path) -> list[str]:
    """The files of a saved model in a folder, by their paths within it; members of an ensemble are subfolders."""
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a local folder: give the folder that holds the model.")
    found = [path for path in folder.iterdir() if path.is_file() and _belongs(path)]
    for member in folder.glob(member_folder("*")):
        found += [path for path in member.iterdir() if path.is_file() and _belongs(path)]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _belongs(file: Path) -> bool:
    if file.name.startswith((".", "_")) or file.name in (*_FOR_RESUMING, _DATA_CHECKS):
        return False
    return file.name.endswith(KINDS)


@contextmanager
def upload_of(folder: str | Path, repo_id: str | None) -> Iterator[None]:
    """Context in which a folder is uploaded.

    Raises:
        HubError: in place of what the client raises, with the folder and the command that continues.
    """
    try:
        yield
    except (Error, MemoryError):
        raise
    except Exception as error:  # from the client, the connection, or the Hub's rules for cards
        words = ["hf-ft", "push", "--model", str(folder), "--hub_model_id", repo_id or "REPOSITORY"]
        raise HubError(
            f"{repo_id or 'the model'} could not be uploaded: {reason(error)} Nothing is lost, the files are in "
            f"{folder}. {_advice(error)} `{shlex.join(words)}` uploads them."
        ) from error


def reason(error: BaseException) -> str:
    """Why a request failed, in a sentence."""
    causes = list(_causes(error))
    whole = next((cause for cause in causes if getattr(cause, "response", None) is not None), causes[-1])
    lines = [line.strip(" -") for line in str(whole).splitlines() if line.strip()]
    keep = len(lines) if isinstance(error, ValueError) and "metadata" in str(error) else 1
    text = shareable_text(" ".join(lines[:keep])).rstrip(".").removesuffix(": None")
    status = _status(error)
    named = text if status and str(status) in text else f"{status or type(whole).__name__}{': ' * bool(text)}{text}"
    return f"{named}."


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _status(error: BaseException) -> int | None:
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((found.status_code for found in responses if found is not None), None)


def _advice(error: BaseException) -> str:
    status = _status(error)
    if status in (401, 403, 404):
        return "After `hf auth login` with a token that may write there,"
    if status == 400 or isinstance(error, ValueError):
        return "Once that is fixed,"
    return "Once the connection and the Hub are available again,"


@functools.cache
def _api() -> HfApi:
    return HfApi(library_name="hf_ft", library_version=__version__)


def in_background(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A future of a call; such calls run one at a time."""
    return _api().run_as_future(function, *args, **kwargs)


def created(repo_id: str, *, private: bool | None, token: str | None, revision: str | None = None) -> str:
    """Create a repository and a branch unless they exist; returns the id, with the name of its owner."""
    found = _api().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        _api().create_branch(found, branch=revision, token=token, exist_ok=True)
    return found


def commit(
    repo_id: str,
    files: Mapping[str, Path],
    message: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload files, by their paths in the repository, in one commit."""
    operations = [CommitOperationAdd(name, shareable_file(file)) for name, file in files.items()]
    return _api().create_commit(
        repo_id, operations, commit_message=message, revision=revision, token=token, create_pr=create_pr
    )


def everything_in(folder: Path, under: str = "") -> dict[str, Path]:
    """All files of a checkpoint, by their paths in a repository."""
    files: Iterable[Path] = (path for path in folder.rglob("*") if path.is_file())
    return {str(PurePosixPath(under) / path.relative_to(folder).as_posix()): path for path in sorted(files)}


def shareable_file(file: Path) -> str | bytes:
    """A file to upload: its path, or its content without local paths if it is JSON that holds some."""
    if file.suffix != ".json":
        return str(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # not JSON: uploaded as it is
        return str(file)
    cleaned = _without_paths(content)
    return str(file) if cleaned == content else (json.dumps(cleaned, indent=2) + "\n").encode()


def _without_paths(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _cleaned(key, value) for key, value in content.items()}
    return [_without_paths(value) for value in content] if isinstance(content, list) else content


def _cleaned(key: str, value: Any) -> Any:
    clean = _LOCAL_KEYS.get(key)
    return clean(value) if clean is not None and isinstance(value, str) else _without_paths(value)
