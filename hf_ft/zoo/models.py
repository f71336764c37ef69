"""Models and data sets by short name, for the demo and the tests, in addition to any Hub id or local folder.

Short names refer to real pretrained weights and real images in installed Python packages, so they work without access
to the Hub. For contents and terms of use, see ``SHORT_NAMES`` and ``DATA_NOTICES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf
from torch import nn

from hf_ft.errors import OptionError
from hf_ft.models.ensemble.config import CollaborativeConfig
from hf_ft.models.ensemble.processor import CollaborativeTokenizer
from hf_ft.models.hub import loaded_commit
from hf_ft.models.names import covers
from hf_ft.models.source_head import SourceHead, attach_source_head, drop_source_head, head_modules, renew_head
from hf_ft.models.tasks import Task, auto_model, tasks_of
from hf_ft.zoo.datasets import _package_path
from hf_ft.zoo.image_networks import GATES, freeze_pinned_gates, image_network, image_processor, load_by_position
from hf_ft.zoo.reading import processor_of, read_config, weights_of
from hf_ft.zoo.short_names import SHORT_NAMES, ShortName

__all__ = [
    "GATES",
    "SHORT_NAMES",
    "ShortName",
    "freeze_pinned_gates",
    "from_pretrained",
    "load_by_position",
    "load_model",
    "task_of",
]

NO_HEAD = "has no pretrained head to keep."
logger = hf.utils.logging.get_logger(__name__)


PROCESSORS: dict[Task, str] = {
    "image": "image processor",
    "text": "tokenizer",
    "audio": "feature extractor",
    "video": "video processor",
}


def _short_image_model(name: str, labels: dict[str, Any], size: int | None, keep: bool) -> Any:
    model = image_network(name, size)
    if labels:
        if keep and SHORT_NAMES[name].pretrained_head:
            attach_source_head(model, SourceHead({"classifier": model.classifier}))
        elif keep:
            logger.warning(f"{name} {NO_HEAD}")
        head = nn.Linear(model.classifier.in_features, labels["num_labels"])
        nn.init.normal_(head.weight, std=model.config.initializer_range)
        nn.init.zeros_(head.bias)
        model.classifier, model.num_labels = head, labels["num_labels"]
    for key, value in labels.items():  # num_labels first, since it resets the class names
        setattr(model.config, key, value)
    return model


def _label_options(num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[str, Any]:
    if id2label is None:
        return {} if num_labels is None else {"num_labels": num_labels}
    if num_labels not in (None, len(id2label)):
        raise OptionError(f"num_labels={num_labels} does not match the {len(id2label)} classes of id2label")
    label2id = {label: index for index, label in id2label.items()}
    return {"num_labels": len(id2label), "id2label": dict(id2label), "label2id": label2id}


def task_of(config: hf.PreTrainedConfig) -> Task:
    """The task of a classifier by its config; ``OptionError`` if it fits no known task, or several."""
    if isinstance(config, CollaborativeConfig):
        return "image" if config.task == "image" else "text"
    found = tasks_of(config)
    if len(found) != 1:
        what = " and ".join(found) or "no image, text, audio or video"
        raise OptionError(f"{type(config).__name__} has {what} classification heads: choose one with task=...")
    return found[0]


def _pretrained(
    source: str, labels: dict[str, Any], auto: Any, keep: bool, head: str | None, hub: dict[str, Any]
) -> Any:
    config = read_config(source, **hub)
    if not (keep and labels):
        for (
            key,
            value,
        ) in labels.items():  # as arguments above, they would cause a warning if the checkpoint has other classes
            setattr(config, key, value)
        with weights_of(source, hub.get("revision")):
            return auto.from_pretrained(source, config=config, ignore_mismatched_sizes=True, **hub)
    if isinstance(config, CollaborativeConfig):
        raise OptionError(f"{source} is an ensemble: it has a head for each member, so no source head can be kept.")
    with weights_of(source, hub.get("revision")):
        model, info = auto.from_pretrained(source, config=config, output_loading_info=True, **hub)
    renew_head(model, labels, head)
    if any(covers(module, name) for module in head_modules(model, head) for name in info["missing_keys"]):
        drop_source_head(model)
        logger.warning(f"{source} {NO_HEAD}")
    return model


def _load(
    name_or_path: str,
    labels: dict[str, Any],
    *,
    task: Task | None = None,
    image_size: int | None = None,
    seed: int = 0,
    keep: bool = False,
    head: str | None = None,
    **hub: Any,
) -> Any:
    entry = SHORT_NAMES.get(name_or_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if entry and entry.task == "image":
            model = _short_image_model(name_or_path, labels, image_size, keep)
        else:
            source, hub = _source(name_or_path, hub)
            task = task or task_of(read_config(source, **hub))
            model = _pretrained(source, labels, auto_model(task), keep, head, hub)
            freeze_pinned_gates(model)
            model.config._commit_hash = loaded_commit(name_or_path, hub.get("revision"))
    if entry:
        model.config.name_or_path = model.name_or_path = entry.public_name
    return model.eval()


def _source(name_or_path: str, hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The location of the files, and options for reading them: never code from the Hub."""
    entry = SHORT_NAMES.get(name_or_path)
    if entry:
        return str(_package_path(entry.requirement, entry.path)), {}
    return name_or_path, {key: value for key, value in hub.items() if value is not None} | {"trust_remote_code": False}


