"""Models and data sets by short name, in addition to any Hub id or local folder."""

from hf_ft.models.tasks import Task
from hf_ft.splits import stratified_split
from hf_ft.zoo.datasets import DATA_NOTICES, DATASETS, elpv, mnist5k, uci_digits
from hf_ft.zoo.models import (
    GATES,
    SHORT_NAMES,
    ShortName,
    freeze_pinned_gates,
    from_pretrained,
    load_by_position,
    load_model,
    task_of,
)
from hf_ft.zoo.sources import has_head, load_sources

__all__ = [
    "DATASETS",
    "DATA_NOTICES",
    "GATES",
    "SHORT_NAMES",
    "ShortName",
    "Task",
    "elpv",
    "freeze_pinned_gates",
    "from_pretrained",
    "has_head",
    "load_by_position",
    "load_model",
    "load_sources",
    "mnist5k",
    "stratified_split",
    "task_of",
    "uci_digits",
]
