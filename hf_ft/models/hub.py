"""Model names on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers.utils import CONFIG_NAME


def base_model_id(name: str | None) -> str | None:
    """The base model for a model card: a Hub id, never a local path (which the Hub rejects)."""
    if not name or os.path.isabs(name) or os.path.exists(name) or name.startswith((".", "~")):
        return None
    parts = name.split("/")
    plain = all(part and all(c.isalnum() or c in "-_." for c in part) for part in parts)
    return name if plain and len(parts) <= 2 else None


def loaded_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a Hub model that was last loaded from a branch or tag; None for any other name."""
    known = base_model_id(name)
    found = None if known is None else try_to_load_from_cache(known, CONFIG_NAME, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None
