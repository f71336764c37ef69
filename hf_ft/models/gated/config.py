"""The config of a model with two paths: its classifier's config and the settings of its gate."""

from __future__ import annotations

import copy
import importlib
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ft.errors import OptionError
from hf_ft.models.tasks import TASKS, classes_of
from hf_ft.models.weight_files import GATED

# By name: this module is imported before Transformers' models can be imported (see `hf_ft.models.ensemble.auto`).
_MODEL = "hf_ft.models.gated.model"
_SHARED = ("id2label", "label2id", "problem_type")


class GatedConfig(PreTrainedConfig):
    """Config of a saved model with two paths; labels and ``problem_type`` are those of its classifier.

    In memory, such a model has the config of its classifier.

    Attributes:
        base: the classifier's config as a dict, with ``model_type`` and ``architectures``.
        gate: the settings of the gate, with its ``kind``.
        task: ``image``, ``text``, ``audio`` or ``video``.

    Raises:
        OptionError: for an unknown task.
    """

    model_type = GATED

    base: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    task: str = "image"

    def __post_init__(self, **kwargs: Any) -> None:
        importlib.import_module(_MODEL)  # registers the model class for configs of this type
        super().__post_init__(**kwargs)
        if self.task not in TASKS:
            raise OptionError(f"task={self.task!r}: choose one of {', '.join(TASKS)}.")

    def of_base(self) -> Any:
        """The classifier's own config."""
        content = copy.deepcopy(self.base or {})
        return AutoConfig.for_model(content.pop("model_type"), **content)

    def share_with(self, config: Any) -> None:
        """Copy the labels and ``problem_type`` into the classifier's config."""
        for name in _SHARED:
            setattr(config, name, copy.deepcopy(getattr(self, name)))


def gated_config(model: Any, gate: dict[str, Any], task: str) -> GatedConfig:
    """The config to save for a model with this gate."""
    base = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    shared = {name: copy.deepcopy(getattr(model.config, name)) for name in _SHARED}
    config = GatedConfig(base=base, gate=gate, task=task, **shared)
    config.architectures, config.dtype = ["GatedModel"], model.dtype
    return config


def class_of(config: Any, task: str) -> Any:
    """The class of a classifier: the one that its config names, among those that Transformers has for the task.

    Raises:
        OptionError: if Transformers has none.
    """
    classes = classes_of(config, task)
    names = config.architectures or ()
    found = next((one for one in classes if one.__name__ in names), None)
    if found is None:
        raise OptionError(
            f"{', '.join(names) or type(config).__name__} is not a classifier for the task {task!r} that Transformers "
            "has, so it could not be loaded again: use one from Transformers."
        )
    return found


AutoConfig.register(GatedConfig.model_type, GatedConfig, exist_ok=True)
