"""Reading a pretrained model's files: an error says in one line which of them is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers as hf
from huggingface_hub import try_to_load_from_cache
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file

from hf_ft.errors import CheckpointError, Error, OptionError, did_you_mean
from hf_ft.models.weight_files import DELTA_NAME, damaged_file
from hf_ft.zoo.short_names import SHORT_NAMES

_OPTIONAL: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def file_of(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a folder or a Hub id, if there is one."""
    try:
        found = cached_file(name, file, revision=revision, **_OPTIONAL)
    except OSError:  # no such repository
        return None
    return None if found is None else Path(found)


def read_config(name: str, **hub: Any) -> Any:
    """The config of a Hub id or a folder.

    Raises:
        OptionError: if there is no config, it is damaged, or Transformers does not know its model type.
    """
    try:
        return hf.AutoConfig.from_pretrained(name, **{"trust_remote_code": False, **hub})
    except Exception as error:  # a config of another shape makes Transformers raise almost anything
        absent = "" if Path(name).exists() else ", which is not a local folder"
        raise OptionError(
            f"cannot read the model {name!r}{absent}: {_reason(error)}{did_you_mean(name, SHORT_NAMES)} It may be a "
            f"Hub id, a folder written by save_pretrained, or one of {', '.join(SHORT_NAMES)}."
        ) from error


@contextmanager
def weights_of(name: str, revision: str | None = None) -> Iterator[None]:
    """Context in which the weights of a Hub id or folder are loaded: errors name the damaged file.

    Raises:
        CheckpointError: if they cannot be loaded.
    """
    try:
        yield
    except (Error, ImportError, MemoryError):
        raise
    except Exception as error:  # likewise
        if file_of(name, DELTA_NAME, revision) is not None:
            raise CheckpointError(
                f"{name} is a delta, without the weights of its base: save the model that hf_ft.load_delta({name!r}) "
                "returns, with its processor, and use that folder."
            ) from error
        if file_of(name, ADAPTER_CONFIG_NAME, revision) is not None:
            raise CheckpointError(
                f"{name} is a PEFT adapter, without the weights of its base: save the model that hf_ft.inference."
                f"load_trained({name!r}).model.merge_and_unload() returns, with its processor, and use that folder."
            ) from error
        folder = _folder(name, revision)
        damaged = None if folder is None else damaged_file(folder)
        if damaged is None:
            raise CheckpointError(f"the weights of {name} cannot be loaded: {_reason(error)}") from error
        raise CheckpointError(
            f"{damaged.file} is damaged ({damaged.reason}); perhaps only part of it was downloaded. Delete it, and "
            "download or copy it again."
        ) from error


@contextmanager
def processor_of(name: str, what: str) -> Iterator[None]:
    """Context in which the image processor or tokenizer of a Hub id or folder is loaded.

    Raises:
        OptionError: if there is none, or it is damaged.
    """
    try:
        yield
    except (Error, ImportError, MemoryError):
        raise
    except Exception as error:  # likewise
        raise OptionError(
            f"{name} has no {what} that can be read ({_reason(error)}): save that of its base model there, with "
            "save_pretrained."
        ) from error


def _folder(name: str, revision: str | None) -> Path | None:
    """The folder with a model's files, in the cache if it is a Hub id."""
    if Path(name).is_dir():
        return Path(name)
    cached = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _reason(error: Exception) -> str:
    """The beginning of the message, as a sentence; Transformers' may be many lines long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = ": ".join(line.rstrip(":") for line in lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{text or type(error).__name__}{'' if text.endswith('.') else '.'}"
