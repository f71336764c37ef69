"""The files of an ensemble's members, each a plain checkpoint in its own folder."""

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
from hf_ft.models.ensemble.config import CollaborativeConfig
from hf_ft.models.sharing import upload_of
from hf_ft.models.tasks import auto_model
from hf_ft.models.weight_files import member_folder

UPLOAD = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")


def write_member(
    member: Any, index: int, folder: Path, state_dict: Mapping[str, Tensor] | None, **options: Any
) -> None:
    """Save one member with its own ``save_pretrained``, which names tensors as the member's own loader expects.

    Args:
        state_dict: weights of the whole ensemble to save instead of the current ones.
        options: options of ``save_pretrained``.
    """
    prefix = f"members.{index}."
    if state_dict is not None:
        state_dict = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    member.save_pretrained(folder / member_folder(index), state_dict=state_dict, **options)


def check_count(config: Any, name: str, where: Mapping[str, Any]) -> None:
    """Reject a config whose number of members differs from that of the files, which would leave some out.

    Raises:
        CheckpointError: if the numbers differ.
    """
    count = len(config.members or [])
    file_count = len(CollaborativeConfig.get_config_dict(name, **where)[0].get("members") or [])
    if file_count != count:
        raise CheckpointError(
            f"{name} contains {file_count} members, but the config is for {count}: use the config in that folder."
        )


def read_member(
    config: CollaborativeConfig, index: int, name: str, where: Mapping[str, Any], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Load one member, with its loading info.

    Args:
        name: Hub id or folder of the ensemble.
        where: ``revision``, ``subfolder``, ``token``, ...
        options: options of ``from_pretrained``.

    Raises:
        CheckpointError: if a file is missing or damaged, or holds other weights.
    """
    member_config = config.member(index)
    place = {**where, "subfolder": "/".join(filter(None, [where.get("subfolder"), member_folder(index)]))}
    try:
        _check_config(member_config, name, place)
        # Never load a pickle.
        options = {**options, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        options["dtype"] = member_config.dtype or "auto"
        member, info = auto_model(config.task).from_pretrained(name, config=member_config, **place, **options)
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(_message(config, index, name, place, str(error))) from error
    harmless = {"mismatched_keys"} if options.get("ignore_mismatched_sizes") else set()
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names and kind not in harmless}
    if wrong:
        raise CheckpointError(_message(config, index, name, place, f"its weights do not match the model: {wrong}"))
    return member, info


def _check_config(wanted: Any, name: str, place: Mapping[str, Any]) -> None:
    try:
        model_type = AutoConfig.from_pretrained(name, trust_remote_code=False, **place).model_type
    except (ValueError, TypeError, AttributeError) as error:  # valid JSON, but not a config
        raise CheckpointError(f"{CONFIG_NAME} is damaged: {error}") from error
    if model_type != wanted.model_type:
        raise CheckpointError(f"{CONFIG_NAME} is for a {model_type}, but the ensemble needs a {wanted.model_type}")


def _message(config: CollaborativeConfig, index: int, name: str, place: Mapping[str, Any], reason: str) -> str:
    fix = "Restore its files"
    others = [other for other in range(len(config.members or [])) if other != index]
    if others:
        there = f"{place['subfolder'].removesuffix(member_folder(index))}{member_folder(others[0])}"
        fix += f", or use another member on its own: {auto_model(config.task).__name__}.from_pretrained({name!r}, "
        fix += f"subfolder={there!r})"
    return f"{name}/{place['subfolder']} is missing or damaged: {reason.rstrip('.')}. {fix}."


def merged(infos: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the loading infos of all members, with the ensemble's parameter names."""
    all_infos: dict[str, Any] = {}
    for index, info in enumerate(infos):
        for kind, names in info.items():
            full_names = [_prefixed(f"members.{index}.", name) for name in names]
            all_infos[kind] = type(names)([*all_infos.get(kind, ()), *full_names])
    return all_infos


def _prefixed(prefix: str, name: Any) -> Any:
    """Prefix a name, or the name at the start of a tuple (followed by two shapes)."""
    return prefix + name if isinstance(name, str) else (prefix + name[0], *name[1:])


def upload(folder: Path, members: int, repo_id: str | None = None, private: bool | None = None, **options: Any) -> None:
    """Upload the files of an ensemble to the Hub.

    Args:
        members: number of members; the folder may also hold those of an earlier ensemble.
        repo_id: defaults to the folder's name.
        options: ``token`` and other options of ``HfApi.upload_folder``.

    Raises:
        HubError: if they cannot be uploaded.
    """
    api = HfApi(token=options.pop("token", None))
    with upload_of(folder, repo_id):
        repo = api.create_repo(repo_id or folder.resolve().name, private=private, exist_ok=True).repo_id
        if options.get("revision") is not None:
            api.create_branch(repo, branch=options["revision"], exist_ok=True)
        # Explicit patterns, since the folder may hold a Trainer's checkpoints.
        files = [CONFIG_NAME, "README.md", *(f"{member_folder(index)}/*" for index in range(members))]
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files, **options)
