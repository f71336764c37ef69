"""What files that are meant to be shared reveal about this machine: names instead of paths, and no secrets."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

SECRET_FLAGS = ("hub_token", "token", "use_auth_token", "push_to_hub_token", "storage")
ENDS = ("_token", "_password", "_secret", "_key", ".storage", ".token")
MASK = "***"
_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"@]+@")
_QUERY = re.compile(r"(?i)([?&;](?:[\w.-]*(?:token|password|passwd|secret|key|sig|signature))=)[^&;\s'\"]+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}\b")
_FILE_URL = re.compile(r"\b(file|sqlite|journal):/+(?:[^\s'\"`,;:()<>|\\/]+/)+")
# An absolute path with at least two parts, of which the last is kept. A URL's is preceded by a slash or a letter.
_PATH = re.compile(r"(?<![\w/.:~>])(?:[A-Za-z]:[\\/]|/|~/|\\\\)(?:[^\s'\"`,;:()<>|\\/]+[\\/])+(?=[^\s'\"`,;:()<>|\\/])")


def shareable_text(text: str) -> str:
    """A text without local folders, access tokens and credentials in URLs.

    ``/home/ann/photos/cat.png`` becomes ``cat.png``, and ``mysql://ann:secret@host/studies`` becomes
    ``mysql://***@host/studies``.
    """
    text = _CREDENTIALS.sub(f"{MASK}@", text.replace(f"{Path.home()}{os.sep}", "~/"))
    text = _TOKEN.sub(f"hf_{MASK}", _QUERY.sub(rf"\1{MASK}", text))
    return _PATH.sub("", _FILE_URL.sub(r"\1:///", text))


def shareable(value: Any) -> Any:
    """Nested dictionaries, lists and tuples with :func:`shareable_text` applied to their texts."""
    if isinstance(value, str):
        return shareable_text(value)
    if isinstance(value, dict):
        return {key: shareable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(shareable, value))
    return value


def shareable_name(name: str) -> str:
    """The name of a model or of data: a Hub id or a short name as it is; for a local path, its last part."""
    local = os.path.isabs(name) or PureWindowsPath(name).is_absolute() or name.startswith((".", "~"))
    if local or name.count("/") > 1 or os.path.exists(name):
        return re.split(r"[\\/]", name.rstrip("\\/"))[-1] or "."
    return shareable_text(name)


def shareable_command(words: Iterable[str]) -> str:
    """A command line without secrets and without local paths.

    Flags that hold a secret, and the storage of a search, are left out together with their values.
    """
    kept: list[str] = []
    dropped = False
    for word in words:
        flag, given, value = word.partition("=")
        if word.startswith("--"):
            name = flag.lstrip("-").replace("-", "_")
            dropped = name in SECRET_FLAGS or name.endswith(ENDS)
            if not dropped:
                kept.append(f"{flag}={_value(value)}" if given else flag)
            dropped &= not given
        elif dropped:
            dropped = False
        else:
            kept.append(_value(word))
    return shlex.join(kept)


def _value(word: str) -> str:
    """A value of a flag; lists of names are joined by commas."""
    return ",".join(shareable_name(part) if "/" in part or "\\" in part else part for part in word.split(","))
