"""Model names on the Hub."""

from __future__ import annotations

import os


def base_model_id(name: str | None) -> str | None:
    """The base model for a model card: a Hub id, never a local path (which the Hub rejects)."""
    if not name or os.path.isabs(name) or os.path.exists(name) or name.startswith((".", "~")):
        return None
    parts = name.split("/")
    plain = all(part and all(c.isalnum() or c in "-_." for c in part) for part in parts)
    return name if plain and len(parts) <= 2 else None
