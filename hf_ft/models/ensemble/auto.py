"""Registration of our models with Transformers' Auto classes, without importing Transformers early."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from wrapt import register_post_import_hook

# Once Transformers' module is imported, ours is imported and registers itself. The model class follows when the first
# config is created: Transformers imports its model Auto classes at a time when models cannot be imported yet.
_CONFIGS, _PROCESSORS = "transformers.models.auto.configuration_auto", "transformers.models.auto.image_processing_auto"
_REGISTERING = (
    (_CONFIGS, "hf_ft.models.ensemble.config"),
    (_CONFIGS, "hf_ft.models.gated.config"),
    (_PROCESSORS, "hf_ft.models.ensemble.processor"),
)


def register_when_imported() -> None:
    """Register with the Auto classes as soon as they are imported, which may be immediately."""
    for theirs, ours in _REGISTERING:
        register_post_import_hook(_importing(ours), theirs)


def _importing(module: str) -> Callable[[object], None]:
    def hook(_: object) -> None:
        importlib.import_module(module)

    return hook