def load_processor(
    name_or_path: str, config: hf.PreTrainedConfig, task: Task, image_size: int | None, revision: str | None
) -> Any:
    """The image or video processor, feature extractor or tokenizer of a short name, Hub id or folder.

    Raises:
        OptionError: if it is missing or cannot be read.
    """
    if name_or_path in SHORT_NAMES and task == "image":
        return image_processor(name_or_path, image_size)
    source, hub = _source(name_or_path, {"revision": revision})
    size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
    with processor_of(name_or_path, PROCESSORS[task]):
        if task == "image":
            return hf.AutoImageProcessor.from_pretrained(source, **size, **hub)
        if task == "audio":
            return hf.AutoFeatureExtractor.from_pretrained(source, **hub)
        if task == "video":
            return hf.AutoVideoProcessor.from_pretrained(source, **size, **hub)
        if isinstance(config, CollaborativeConfig) and len(set(config.inputs or [])) > 1:
            return CollaborativeTokenizer.from_pretrained(source, revision=revision)
        return hf.AutoTokenizer.from_pretrained(source, **hub)


def load_model(
    name_or_path: str,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    *,
    task: Task | None = None,
    image_size: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    keep_source_head: bool = False,
    head: str | None = None,
) -> tuple[hf.PreTrainedModel, Any]:
    """Load a classifier and its image or video processor, feature extractor or tokenizer, without code from the Hub.

    Args:
        name_or_path: a name of ``SHORT_NAMES``, a Hub id, or a folder written by ``save_pretrained``.
        num_labels: number of classes of the new head. Without it and ``id2label`` the checkpoint keeps its own head; a
            Hub id or folder also keeps a head that already has this size.
        task: required only if the config fits classifiers of several tasks, and does not name one.
        image_size: side in pixels of a plain square resize without a crop (default: the checkpoint's setting, or
            that of the short name).
        seed: seed of a new head's weights; the global RNG state is restored.
        keep_source_head: keep the pretrained head alongside the new one, for strategies that continue to train it; the
            head is then new even if the old one would fit. Nothing is loaded twice.
        head: name of the head to keep, if it cannot be found automatically (as the strategy's option of that name).

    Raises:
        OptionError: if the model's config, or its processor or tokenizer, is missing or cannot be read.
        CheckpointError: if the weights cannot be loaded; the message names the damaged file.
        OptionError: if a head cannot be kept.
        ImportError: if a short name's package is missing; the message contains the pip command.
        OptionError: if ``num_labels`` and ``id2label`` disagree, or if the task cannot be determined.
    """
    more: dict[str, Any] = {"task": task, "image_size": image_size, "seed": seed, "revision": revision}
    model = _load(name_or_path, _label_options(num_labels, id2label), keep=keep_source_head, head=head, **more)
    return model, load_processor(name_or_path, model.config, task or task_of(model.config), image_size, revision)


def from_pretrained(
    name_or_path: str, num_labels: int | None = None, id2label: Mapping[int, str] | None = None, **options: Any
) -> hf.PreTrainedModel:
    """Load a classifier with a new head, and keep the pretrained head alongside it.

    The pretrained head is for strategies that preserve its knowledge (SoftConfig, LwFConfig, CoTuningConfig). It is
    not part of the model: it is neither saved with it nor among its parameters, and it is dropped after training.
    Nothing is loaded twice, and no code from the Hub is run.

    Args:
        name_or_path: a Hub id, a folder, or a name of ``SHORT_NAMES``.
        num_labels: number of classes of the new head; or ``id2label``, their names.
        options: ``task``, ``image_size``, ``seed``, ``head`` as in :func:`load_model`; other options are passed to
            Transformers' ``from_pretrained`` (``revision``, ``dtype``, ...).

    Raises:
        OptionError: if a head cannot be kept.
        OptionError: if no classes are given.
    """
    if num_labels is None and id2label is None:
        raise OptionError("from_pretrained: num_labels or id2label is required, for the classes of the new head.")
    return _load(name_or_path, _label_options(num_labels, id2label), keep=True, **options)
