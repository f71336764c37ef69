"""The config of an ensemble of classifiers, and the settings that its members must share."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import transformers as hf
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ft.errors import OptionError
from hf_ft.models.tasks import auto_name, classes_of
from hf_ft.models.weight_files import COLLABORATIVE

# By name: this module is imported before Transformers' models can be imported (see `auto`).
_MODEL = "hf_ft.models.ensemble.model"
TASKS = ("image", "text")
PREDICTIONS = ("sum", "mean_probability")
# Settings that the ensemble's config holds for all members.
_SHARED = ("id2label", "label2id", "problem_type")


class CollaborativeConfig(PreTrainedConfig):
    """Config of an ensemble; labels and ``problem_type`` are as for any classifier and shared by all members.

    Attributes:
        members: the members' configs as dicts, with ``model_type`` and ``architectures``.
        inputs: for each member, the index of the distinct processor that prepares its input.
        prediction: ``sum`` of the logits, or ``mean_probability``.
        task: ``image`` or ``text``.
        sources: for each member, the public name of the model it was loaded from, if it has one.
        ancestors: for each member, the public name of the pretrained model it descends from, if known.

    Raises:
        OptionError: for an unknown value, or if the number of values differs from the number of members.
    """

    model_type = COLLABORATIVE
    keys_to_ignore_at_inference = ["member_logits"]

    members: list[dict[str, Any]] | None = None
    inputs: list[int] | None = None
    prediction: str = "sum"
    task: str = "image"
    sources: list[str | None] | None = None
    ancestors: list[str | None] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        importlib.import_module(_MODEL)  # registers the model class for configs of this type
        super().__post_init__(**kwargs)
        self.members = list(self.members or [])
        count = len(self.members)
        self.inputs = [0] * count if self.inputs is None else list(self.inputs)
        self.sources = [None] * count if self.sources is None else list(self.sources)
        self.ancestors = [None] * count if self.ancestors is None else list(self.ancestors)
        for name, choices in (("prediction", PREDICTIONS), ("task", TASKS)):
            if getattr(self, name) not in choices:
                raise OptionError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        for name in ("inputs", "sources", "ancestors"):
            if len(getattr(self, name)) != count:
                raise OptionError(f"{name}={getattr(self, name)!r} must have one value for each of {count} members.")
        if set(self.inputs) != set(range(len(set(self.inputs)))):
            raise OptionError(f"inputs={self.inputs!r} must number the distinct processors 0, 1, ... without gaps.")

    def member(self, index: int) -> Any:
        """The config of one member, with the ensemble's labels."""
        assert self.members is not None
        content = copy.deepcopy(self.members[index])
        config = AutoConfig.for_model(content.pop("model_type"), **content)
        self.share_with(config)
        config.dtype = self.dtype or config.dtype
        if self._attn_implementation is not None:
            config._attn_implementation = self._attn_implementation
        return config

    def share_with(self, config: Any) -> None:
        """Copy the shared settings into the config of a member."""
        for name in _SHARED:
            setattr(config, name, copy.deepcopy(getattr(self, name)))


def described(model: Any) -> dict[str, Any]:
    """The config of a member as a dict, without the settings that the ensemble's config holds."""
    content = model.config.to_diff_dict()
    content["architectures"] = [type(model).__name__]
    return {name: value for name, value in content.items() if name not in _SHARED}


def common_config(models: Sequence[Any]) -> dict[str, Any]:
    """The settings shared by all members: ``task``, ``id2label``, ``label2id``, ``problem_type``.

    Raises:
        OptionError: if the members are incompatible; the message names them.
    """
    if not models:
        raise OptionError("members is empty: at least one classifier is needed.")
    names = [f"member {index} ({type(model).__name__})" for index, model in enumerate(models)]
    for index, model in enumerate(models):
        if any(model is other for other in models[:index]):
            raise OptionError(f"{names[index]} occurs twice: give a copy (copy.deepcopy).")
    tasks = [_task_of(model, name) for model, name in zip(models, names, strict=True)]
    for name, task, model in zip(names, tasks, models, strict=True):
        if task != tasks[0]:
            raise OptionError(f"{names[0]} is for {tasks[0]}, but {name} is for {task}: use members for one task.")
        _same_labels(names[0], models[0].config, name, model.config)
    problems = {model.config.problem_type: name for name, model in zip(names, models, strict=True)}
    problems.pop(None, None)
    if len(problems) > 1:
        values = ", ".join(f"{name} has {problem!r}" for problem, name in problems.items())
        raise OptionError(f"problem_type: {values}; give all members the same one, or none.")
    first = models[0].config
    labels = {"id2label": dict(first.id2label), "label2id": dict(first.label2id)}
    return {"task": tasks[0], "problem_type": next(iter(problems), None), **labels}


def _same_labels(first: str, one: Any, name: str, other: Any) -> None:
    fix = "load all members with the same num_labels or id2label."
    if one.num_labels != other.num_labels:
        raise OptionError(
            f"{first} has num_labels={one.num_labels}, but {name} has num_labels={other.num_labels}: {fix}"
        )
    for index, label in one.id2label.items():
        if other.id2label.get(index) != label:
            raise OptionError(
                f"id2label: {first} calls class {index} {label!r}, but {name} calls it {other.id2label.get(index)!r}: "
                f"{fix}"
            )


def _task_of(model: Any, name: str) -> str:
    """The task of a Transformers classifier, by its class."""
    if not isinstance(model, hf.PreTrainedModel):
        raise OptionError(f"{name} is not a Transformers model with a config: give a PreTrainedModel.")
    if model.config.model_type == COLLABORATIVE:
        raise OptionError(f"{name} is itself an ensemble: give its members, list(model.members).")
    if getattr(type(model), "_auto_class", None) is not None:
        raise OptionError(
            f"{name} runs code from the Hub, which is not loaded here: use a model that is part of Transformers."
        )
    for task in TASKS:
        if type(model) in classes_of(model.config, task):
            return task
    raise OptionError(
        f"{name} is not a classifier that {' or '.join(map(auto_name, TASKS))} knows, so it could not be loaded again: "
        "use one from Transformers, or register the class there and with AutoConfig."
    )


AutoConfig.register(CollaborativeConfig.model_type, CollaborativeConfig, exist_ok=True)
