"""The files of an ensemble's members: each a plain checkpoint in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME

from hf_ft.errors import CheckpointError
from hf_ft.models.ensemble.config import CollaborativeConfig, auto_model
from hf_ft.models.weight_files import member_folder

UPLOAD = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


def write_member(
    member: Any, index: int, folder: Path, state_dict: Mapping[str, Tensor] | None, **options: Any
) -> None:
    """Write one member by its own ``save_pretrained``, which names its tensors as its own loader expects.

    Args:
        state_dict: weights of the whole ensemble to write instead of the present ones.
        options: of any model's ``save_pretrained``.
    """
    prefix = f"members.{index}."
    if state_dict is not None:
        state_dict = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    member.save_pretrained(folder / member_folder(index), state_dict=state_dict, **options)


def check_count(config: Any, name: str, where: Mapping[str, Any]) -> None:
    """Refuse a config that names another number of members than there are, of which some would be left out.

    Raises:
        CheckpointError: it does.
    """
    wanted = len(config.members or [])
    found = len(CollaborativeConfig.get_config_dict(name, **where)[0].get("members") or [])
    if found != wanted:
        raise CheckpointError(
            f"{name} holds {found} members, the config is of {wanted}: take the config that is there."
        )


def read_member(
    config: CollaborativeConfig, index: int, name: str, where: Mapping[str, Any], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """One member and its loading info.

    Args:
        name: Hub id or folder of the ensemble.
        where: ``revision``, ``subfolder``, ``token``, ...
        options: of any model's ``from_pretrained``.

    Raises:
        CheckpointError: a file is missing or damaged, or holds other weights.
    """
    wanted = config.member(index)
    place = {**where, "subfolder": "/".join(filter(None, [where.get("subfolder"), member_folder(index)]))}
    try:
        _check_config(wanted, name, place)
        # Never a pickle.
        options = {**options, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        options["dtype"] = wanted.dtype or "auto"
        member, info = auto_model(config.task).from_pretrained(name, config=wanted, **place, **options)
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(_message(config, index, name, place, str(error))) from error
    allowed = {"mismatched_keys"} if options.get("ignore_mismatched_sizes") else set()
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names and kind not in allowed}
    if wrong:
        raise CheckpointError(_message(config, index, name, place, f"its weights are not the model's: {wrong}"))
    return member, info


def _check_config(wanted: Any, name: str, place: Mapping[str, Any]) -> None:
    try:
        found = AutoConfig.from_pretrained(name, trust_remote_code=False, **place).model_type
    except (ValueError, TypeError, AttributeError) as error:  # JSON, but no config
        raise CheckpointError(f"{CONFIG_NAME} is damaged: {error}") from error
    if found != wanted.model_type:
        raise CheckpointError(f"{CONFIG_NAME} is of a {found}, that of the ensemble wants a {wanted.model_type}")


def _message(config: CollaborativeConfig, index: int, name: str, place: Mapping[str, Any], reason: str) -> str:
    fix = "Restore its files"
    others = [other for other in range(len(config.members or [])) if other != index]
    if others:
        there = f"{place['subfolder'].removesuffix(member_folder(index))}{member_folder(others[0])}"
        fix += f", or use another member alone: {auto_model(config.task).__name__}.from_pretrained({name!r}, "
        fix += f"subfolder={there!r})"
    return f"{name}/{place['subfolder']} is missing or damaged: {reason.rstrip('.')}. {fix}."


def merged(infos: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The loading infos of all members as one, in the names of the ensemble."""
    found: dict[str, Any] = {}
    for index, info in enumerate(infos):
        for kind, names in info.items():
            prefixed = [_prefixed(f"members.{index}.", name) for name in names]
            found[kind] = type(names)([*found.get(kind, ()), *prefixed])
    return found


def _prefixed(prefix: str, name: Any) -> Any:
    """A name, or a tuple that begins with one (and the two shapes)."""
    return prefix + name if isinstance(name, str) else (prefix + name[0], *name[1:])


def upload(folder: Path, members: int, repo_id: str | None = None, private: bool | None = None, **options: Any) -> None:
    """Put the files of an ensemble on the Hub.

    Args:
        members: how many it has; the folder may hold more, of an earlier one.
        repo_id: by default the folder's name.
        options: ``token``, and what else ``HfApi.upload_folder`` takes.
    """
    api = HfApi(token=options.pop("token", None))
    repo = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True).repo_id
    if options.get("revision") is not None:
        api.create_branch(repo, branch=options["revision"], exist_ok=True)
    # By patterns: the folder may hold a Trainer's checkpoints.
    files = [CONFIG_NAME, "README.md", *(f"{member_folder(index)}/*" for index in range(members))]
    api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, **options)
