"""The task of a classifier: which of Transformers' Auto classes creates and loads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import transformers as hf

from hf_ft.models.weight_files import OURS

Task = Literal["image", "text", "audio", "video"]
TASKS: tuple[Task, ...] = get_args(Task)

# By name: this module is imported before Transformers' models can be imported.
_NAMES: dict[str, str] = {
    "image": "ImageClassification",
    "text": "SequenceClassification",
    "audio": "AudioClassification",
    "video": "VideoClassification",
}


def auto_name(task: str) -> str:
    return f"AutoModelFor{_NAMES[task]}"


def auto_model(task: str) -> Any:
    """The Transformers Auto class that creates and loads the classifiers of a task."""
    return getattr(hf, auto_name(task))


def mapping_name(task: str) -> str:
    """The name of the mapping from configs to the model classes of a task."""
    words = "".join(f"_{letter}" if letter.isupper() else letter for letter in _NAMES[task])
    return f"MODEL_FOR{words.upper()}_MAPPING"


def classes_of(config: Any, task: str) -> tuple[type, ...]:
    """The model classes of a task for a config; empty if it has none."""
    mapping = getattr(hf, mapping_name(task))
    if type(config) not in mapping:
        return ()
    found = mapping[type(config)]
    return found if isinstance(found, tuple) else (found,)


def tasks_of(config: Any) -> Sequence[Task]:
    """The tasks for which a config has a classifier: of several, the one whose class it names, if it names one."""
    own = getattr(config, "task", None)
    if str(getattr(config, "model_type", "")).startswith(OURS) and own in TASKS:
        return (own,)
    classes = {task: {one.__name__ for one in classes_of(config, task)} for task in TASKS}
    fitting = [task for task in TASKS if classes[task]]
    named = [task for task in fitting if classes[task].intersection(getattr(config, "architectures", None) or ())]
    return named if len(fitting) > 1 and named else fitting
