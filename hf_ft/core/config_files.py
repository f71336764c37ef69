"""Reading ``ft_config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from hf_ft.errors import CheckpointError, OptionError
from hf_ft.records import read_json

CONFIG_NAME = "ft_config.json"


def read_config_file(name_or_path: str | Path, **hub_options: Any) -> dict[str, Any]:
    """The content of ``ft_config.json``.

    Raises:
        OptionError: missing or damaged; the message names the file.
    """
    folder = Path(name_or_path)
    file = folder / CONFIG_NAME
    if not folder.is_dir():
        try:
            file = Path(str(cached_file(str(name_or_path), CONFIG_NAME, **hub_options)))
        except OSError as error:
            raise OptionError(f"{name_or_path}: no such folder, and no {CONFIG_NAME} on the Hub: {error}") from error
    if not file.is_file():
        raise OptionError(f"{folder} contains no {CONFIG_NAME}: it was not written by hf_ft.")
    try:
        content = read_json(file)
    except CheckpointError as error:  # the file holds options
        raise OptionError(str(error)) from error
    if not isinstance(content, dict) or not isinstance(content.get("strategies"), list) or not content["strategies"]:
        raise OptionError(f"{file} is damaged: it lists no strategies. Restore it, or use another checkpoint.")
    return content
