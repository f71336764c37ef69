"""An ensemble of pretrained sources: each provides a member and its processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

from hf_ft.errors import CheckpointError, OptionError
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.processor import combined, distinct
from hf_ft.models.hub import base_model_id
from hf_ft.models.source_head import drop_source_head
from hf_ft.models.tasks import Task
from hf_ft.zoo.models import SHORT_NAMES, load_model, task_of
from hf_ft.zoo.reading import read_config


def load_sources(
    source_models: Sequence[str],
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    *,
    image_size: int | None = None,
    seed: int = 0,
    prediction: str = "sum",
    task: Task | None = None,
    revision: str | None = None,
) -> tuple[CollaborativeModel, Any]:
    """Load an ensemble with one member per source, and its image processor or tokenizer.

    Args:
        source_models: names of ``SHORT_NAMES``, Hub ids or folders; duplicates are allowed.
        num_labels: number of classes of the new heads; or ``id2label``, their names. Without both, each source keeps
            its own head.
        image_size: side in pixels of a plain square resize, for all sources; by default each source's own.
        seed: the head of member j is initialised with ``seed + j``.
        prediction: ``sum`` or ``mean_probability``.
        task: required only if a config does not distinguish an image from a text classifier.
        revision: revision of all Hub ids.

    Raises:
        CheckpointError: if the weights of a source cannot be loaded.
        OptionError: if there are no sources, if they are incompatible, or if one has no processor.
    """
    names = [source_models] if isinstance(source_models, str) else list(source_models)
    if not names:
        raise OptionError("source_models is empty: give at least one pretrained model.")
    options: dict[str, Any] = {"task": task, "image_size": image_size, "revision": revision}
    loaded = [_load(name, num_labels, id2label, seed=seed + j, **options) for j, name in enumerate(names)]
    models, processors = [list(part) for part in zip(*loaded, strict=True)]
    tasks = [task or task_of(model.config) for model in models]
    if len(set(tasks)) > 1:
        kinds = ", ".join(f"{name} ({kind})" for name, kind in zip(names, tasks, strict=True))
        raise OptionError(f"source_models: {kinds}; use sources for one task.")
    sources = [base_model_id(model.config.name_or_path) for model in models]
    ensemble = CollaborativeModel.from_members(models, distinct(processors)[1], prediction, sources)
    ensemble.config.ancestors = [_ancestor(name) or source for name, source in zip(names, sources, strict=True)]
    return ensemble, combined(processors)


def _load(name: str, num_labels: int | None, id2label: Mapping[int, str] | None, **options: Any) -> tuple[Any, Any]:
    """Load a source with a new head, even if its own would fit: otherwise, duplicates would be identical members."""
    try:
        classes = num_labels if id2label is None else len(id2label)
        fits = classes is not None and has_head(name, classes, options["revision"])
        model, processor = load_model(name, num_labels, id2label, keep_source_head=fits, **options)
    except CheckpointError:  # names the damaged file
        raise
    except (OSError, ValueError) as error:  # Transformers' messages may be long and may not name the source
        reason = str(error).strip().splitlines()[0]
        raise OptionError(
            f"source_models: {name}: {reason} Give Hub ids, folders written by save_pretrained, or "
            f"{', '.join(SHORT_NAMES)}, all of one task."
        ) from error
    if isinstance(model, CollaborativeModel):
        raise OptionError(f"source_models: {name} is itself an ensemble: give the sources of its members instead.")
    vocabulary = getattr(processor, "get_vocab", None)
    # Transformers creates an empty tokenizer if a folder has none.
    if vocabulary is not None and set(vocabulary()) <= set(processor.all_special_tokens):
        raise OptionError(
            f"source_models: {name} has no tokenizer: save that of its base model there, with save_pretrained."
        )
    return drop_source_head(model), processor


def has_head(name: str, classes: int | None, revision: str | None) -> bool:
    """Whether a source's checkpoint has a head, for this number of classes or (None) any."""
    if name in SHORT_NAMES:
        return False
    config = read_config(name, revision=revision or "main")
    fits = classes is None or config.num_labels == classes
    return fits and any("Classification" in kind for kind in config.architectures or [])


def _ancestor(name: str) -> str | None:
    """The base model named by the model card in a folder."""
    card = Path(name) / "README.md"
    if name in SHORT_NAMES or not card.is_file():
        return None
    try:
        base = (metadata_load(card) or {}).get("base_model")
    except (ValueError, YAMLError):  # a README that is not a model card
        return None
    bases = base if isinstance(base, list) else [base]
    return base_model_id(bases[0]) if len(bases) == 1 and isinstance(bases[0], str) else None
